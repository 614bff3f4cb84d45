"""What else computes the rows of the table: PyTorch's grouped product, loops, other libraries, and an upper bound.

    grouped_mm   F.grouped_mm and PyTorch around it; whole rows: this project's PyTorch path, which is built on it
    loop         torch.mm for each expert, its number of rows known to the host in advance (a gift)
    bmm          torch.bmm on equal numbers of rows, nothing around the products: no grouped kernel can be expected to win
    liger, sonic, deepgemm    liger-kernel, SonicMoE, DeepGEMM, where they can be imported

A peer is set up outside the clock: `make(problem)` gives the call that is timed. Gathers count where ours count.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from calls import OURS, Outputs, answered_by, groups, leaves
from cases import Problem
from torch import Tensor

Ready = Callable[[], Outputs]
LIGER, SONIC, DEEPGEMM = "liger_kernel.ops.fused_moe", "sonicmoe", "deep_gemm"


class Peer(NamedTuple):
    name: str
    module: str | None
    """What must be importable; None: nothing beside torch."""
    rows: dict[str, Callable[[Problem], Ready]]
    captured: bool = True
    """Whether a CUDA graph can hold it; one that waits for the device cannot be."""
    exact: bool = True
    """Whether its results are the row's: those of an upper bound are not."""
    patience: float = 1.0
    """Seconds that must be left before it starts: some tune, or compile C++, on their first call of a shape."""


def why_not(peer: Peer) -> str:
    """Why a peer takes no part, or nothing."""
    if peer.module is None:
        return ""
    try:
        importlib.import_module(peer.module)
    except Exception as error:  # compiled packages fail in ways of their own
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return ""


def by(path: str, row: str) -> Callable[[Problem], Ready]:
    """A row as this project computes it on one of its paths."""

    def make(p: Problem) -> Ready:
        def call() -> Outputs:
            with answered_by(path):
                return OURS[row](p)

        return call

    return make


# ------------------------------------------------------------------------------------------------------------- PyTorch


def _gates(p: Problem) -> Tensor:
    return p.gates.flatten()[p.order.long()].to(p.dtype).unsqueeze(1)


def _act(z: Tensor, gates: Tensor) -> Tensor:
    width = z.shape[1] // 2
    return F.silu(z[:, :width]) * z[:, width:] * gates


def _act_backward(dh: Tensor, z: Tensor, gates: Tensor) -> Outputs:
    width = z.shape[1] // 2
    gate, up = z[:, :width], z[:, width:]
    s = torch.sigmoid(gate)
    silu = gate * s
    a = silu * up
    dgates = (dh * a).sum(1, dtype=torch.float32)
    dh = dh * gates
    return torch.cat([dh * up * (s + silu * (1 - s)), dh * silu], 1), a * gates, dgates


def _bwd_act(p: Problem, product: Product) -> Ready:
    gates, order = _gates(p), p.order.long()

    def call() -> Outputs:
        dz, h, dg = _act_backward(product(p.dy.index_select(0, p.token), p.w2), p.z, gates)
        dgates = torch.empty_like(dg)
        dgates[order] = dg
        return dz, h, dgates

    return call


def _up(p: Problem, product: Product) -> Ready:
    gates = _gates(p)

    def call() -> Outputs:
        z = product(p.x.index_select(0, p.token), p.w13.mT)
        return z, _act(z, gates)

    return call


Product = Callable[[Tensor, Tensor], Tensor]


def _products(
    by_weight: Callable[[Problem], Product], by_rows: Callable[[Problem], Product]
) -> dict[str, Callable[[Problem], Ready]]:
    """Rows made of a product by weights, [M, A], [E, A, B] -> [M, B], or by rows, [M, A], [M, B] -> [E, A, B]."""

    def of(make: Callable[[Problem], Product], run: Callable[[Problem, Product], Tensor]) -> Callable[[Problem], Ready]:
        def ready(p: Problem) -> Ready:
            product = make(p)
            return lambda: (run(p, product),)

        return ready

    return {
        "up_swiglu": lambda p: _up(p, by_weight(p)),
        "down": of(by_weight, lambda p, product: product(p.h, p.w2.mT)),
        "bwd_act": lambda p: _bwd_act(p, by_weight(p)),
        "dx": of(by_weight, lambda p, product: product(p.dz, p.w13)),
        "dw2": of(by_rows, lambda p, product: product(p.dy.index_select(0, p.token), p.h)),
        "dw13": of(by_rows, lambda p, product: product(p.dz, p.x.index_select(0, p.token))),
    }


def _grouped(p: Problem) -> Product:
    return lambda rows, w: F.grouped_mm(rows, w, offs=p.ends)


def _grouped_weights(p: Problem) -> Product:
    return lambda a, b: F.grouped_mm(a.t(), b, offs=p.ends)


def _loop(p: Problem) -> Product:
    spans = list(p.spans())

    def product(rows: Tensor, w: Tensor) -> Tensor:
        out = rows.new_empty(len(rows), w.shape[2])
        for e, start, end in spans:
            torch.mm(rows[start:end], w[e], out=out[start:end])
        return out

    return product


