"""Routed experts as a chain of Triton kernels: one token's way from its ids to its sum, and back.

    forward     order: ids -> order, inv, ends          sort_by_expert
                x, w13, gates -> z [M, 2F], h [M, F]    up_swiglu, rows gathered on the way; the gate is in h
                h w2^T -> rows [M, D]                   gmm
                sum of each token's rows -> y           combine
    backward    dy, w2, z -> dz, h, dgates              bwd_act, dy gathered on the way; h is made again
                dy^T h -> dw2                           dw
                dz w13 -> rows; their sums -> dx        gmm, combine
                dz^T x -> dw13                          dw

Kept between the two: x, z and the order. The gate's gradient is <dy w2, silu(z_gate) z_up>, so [M, D] results of the
experts are never kept. No step waits for the device and no size depends on ids: M = N K rows, whoever chose.

Source: the memory plan is SonicMoE's (arXiv 2512.14080); the rest is told in docs/kernels.md.
"""

from __future__ import annotations

from torch import Tensor

from moe.kernels.bwd_act import bwd_act
from moe.kernels.combine import combine
from moe.kernels.dw import dw
from moe.kernels.gmm import gmm, zero_tail
from moe.kernels.order import sort_by_expert
from moe.kernels.up_swiglu import up_swiglu


def experts_forward(
    x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, keep_z: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y [N, D]; z [M, 2F], empty unless kept; order [M], inv [N, K], ends [E] int32."""
    order, inv, ends = sort_by_expert(experts, w13.shape[0])
    z, h = up_swiglu(x, w13, gates, ends, order, save_z=keep_z)
    y = combine(gmm(h, w2, ends, transpose=True), inv)
    return y, x.new_empty(0) if z is None else z, order, inv, ends


def experts_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, gates: Tensor, z: Tensor, order: Tensor, inv: Tensor, ends: Tensor,
    weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of x, w13, w2, gates, in their dtypes; those of the weights empty unless wanted."""
    dy, k = dy.contiguous(), inv.shape[1]
    if not z.numel():
        z = up_swiglu(x, w13, gates, ends, order)[0]
    dz, h, dgates = bwd_act(dy, w2, z, gates, ends, order)
    dw13, dw2 = w13.new_empty(0), w2.new_empty(0)
    if weights:
        dw2 = dw(dy, h, ends, order, gather="a", top_k=k, out_dtype=w2.dtype)
    del h
    dx = combine(gmm(dz, w13, ends, transpose=False), inv)
    if weights:
        dw13 = dw(dz, x, ends, order, gather="b", top_k=k, out_dtype=w13.dtype)
    return dx, dw13, dw2, dgates


def rows_forward(
    rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, keep_z: bool = True
) -> tuple[Tensor, Tensor]:
    """The same for rows in expert order -> y [M, D], zero past ends[-1]; z [M, 2F], empty unless kept."""
    z, h = up_swiglu(rows, w13, row_gates, ends, save_z=keep_z)
    y = zero_tail(gmm(h, w2, ends, transpose=True), ends)
    return y, rows.new_empty(0) if z is None else z


def rows_backward(
    dy: Tensor, rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, z: Tensor, weights: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of rows, w13, w2, row_gates, in their dtypes; those of the weights empty unless wanted."""
    dy = dy.contiguous()
    if not z.numel():
        z = up_swiglu(rows, w13, row_gates, ends)[0]
    dz, h, dgates = bwd_act(dy, w2, z, row_gates, ends)
    dw13, dw2 = w13.new_empty(0), w2.new_empty(0)
    if weights:
        dw2 = dw(dy, h, ends, out_dtype=w2.dtype)
    del h
    drows = zero_tail(gmm(dz, w13, ends, transpose=False), ends)
    if weights:
        dw13 = dw(dz, rows, ends, out_dtype=w13.dtype)
    return drows, dw13, dw2, dgates
