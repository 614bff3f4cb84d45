"""A layer's tensors as every kernel meets them, and what float64 says the kernels should make of them.

    p = Problem(shape, torch.bfloat16, "cuda", "zipf")      random inputs; their order by torch's stable sort
    exact = Exact(p).of("dw2")                              [Part(name, where in the output, float64 values), ...]

The oracle shares no code with what it judges: a product an expert, in float64, on the inputs as they were rounded. For
large problems it looks at some rows, tokens and experts only. Names of rows of the table: floors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from floors import Shape
from torch import Tensor

ROUTINGS = ("uniform", "zipf", "half-empty")
"""What the table is measured with; `hot`, `crowd` and `nobody` are for correctness alone."""
NEVER = 2**30
"""Stands where nobody may look."""


def chosen(kind: str, s: Shape, device: torch.device, random: torch.Generator) -> Tensor:
    """[N, K] int64, K distinct experts a token.

    zipf: probability 1 / (id + 1). half-empty: odd experts are nobody's. hot: expert 1 is everybody's. crowd: the last K
    experts are everybody's. nobody: a fifth of the choices, and every fifth token, have no expert.
    """
    expert = torch.arange(s.experts, device=device)
    score = -torch.empty(s.tokens, s.experts, device=device).exponential_(generator=random).log_()  # Gumbel
    if kind == "zipf":
        score -= (expert + 1).log()
    if kind == "half-empty":
        score[:, expert % 2 == 1] = -torch.inf
    if kind == "hot":
        score[:, 1] = torch.inf
    if kind == "crowd":
        score[:, : s.experts - s.choices] = -torch.inf
    ids = score.topk(s.choices, -1).indices
    if kind == "nobody":
        ids[torch.rand(ids.shape, device=device, generator=random) < 0.2] = s.experts
        ids[::5] = s.experts
        ids[::10] = -1
    return ids


class Problem:
    """x, w13, w2, gates, dy; ids; logits; order, inv, ends; and random z, h, rows, dz in expert order."""

    def __init__(self, s: Shape, dtype: torch.dtype, device: torch.device | str, kind: str = "uniform", seed: int = 0):
        self.shape, self.dtype, self.kind = s, dtype, kind
        self.device = device = torch.device(device)
        meta = device.type == "meta"
        random = None if meta else torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(0, scale, generator=random)

        n, d, f, e, m = s.tokens, s.width, s.hidden, s.experts, s.rows
        self.x, self.dy = normal(n, d), normal(n, d)
        self.w13, self.w2 = normal(e, 2 * f, d, scale=d**-0.5), normal(e, d, f, scale=f**-0.5)
        self.gates = normal(n, s.choices, dtype=torch.float32).sigmoid_()
        self.z, self.h, self.rows, self.dz = normal(m, 2 * f), normal(m, f), normal(m, d), normal(m, 2 * f)
        self.logits, self.bias = normal(n, e, dtype=torch.float32), normal(e, scale=0.1, dtype=torch.float32)
        self.w_router = normal(e, d, scale=d**-0.5, dtype=torch.float32)
        if random is None:
            self.ids = torch.empty(n, s.choices, dtype=torch.int64, device=device)
            self.order, self.inv, self.ends = (
                torch.empty(size, dtype=torch.int32, device=device) for size in (m, self.ids.shape, e)
            )
            return
        self.ids = chosen(kind, s, device, random)
        self._sort()
        if kind == "nobody":  # tokens without an expert, and rows of nobody, may hold anything
            self.x[::5] = self.dy[::5] = torch.nan
            for t in (self.z, self.h, self.rows, self.dz):
                t[self.live :] = torch.nan

    def _sort(self) -> None:
        flat, e = self.ids.flatten(), self.shape.experts
        owner, order = torch.sort(torch.where((flat >= 0) & (flat < e), flat, e), stable=True)
        counts = torch.zeros(e + 1, dtype=torch.int64, device=self.device)
        counts.scatter_add_(0, owner, torch.ones_like(owner))
        self.ends = counts[:e].cumsum(0).int()
        self.counts: list[int] = counts[:e].tolist()
        self.live = sum(self.counts)
        inv = torch.full_like(flat, -1, dtype=torch.int32)
        inv[order[: self.live]] = torch.arange(self.live, dtype=torch.int32, device=self.device)
        self.inv, self.order = inv.view(self.ids.shape), order.int()
        self.token = order // self.shape.choices
        self.order[self.live :] = NEVER

    @property
    def alive(self) -> int:
        """Experts that somebody chose."""
        return sum(count > 0 for count in self.counts)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Expert, first row, one past its last; empty experts are left out."""
        end = 0
        for e, count in enumerate(self.counts):
            start, end = end, end + count
            if count:
                yield e, start, end


class Part(NamedTuple):
    """Some of an output, in float64."""

    name: str
    where: Tensor | slice
    value: Tensor


