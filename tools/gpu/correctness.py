"""Every kernel, the whole chain, routing and attention against float64 on this device, outputs poisoned with NaN.

Single kernels get inputs that are rounded already, so their error is one rounding; the chain rounds in between. Two
limits: the error over all numbers, |got - right| / |right|, and the largest single one against the largest number, so
that one wrong number among millions is noticed. Production tiles: size S whole, M and L with fewer experts and as many
rows for each, which takes the same row of the table of tiles.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from calls import KERNELS, OURS, answered_by
from cases import Exact, Part, Problem, error
from floors import SIZES, TINY, Shape
from machine import Clock, Machine, first_line
from torch import Tensor

MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
TOLERANCE = {"bf16": 4e-3, "fp16": 5e-4, "fp32": 6e-6, "tf32": 2e-3}
"""Of one kernel; a chain may have 2.5 times as much, one number twice as much of the largest."""
CHAIN = 2.5
ODD = Shape(37, 74, 21, 6, 3)
WIDE = Shape(203, 136, 56, 10, 4)
SLICES = {"M/16": SIZES["M"]._replace(tokens=1024, experts=16), "L/16": SIZES["L"]._replace(tokens=2048, experts=16)}
AWKWARD = ("hot", "crowd", "half-empty", "nobody")


class Check(NamedTuple):
    case: str
    what: str
    mode: str
    error: float
    worst: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance and self.worst <= 2 * self.tolerance  # NaN is not


class Found:
    """Checks as they are made; failures in words."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.failures: list[str] = []
        self.skipped: list[str] = []

    def compare(self, case: str, row: str, mode: str, got: tuple, parts: list[Part], tolerance: float) -> None:
        for tensor, part in zip(got, parts):
            name = row if part.name in (row, "rows", "y") and len(parts) == 1 else f"{row} {part.name}"
            check = Check(case, name, mode, *error(tensor, part), tolerance)
            self.checks.append(check)
            if not check.ok:
                self.failures.append(
                    f"{case}, {mode}: {name} off by {check.error:.2g} overall, {check.worst:.2g} at most; allowed {tolerance:g}"
                )

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What is raised is a failure, not the end."""
        try:
            yield
        except Exception as raised:
            self.failures.append(f"{what}: {first_line(raised)}")

    def demand(self, what: str, holds: bool, why: str = "") -> None:
        self.checks.append(Check("exact", what, "", 0.0 if holds else float("inf"), 0.0, 0.0))
        if not holds:
            self.failures.append(f"{what}{f': {why}' if why else ''}")

    def to_dict(self) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for c in self.checks:
            key = f"{c.what} {c.mode}".strip()
            at = rows.setdefault(
                key, {"what": c.what, "mode": c.mode, "checks": 0, "error": 0.0, "worst": 0.0, "tolerance": 0.0}
            )
            at["checks"] += 1
            for name in ("error", "worst", "tolerance"):
                at[name] = max(at[name], getattr(c, name))
        return {
            "checks": len(self.checks), "failures": self.failures, "skipped": self.skipped, "table": list(rows.values()),
        }  # fmt: skip


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty holds NaN and huge whole numbers: a result that was never written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def precision(mode: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def plan(tiny: bool) -> list[tuple[str, Shape, str, str]]:
    """(case, shape, routing, mode), the telling ones first."""
    if tiny:
        return [("tiny", TINY, "uniform", "bf16"), ("odd", ODD._replace(tokens=7), "nobody", "fp32")]
    found = [("odd", ODD, kind, mode) for mode in MODES for kind in AWKWARD]
    found += [("one token", ODD._replace(tokens=1), "uniform", mode) for mode in MODES]
    found += [(name, s, "zipf", mode) for mode in MODES for name, s in SLICES.items()]
    found += [("S", SIZES["S"], kind, "bf16") for kind in ("uniform", "half-empty")]
    found += [("wide", WIDE, kind, mode) for mode in MODES for kind in ("uniform", "nobody")]
    return found + [("S", SIZES["S"], "zipf", mode) for mode in ("fp16", "tf32", "fp32")]


def run(machine: Machine, clock: Clock, tiny: bool) -> dict[str, Any]:
    found = Found()
    self_tests(found, machine)
    routing(found, machine, tiny)
    for case, shape, kind, mode in plan(tiny):
        if clock.has(8, f"correctness of {case} {kind} {mode} and what follows it"):
            with precision(mode), found.trying(f"{case} {kind} {mode}"):
                one(found, f"{case} {kind}", Problem(shape, MODES[mode], machine.device, kind), mode)
        else:
            break
    no_tokens(found, machine)
    return found.to_dict()


def one(found: Found, case: str, p: Problem, mode: str) -> None:
    """All kernels and the chain on one problem."""
    exact, few = Exact(p), Exact(p, most_tokens=64, most_experts=8)
    for row in KERNELS:
        with found.trying(f"{case}, {mode}: {row}"), poisoned():
            found.compare(case, row, mode, OURS[row](p), exact.of(row), TOLERANCE[mode])
    whole = exact if p.shape.rows <= 4096 else few
    with found.trying(f"{case}, {mode}: chain"), poisoned(), answered_by("triton"):
        made = OURS["forward+backward"](p)
        found.compare(case, "chain", mode, made, whole.of("forward+backward"), CHAIN * TOLERANCE[mode])
        if whole is exact:
            sorted_rows(found, case, p, exact, mode)


def sorted_rows(found: Found, case: str, p: Problem, exact: Exact, mode: str) -> None:
    """`grouped_swiglu` on rows that stand in expert order already, next to each other or at an odd distance. What stands
    past ends[-1] is never read and comes back as zeros."""
    from moe import ops

    rows, dy = p.x[p.token], p.dy[p.token]
    rows[p.live :] = dy[p.live :] = torch.nan
    apart = rows.new_full((len(rows), rows.shape[1] + 3), torch.nan)[:, 3:]
    apart.copy_(rows)
    gates = p.gates.flatten()[p.order.long().clamp_max(p.shape.rows - 1)]
    gates[p.live :] = torch.nan
    for name, left in (("sorted rows", rows), ("rows apart", apart)):
        given = [t.detach().requires_grad_() for t in (left, p.w13, p.w2, gates)]
        y = ops.grouped_swiglu(*given[:3], p.ends, given[3])
        drows, dw13, dw2, dgates = torch.autograd.grad(y, given, dy)
        made = (y.detach(), drows, dw13, dw2, dgates)
        found.compare(case, name, mode, made, exact.of("sorted rows"), CHAIN * TOLERANCE[mode])
        tails = [t[p.live :] for t in (y, drows, dgates)]
        found.demand(f"{name}: those of nobody are zero", not any(t.count_nonzero() for t in tails), f"{case}, {mode}")


def no_tokens(found: Found, machine: Machine) -> None:
    """Nothing in, nothing out, and zeros for every expert's weights."""
    with found.trying("no tokens"), answered_by("triton"), poisoned():
        p = Problem(ODD._replace(tokens=0), torch.bfloat16, machine.device)
        y, dx, dw13, dw2, dgates = OURS["forward+backward"](p)
        empty = not (y.numel() or dx.numel() or dgates.numel())
        found.demand("no tokens", empty and not dw13.count_nonzero() and not dw2.count_nonzero())


