"""Grouped matrix product: rows in expert order, each times its own expert's matrix.

    gmm       rows [M, A], w [E, B, A] or [E, A, B], ends [E] -> [M, B]
    zero_tail rows of nobody, past ends[-1], become zero

Rows past ends[-1] are neither read nor written. One kernel serves the down projection (h w2^T) and the input gradient
(dz w13), which read the same weights along either dimension: there is no transposed copy. Deliberately absent: a gather
of rows (their tokens' tensors have their own kernels), an epilogue.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.configs import Config
from moe.kernels.launch import device_of, launch
from moe.kernels.tiles import product, store, tile_rows, tile_scan


@triton.jit
def _gmm(
    rows, w, ends, out, n, k, n_experts, stride_rows, stride_we, stride_wn, stride_wk,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scan = tile_scan(ends, n_experts, EXPERTS, BLOCK_M)
    across = tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.max(scan, 0) * across, tl.num_programs(0)):
        expert, first, count = tile_rows(scan, ends, tile // across, BLOCK_M)
        n0 = tile % across * BLOCK_N
        m, c, row = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.cast(first, tl.int64)
        own = tl.where(m < count, m, 0)
        a = rows + row * stride_rows
        b = w + tl.cast(expert, tl.int64) * stride_we + tl.cast(n0, tl.int64) * stride_wn
        acc = product(
            a, own * stride_rows, b, c * stride_wn, stride_wk, k, c < n - n0,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN, SWAP, PRECISION,
        )  # fmt: skip
        store(acc, out + row * n + n0, n, count, n - n0, BLOCK_N)


def gmm(rows: Tensor, w: Tensor, ends: Tensor, transpose: bool, config: Config | None = None) -> Tensor:
    """[M, A] x [E, B, A] (transpose) or [E, A, B] -> [M, B]: rows @ w[e].T or rows @ w[e], in the rows' dtype."""
    tiles.check("gmm", rows, {"w": w}, {"ends": ends})
    m, k = rows.shape
    experts, n = w.shape[0], w.shape[1 if transpose else 2]
    fits = w.shape[2 if transpose else 1] == k and ends.shape == (experts,)
    tiles.fit(f"gmm(transpose={transpose})", fits, rows=rows, w=w, ends=ends)
    out = tiles.empty(rows, m, n)
    if out.numel() == 0:
        return out
    rows, w = tiles.packed(rows), tiles.packed(w)
    c = tiles.tiles_of("gmm", rows, m, experts, n, k, config)
    grid = tiles.programs(rows, tiles.row_tiles(m, experts, c.block_m) * triton.cdiv(n, c.block_n), c)
    stride_n, stride_k = (w.stride(1), w.stride(2)) if transpose else (w.stride(2), w.stride(1))
    launch(
        _gmm, (grid,), rows, w, ends, out, n, k, experts, rows.stride(0), w.stride(0), stride_n, stride_k,
        **tiles.shape_of(c, experts, n, k, rows.dtype),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["m"])
def _zero_tail(rows, ends, m, n, n_experts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    r, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), rows.dtype.element_ty)
    start = tl.load(ends + n_experts - 1)
    for first in tl.range(start + tl.program_id(0) * BLOCK_M, m, tl.num_programs(0) * BLOCK_M):
        at = rows + tl.cast(first, tl.int64) * n + (r * n)[:, None] + c[None, :]
        for n0 in tl.range(0, n, BLOCK_N):
            tl.store(at + n0, zeros, mask=(r < m - first)[:, None] & (c < n - n0)[None, :])


def zero_tail(rows: Tensor, ends: Tensor) -> Tensor:
    """Zeros into the rows [M, B] past ends[-1], in place; for those who hand rows out."""
    tiles.check("zero_tail", rows, {}, {"ends": ends})
    tiles.fit("zero_tail of contiguous rows", rows.dim() == 2 and rows.is_contiguous(), rows=rows)
    if rows.numel():
        m, n = rows.shape
        grid = (min(triton.cdiv(m, 16), 2 * device_of(rows).sms),)
        block_n = min(512, triton.next_power_of_2(n))
        launch(_zero_tail, grid, rows, ends, m, n, ends.shape[0], BLOCK_M=16, BLOCK_N=block_n, num_warps=4)
    return rows
