"""Weight gradients of grouped rows: for each expert the product of two tensors over its own rows.

    a [M, A], b [M, B], ends [E] -> [E, A, B]: sum over the rows of expert e of a_row^T b_row

One operand may be read through `order` from token order (dy for dw2, x for dw13). Each tile of the result has one owner,
who walks the expert's rows in order: no atomics, no partial sums, the same bits whatever the grid; an expert without rows
gets zeros from its owners, never what memory held. Programs take experts by falling count, so that the last to finish
are the short ones. Deliberately absent: splitting one hot expert's rows over programs, adding into a main gradient (it
would pass autograd's hooks by).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.configs import Config, lookup
from moe.kernels.launch import device_of, launch
from moe.kernels.tiles import accumulate, store


@triton.jit
def _by_count(ends, visit, n_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """visit [E]: experts by falling count, the lower id first among equals."""
    e, mine = tl.arange(0, EXPERTS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(ends + e, mask=e < n_experts, other=0)
    count -= tl.load(ends + e - 1, mask=(e > 0) & (e < n_experts), other=0)
    own = tl.load(ends + mine, mask=mine < n_experts, other=0)
    own -= tl.load(ends + mine - 1, mask=(mine > 0) & (mine < n_experts), other=0)
    ahead = (count[None, :] > own[:, None]) | ((count[None, :] == own[:, None]) & (e[None, :] < mine[:, None]))
    place = tl.sum((ahead & (e < n_experts)[None, :]).to(tl.int32), 1)
    tl.store(visit + place, mine, mask=mine < n_experts)


@triton.jit
def _dw(
    a, b, ends, order, visit, out, n_a, n_b, n_experts, stride_a, stride_b,
    TOP_K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(n_b, BLOCK_N)
    each = tl.cdiv(n_a, BLOCK_M) * across
    for tile in tl.range(tl.program_id(0), n_experts * each, tl.num_programs(0)):
        expert = tl.load(visit + tile // each)
        a0, b0 = tile % each // across * BLOCK_M, tile % each % across * BLOCK_N
        ia, ib, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        inside_a, inside_b = ia < n_a - a0, ib < n_b - b0
        start, end = tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.range(start, end, BLOCK_K):
            live = r < end - first
            if GATHER_A or GATHER_B:
                token = (tl.load(order + first + r, mask=live, other=0) // TOP_K).to(tl.int64)
            if GATHER_A:
                left = a + a0 + ia[:, None] + (token * stride_a)[None, :]
            else:
                left = a + tl.cast(first, tl.int64) * stride_a + a0 + ia[:, None] + (r * stride_a)[None, :]
            if GATHER_B:
                right = b + b0 + (token * stride_b)[:, None] + ib[None, :]
            else:
                right = b + tl.cast(first, tl.int64) * stride_b + b0 + (r * stride_b)[:, None] + ib[None, :]
            # both sides masked: the next expert's rows, or nobody's, may hold NaN
            left = tl.load(left, mask=inside_a[:, None] & live[None, :], other=0.0)
            right = tl.load(right, mask=live[:, None] & inside_b[None, :], other=0.0)
            acc = accumulate(left, right, acc, PRECISION)
        at = out + (tl.cast(expert, tl.int64) * n_a + a0) * n_b + b0
        store(acc, at, n_b, n_a - a0, n_b - b0, BLOCK_N)


def by_falling_count(ends: Tensor) -> Tensor:
    """[E] -> [E] int32: the experts, those with most rows first."""
    (experts,), visit = ends.shape, tiles.empty(ends, *ends.shape)
    padded = max(16, triton.next_power_of_2(experts))
    launch(_by_count, (triton.cdiv(experts, 16),), ends, visit, experts, EXPERTS=padded, BLOCK=16, num_warps=4)
    return visit


def dw(
    a: Tensor, b: Tensor, ends: Tensor, order: Tensor | None = None, gather: str | None = None, top_k: int = 1,
    out_dtype: torch.dtype | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """[M, A], [M, B] -> [E, A, B] in `out_dtype`, the inputs' by default; gather "a" or "b" is [N, .], read at order // top_k."""
    tiles.check("dw", a, {"b": b}, {"ends": ends, "order": order})
    (rows_a, n_a), (rows_b, n_b), experts = a.shape, b.shape, ends.shape[0]
    m, tokens = (rows_b, rows_a) if gather == "a" else (rows_a, rows_b)
    fits = gather in (None, "a", "b") and (gather is None) == (order is None)
    fits = fits and (m == tokens if order is None else order.shape == (m,) and m == top_k * tokens)
    tiles.fit(f"dw(gather={gather!r}, top_k={top_k})", fits, a=a, b=b, order=order)
    out = tiles.empty(a, experts, n_a, n_b, dtype=out_dtype)
    if m == 0 or out.numel() == 0:
        return out.zero_()
    a, b = tiles.packed(a), tiles.packed(b)
    c = config or lookup("dw", device_of(a).arch, a.dtype, n_b, n_a, m / experts)
    block_m, block_n = tiles.clip(c.block_m, n_a), tiles.clip(c.block_n, n_b)
    if gather:  # Triton counts a stage for the index as well, for each buffer but the first
        c = c._replace(num_stages=2 * c.num_stages - 1)
    visit = by_falling_count(ends)
    launch(
        _dw, (experts * triton.cdiv(n_a, block_m) * triton.cdiv(n_b, block_n),),
        a, b, ends, ends if order is None else order, visit, out, n_a, n_b, experts, a.stride(0), b.stride(0),
        TOP_K=top_k, GATHER_A=gather == "a", GATHER_B=gather == "b",
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=c.block_k, PRECISION=tiles.tf32(a.dtype),
        **tiles.resources(c),
    )  # fmt: skip
    return out