def self_tests(found: Found, machine: Machine) -> None:
    """What `auto` asks before it trusts the kernels."""
    from moe.kernels import selftest

    for mode, dtype in MODES.items():
        with found.trying(f"self-test {mode}"), precision(mode):
            wrong = selftest.disagreement(machine.device, dtype)
            found.demand("self-test", not wrong, f"{mode}: {wrong}")


# ------------------------------------------------------------------------------------------------------------- routing

NEAR = 1e-6
"""Scores this near may be chosen either way: fp32 rounds affinities."""


def routing(found: Found, machine: Machine, tiny: bool) -> None:
    """Choice, gates, histogram and gradient against float64; order against torch's stable sort."""
    n = 24 if tiny else 8192
    for e, k, n_group, topk_group, scoring in (
        (256, 8, 8, 4, "sigmoid"),
        (64, 6, 1, 1, "softmax"),
        (40, 3, 1, 1, "sigmoid"),
    ):
        for masked in (False, True):
            case = f"route {e} top-{k} {scoring}{', masked' if masked else ''}"
            with found.trying(case):
                _route(found, case, machine.device, n, e, k, n_group, topk_group, scoring, masked)
    with found.trying("route as the table has it"):
        ids, _, order, inv, ends = OURS["route"](
            p := Problem(TINY if tiny else SIZES["S"], torch.bfloat16, machine.device)
        )
        _order(found, "route, then order by its histogram", ids, p.shape.experts, order, inv, ends)
    with found.trying("order"):
        p = Problem(WIDE, torch.bfloat16, machine.device, "nobody")
        from moe.kernels.order import sort_by_expert

        _order(found, "order of ids, some of nobody", p.ids, p.shape.experts, *sort_by_expert(p.ids, p.shape.experts))