def _loop_weights(p: Problem) -> Product:
    spans = list(p.spans())

    def product(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_zeros(p.shape.experts, a.shape[1], b.shape[1])
        for e, start, end in spans:
            torch.mm(a[start:end].t(), b[start:end], out=out[e])
        return out

    return product


def _combine(p: Problem) -> Ready:
    flat, shape = p.inv.flatten(), (*p.inv.shape, p.shape.width)
    return lambda: (p.rows.index_select(0, flat).view(shape).sum(1),)


def _route(p: Problem) -> Ready:
    from moe.layers.router import Router

    s, (n_group, topk_group) = p.shape, groups(p)
    with torch.device(p.device):
        router = Router(s.width, s.experts, s.choices, n_group, topk_group, routed_scaling_factor=2.5).eval()

    def call() -> Outputs:
        ids, gates, counts = router._route(torch.sigmoid(p.logits), None, None)
        order = torch.sort(ids.flatten().to(torch.int16), stable=True).indices
        inv = torch.empty_like(order)
        inv[order] = torch.arange(len(order), device=p.device)
        return ids, gates, order, inv, counts.cumsum(0).int()

    return call


def _bound(row: str) -> Callable[[Problem], Ready]:
    """The row's product over M / E rows for each expert, its operands as they would have been gathered."""

    def make(p: Problem) -> Ready:
        s = p.shape
        each = max(1, s.rows // s.experts)

        def rows(width: int) -> Tensor:
            return torch.randn(s.experts, each, width, device=p.device, dtype=p.dtype)

        narrow, wide = s.hidden, 2 * s.hidden
        a, b = {
            "up_swiglu": lambda: (rows(s.width), p.w13.mT), "down": lambda: (rows(narrow), p.w2.mT),
            "bwd_act": lambda: (rows(s.width), p.w2), "dx": lambda: (rows(wide), p.w13),
            "dw2": lambda: (rows(s.width).mT, rows(narrow)), "dw13": lambda: (rows(wide).mT, rows(s.width)),
        }[row]()  # fmt: skip
        return lambda: (torch.bmm(a, b),)

    return make


PRODUCTS = ("up_swiglu", "down", "bwd_act", "dx", "dw2", "dw13")


# ------------------------------------------------------------------------------------------------------ other libraries


def _differentiated(p: Problem, layer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], backward: bool) -> Ready:
    def call() -> Outputs:
        given = leaves(p)
        if not backward:
            with torch.no_grad():
                return (layer(*given),)
        y = layer(*given)
        return y, *torch.autograd.grad(y, given, p.dy)

    return call


def _liger(backward: bool) -> Callable[[Problem], Ready]:
    def make(p: Problem) -> Ready:
        apply = importlib.import_module(LIGER).LigerFusedMoEFunction.apply
        ids = p.ids.int()
        return _differentiated(p, lambda x, w13, w2, gates: apply(x, w13, w2, ids, gates), backward)

    return make


def _sonic(backward: bool) -> Callable[[Problem], Ready]:
    def make(p: Problem) -> Ready:
        library = importlib.import_module(f"{SONIC}.functional")
        kind = importlib.import_module(f"{SONIC}.enums").ActivationType.SWIGLU
        s = p.shape
        token = torch.arange(s.rows, dtype=torch.int32, device=p.device) // s.choices
        ids = p.ids.int().flatten()

        def layer(x: Tensor, w13: Tensor, w2: Tensor, gates: Tensor) -> Tensor:
            stream = torch.cuda.current_stream().cuda_stream
            return library.moe_general_routing_inputs(
                x, gates.flatten(), token, ids, w13.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, s.experts, stream,
                kind, not backward, is_concatenated_gate_up=True,
            )[0]  # fmt: skip

        return _differentiated(p, layer, backward)

    return make


def _deepgemm(row: str) -> Callable[[Problem], Ready]:
    """Each expert's rows filled up to its block of 128, by the host in advance."""

    def make(p: Problem) -> Ready:
        library: Any = importlib.import_module(DEEPGEMM)
        block = getattr(library, "get_mk_alignment_for_contiguous_layout", lambda: 128)()
        rows, w = (p.h, p.w2) if row == "down" else (p.dz, p.w13.mT.contiguous())
        filled = [-(-count // block) * block for count in p.counts]
        group = torch.repeat_interleave(torch.arange(p.shape.experts), torch.tensor(filled)).int().to(p.device)
        place = torch.cat([torch.arange(start, end) + sum(filled[:e]) - start for e, start, end in p.spans()]).to(
            p.device
        )
        left = rows.new_zeros(len(group), rows.shape[1])
        left[place] = rows[: p.live]
        out = rows.new_empty(len(group), w.shape[1])

        def call() -> Outputs:
            library.m_grouped_bf16_gemm_nt_contiguous(left, w, out, group)
            return (Lazy(out, place),)

        return call

    return make


class Lazy(NamedTuple):
    """Rows that stand at odd places: taken from there outside the clock."""

    rows: Tensor
    place: Tensor


WHOLE = ("forward", "forward+backward")
PEERS = (
    Peer("ours", None, {row: by("triton", row) for row in OURS}),
    Peer(
        "grouped_mm", None,
        _products(_grouped, _grouped_weights) | {"route": _route, "combine": _combine} | {row: by("torch", row) for row in WHOLE},
    ),
    Peer("loop", None, _products(_loop, _loop_weights)),
    Peer("bmm", None, {row: _bound(row) for row in PRODUCTS}, exact=False),
    Peer("liger", LIGER, {row: _liger(row != "forward") for row in WHOLE}, captured=False, patience=40),
    Peer("sonic", SONIC, {row: _sonic(row != "forward") for row in WHOLE}, captured=False, patience=40),
    Peer("deepgemm", DEEPGEMM, {row: _deepgemm(row) for row in ("down", "dx")}, captured=False, patience=40),
)  # fmt: skip