class Exact:
    """What float64 makes of a problem, in the order in which the kernels' wrappers return their results."""

    def __init__(self, p: Problem, most_tokens: int | None = None, most_experts: int | None = None) -> None:
        """All of it, or some tokens (first and last among them), experts (the fullest and the emptiest among them), and
        a few rows of each of these."""
        self.p, s = p, p.shape
        self.tokens = _spread(s.tokens, most_tokens).to(p.device)
        by_count = sorted(range(s.experts), key=lambda e: -p.counts[e])
        self.experts = [by_count[i] for i in _spread(s.experts, most_experts).tolist()]
        starts = [end - count for end, count in zip(torch.tensor(p.counts).cumsum(0).tolist(), p.counts)]
        self._rows_of = [torch.arange(start, start + count) for start, count in zip(starts, p.counts)]
        few = None if most_experts is None else 64
        rows = [self._rows_of[e][_spread(p.counts[e], few)] for e in self.experts]
        self.rows = torch.cat(rows).sort().values.to(p.device)

    def of(self, row: str) -> list[Part]:
        p, r, t = self.p, self.rows, self.tokens
        if row == "up_swiglu":
            z, h = self._up(r)
            return [Part("z", r, z), Part("h", r, h)]
        if row == "down":
            return [Part("rows", r, self._product(r, p.h[r], lambda e: p.w2[e].T))]
        if row == "dx":
            return [Part("rows", r, self._product(r, p.dz[r], lambda e: p.w13[e]))]
        if row == "combine":
            return [Part("y", t, self._combine(t, lambda rows: p.rows[rows].double()))]
        if row == "bwd_act":
            dz, h, dgates = self._back(r, p.z[r].double())
            return [Part("dz", r, dz), Part("h", r, h), self._gates(r, dgates)]
        if row == "dw2":
            return [self._weights("dw2", lambda rows: (p.dy[p.token[rows]], p.h[rows]))]
        if row == "dw13":
            return [self._weights("dw13", lambda rows: (p.dz[rows], p.x[p.token[rows]]))]
        if row == "sorted rows":  # y, drows, dw13, dw2, gradients of the rows' gates
            dgates = Part("row gates", r, self._back(r, self._up(r)[0])[2])
            return [Part("y", r, self._down_of(r)), Part("drows", r, self._dx_of(r)), *self._both_weights(), dgates]
        y = Part("y", t, self._combine(t, self._down_of))
        if row == "forward":
            return [y]
        assert row == "forward+backward", row
        dgates = self._gates(r, self._back(r, self._up(r)[0])[2])
        return [y, Part("dx", t, self._combine(t, self._dx_of)), *self._both_weights(), dgates]

    def _product(self, rows: Tensor, left: Tensor, weight: Callable[[int], Tensor]) -> Tensor:
        """[R, A] of these rows, each times its expert's weight."""
        owner = torch.searchsorted(self.p.ends.long(), rows, right=True)
        out = left.new_empty(len(rows), weight(0).shape[1], dtype=torch.float64)
        for e in owner.unique().tolist():
            at = (owner == e).nonzero().flatten()
            out[at] = left[at].double() @ weight(e).double()
        return out

    def _up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        p, f = self.p, self.p.shape.hidden
        z = self._product(rows, p.x[p.token[rows]], lambda e: p.w13[e].T)
        gate = p.gates.flatten()[p.order[rows].long()].double().unsqueeze(1)
        return z, torch.nn.functional.silu(z[:, :f]) * z[:, f:] * gate

    def _down_of(self, rows: Tensor) -> Tensor:
        return self._product(rows, self._up(rows)[1], lambda e: self.p.w2[e].T)

    def _dx_of(self, rows: Tensor) -> Tensor:
        return self._product(rows, self._back(rows, self._up(rows)[0])[0], lambda e: self.p.w13[e])

    def _back(self, rows: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> dz, h, dgates of these rows."""
        p, f = self.p, self.p.shape.hidden
        by = self._product(rows, p.dy[p.token[rows]], lambda e: p.w2[e])
        gate = p.gates.flatten()[p.order[rows].long()].double().unsqueeze(1)
        g, u = z[:, :f], z[:, f:]
        s = torch.sigmoid(g)
        dh = by * gate
        dz = torch.cat([dh * u * (s + g * s * (1 - s)), dh * g * s], 1)
        return dz, g * s * u * gate, (by * g * s * u).sum(1)

    def _combine(self, tokens: Tensor, rows_of: Callable[[Tensor], Tensor]) -> Tensor:
        inv = self.p.inv[tokens].long()
        some = inv >= 0
        out = torch.zeros(len(tokens), self.p.shape.width, dtype=torch.float64, device=inv.device)
        if some.any():
            out.index_add_(0, some.nonzero()[:, 0], rows_of(inv[some]))
        return out

    def _weights(self, name: str, sides: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Part:
        """a^T b over all rows of each of the experts."""
        found = []
        for e in self.experts:
            a, b = sides(self._rows_of[e].to(self.p.device))
            found.append(a.double().T @ b.double())
        return Part(name, torch.tensor(self.experts, device=self.p.device), torch.stack(found))

    def _both_weights(self) -> list[Part]:
        p = self.p
        return [
            self._weights("dw13", lambda rows: (self._back(rows, self._up(rows)[0])[0], p.x[p.token[rows]])),
            self._weights("dw2", lambda rows: (p.dy[p.token[rows]], self._up(rows)[1])),
        ]

    def _gates(self, rows: Tensor, dgates: Tensor) -> Part:
        """Where all rows are looked at, choices without an expert too: their gradient is zero."""
        slots = self.p.order[rows].long()
        if len(rows) < self.p.live:
            return Part("dgates", slots, dgates)
        whole = dgates.new_zeros(self.p.shape.rows)
        whole[slots] = dgates
        return Part("dgates", slice(None), whole)


def _spread(count: int, most: int | None) -> Tensor:
    """Up to `most` of the numbers below `count`, evenly spread, both ends included."""
    if most is None or most >= count:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most, dtype=torch.float64).round().long()


def error(got: Tensor, part: Part) -> tuple[float, float]:
    """-> |got - right| / |right| over all numbers; the largest difference against the largest number. NaN: wrong."""
    if part.name == "dgates":
        got = got.reshape(-1)
    got, right = got.detach()[part.where].double(), part.value
    if not right.numel():
        return 0.0, 0.0
    off, size = got - right, right.norm()
    if not size:
        worst = off.abs().max().item()
        return worst, worst
    return (off.norm() / size).item(), (off.abs().max() / right.abs().max()).item()