def _route(
    found: Found, case: str, device: torch.device, n: int, e: int, k: int, n_group: int, topk_group: int, scoring: str,
    masked: bool,
) -> None:  # fmt: skip
    from moe.kernels.route import route, route_backward

    random = torch.Generator(device).manual_seed(e)
    logits = torch.randn(n, e, device=device, generator=random)
    bias = 0.1 * torch.randn(e, device=device, generator=random)
    mask = torch.rand(n, device=device, generator=random) < 0.8 if masked else None
    with poisoned():
        ids, gates, hist = route(logits, bias, k, n_group, topk_group, scoring, True, 2.5, mask)
    used = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask
    found.demand(f"{case}: masked tokens have no expert", bool((ids[~used] == e).all() and (gates[~used] == 0).all()))
    counts = torch.zeros(e, dtype=torch.int64, device=device)
    counts.scatter_add_(0, ids[used].flatten(), torch.ones_like(ids[used].flatten()))
    found.demand(f"{case}: histogram", torch.equal(hist.sum(0), counts))
    right, sure = _best(logits.double(), bias.double(), k, n_group, topk_group, scoring)
    same = (ids.sort(-1).values == right.sort(-1).values).all(-1)
    wrong = int((~same & sure & used).sum())
    found.demand(f"{case}: choice", not wrong, f"{wrong} of {n} tokens chose others than float64")

    wide = logits.double().requires_grad_()
    s = wide.sigmoid() if scoring == "sigmoid" else wide.softmax(-1)
    at = s.gather(1, ids.clamp_max(e - 1)) * used.unsqueeze(1)
    exact = at / (at.sum(-1, keepdim=True) + 1e-20) * 2.5
    upstream = torch.randn(n, k, device=device, generator=random)
    (dlogits,) = torch.autograd.grad(exact, wide, upstream.double())
    with poisoned():
        got = route_backward(upstream, logits, ids, scoring, True, 2.5)
    parts = [Part("gates", slice(None), exact.detach()), Part("dlogits", slice(None), dlogits)]
    found.compare(case, "route", "fp32", (gates, got), parts, 5e-6)


def _best(logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, scoring: str) -> tuple[Tensor, Tensor]:
    """float64 -> ids [N, K], and [N] whether no tie was near."""
    score = (logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)) + bias
    sure = torch.ones(len(score), dtype=torch.bool, device=score.device)
    if topk_group < n_group:
        of_group = score.view(len(score), n_group, -1)
        strength = of_group.topk(2, -1).values.sum(-1) if scoring == "sigmoid" else of_group.amax(-1)
        best = strength.topk(topk_group + 1, -1)
        sure &= best.values[:, -2] - best.values[:, -1] > NEAR
        open_ = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, best.indices[:, :-1], True)
        score = of_group.masked_fill(~open_.unsqueeze(-1), -torch.inf).flatten(1)
    best = score.topk(k + 1, -1)
    return best.indices[:, :k], sure & (best.values[:, k - 1] - best.values[:, k] > NEAR)


def _order(found: Found, case: str, ids: Tensor, e: int, order: Tensor, inv: Tensor, ends: Tensor) -> None:
    flat = ids.flatten()
    flat = torch.where((flat >= 0) & (flat < e), flat, e)
    owner, right = torch.sort(flat, stable=True)
    bounds = torch.searchsorted(owner, torch.arange(e, device=ids.device), right=True)
    live = int(bounds[-1])
    back = torch.full_like(flat, -1)
    back[right[:live]] = torch.arange(live, device=ids.device)
    found.demand(f"{case}: ends", torch.equal(ends.long(), bounds))
    found.demand(f"{case}: order is the stable one", torch.equal(order[:live].long(), right[:live]))
    found.demand(f"{case}: inverse", torch.equal(inv.flatten().long(), back))
