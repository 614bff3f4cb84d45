"""Up projection and SwiGLU of grouped rows, in one kernel.

    rows of x, w13 [E, 2F, D] (gate rows, then up rows), gates, ends [E]
        -> z [M, 2F] = x_row w13[e]^T, kept for the backward pass, optional
           h [M, F] = silu(z_gate) * z_up * gate

The gate weight goes into h rather than into the expert's result: the sum over a token's experts is then a plain sum, and
that result is never kept for the gate's gradient (SonicMoE, arXiv 2512.14080). With `order`, rows are gathered on the way
in, x stays [N, D] and no copy of [M, D] exists.

The columns of one product alternate between gate and up, so that a pair that belongs together ends in one thread: the
split is free, and one wide tensor-core instruction stands for two narrow ones. h is made from z before z is rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.configs import Config
from moe.kernels.launch import launch
from moe.kernels.tiles import halves, product, rounded, tile_rows, tile_scan, wide

COLUMNS = tl.constexpr(16)
"""Of a tile finished at a time: all at once spill on sm_100, and on sm_90 at three programs a multiprocessor."""


@triton.jit
def _up_swiglu(
    x, w13, gates, ends, order, z, h, f, k, n_experts, stride_x, stride_we, stride_wn,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SAVE_Z: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scan = tile_scan(ends, n_experts, EXPERTS, BLOCK_M)
    across = tl.cdiv(f, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.max(scan, 0) * across, tl.num_programs(0)):
        expert, first, count = tile_rows(scan, ends, tile // across, BLOCK_M)
        n0 = tile % across * BLOCK_N
        m, c = tl.arange(0, BLOCK_M), tl.arange(0, 2 * BLOCK_N)
        own, row = tl.where(m < count, m, 0), tl.cast(first, tl.int64)
        if GATHER:
            slot = tl.load(order + first + own)
            a, a_at = x, (slot // TOP_K).to(tl.int64) * stride_x
            gate = tl.load(gates + slot)
        else:
            a, a_at = x + row * stride_x, own * stride_x
            gate = tl.load(gates + first + own)
        b = w13 + tl.cast(expert, tl.int64) * stride_we + tl.cast(n0, tl.int64) * stride_wn
        acc = product(
            a, a_at, b, (c // 2 + c % 2 * f) * stride_wn, 1, k, c // 2 < f - n0,
            BLOCK_M, 2 * BLOCK_N, BLOCK_K, EVEN, SWAP, PRECISION,
        )  # fmt: skip
        _finish(acc, wide(gate), z + row * (2 * f) + n0, h + row * f + n0, m, count, f - n0, f, SAVE_Z, BLOCK_N)


@triton.jit
def _finish(zs, gate, z, h, m, count, left, f, SAVE_Z: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of a tile to z and h, a piece at a time. left: columns from here to the last."""
    if WIDTH > COLUMNS:
        HALF: tl.constexpr = WIDTH // 2
        zs_a, zs_b = halves(zs)
        _finish(zs_a, gate, z, h, m, count, left, f, SAVE_Z, HALF)
        _finish(zs_b, gate, z + HALF, h + HALF, m, count, left - HALF, f, SAVE_Z, HALF)
    else:
        g, u = tl.split(tl.reshape(zs, (zs.shape[0], WIDTH, 2)))
        c = tl.arange(0, WIDTH)
        stored = (m < count)[:, None] & (c < left)[None, :]
        if SAVE_Z:
            at = z + (m * (2 * f))[:, None] + c[None, :]
            tl.store(at, rounded(g, z.dtype.element_ty), mask=stored)
            tl.store(at + f, rounded(u, z.dtype.element_ty), mask=stored)
        at = h + (m * f)[:, None] + c[None, :]
        tl.store(at, rounded(g * tl.sigmoid(g) * u * gate[:, None], h.dtype.element_ty), mask=stored)


def up_swiglu(
    x: Tensor, w13: Tensor, gates: Tensor, ends: Tensor, order: Tensor | None = None, save_z: bool = True,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """-> z [M, 2F] or None, h [M, F]. With order [M]: x [N, D], gates [N, K]; without: x [M, D], gates [M] in that order."""
    tiles.check("up_swiglu", x, {"w13": w13}, {"ends": ends, "order": order})
    tiles.check_gates("up_swiglu", x, gates)
    (experts, f2, k), m, f = w13.shape, gates.numel(), w13.shape[1] // 2
    fits = x.shape == (gates.shape[0], k) and gates.dim() == (1 if order is None else 2) and f2 == 2 * f
    fits = fits and ends.shape == (experts,) and (order is None or order.shape == (m,))
    tiles.fit("up_swiglu", fits, x=x, w13=w13, gates=gates, ends=ends, order=order)
    z, h = tiles.empty(x, m, 2 * f) if save_z else None, tiles.empty(x, m, f)
    if h.numel() == 0:
        return z, h
    x, w13, gates = tiles.packed(x), tiles.packed(w13), gates.contiguous()
    c = tiles.tiles_of("up_swiglu", x, m, experts, f, k, config)
    grid = tiles.programs(x, tiles.row_tiles(m, experts, c.block_m) * triton.cdiv(f, c.block_n), c)
    launch(
        _up_swiglu, (grid,), x, w13, gates, ends, ends if order is None else order, h if z is None else z, h,
        f, k, experts, x.stride(0), w13.stride(0), w13.stride(1),
        TOP_K=1 if order is None else gates.shape[1], GATHER=order is not None, SAVE_Z=save_z,
        **tiles.shape_of(c, experts, f, k, x.dtype),
    )  # fmt: skip
    return z, h
