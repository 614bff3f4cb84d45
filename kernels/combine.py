"""The sum of each token's rows: what turns expert order back into token order.

    rows [M, D] in expert order, inv [N, K] (row of each choice, negative for none), base [N, D] or None -> [N, D]

Each token adds its own rows in the order of its choices, in fp32, and rounds once: no atomics, the same bits every time.
Gates are in the rows already. The same kernel gathers outputs (with the shared expert as `base`) and input gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.launch import device_of, launch
from moe.kernels.tiles import rounded, wide

ELEMENTS = 2048
"""Of a tile: 16 a thread, two 16-byte loads in flight for each choice."""


@triton.jit(do_not_specialize=["n_tokens"])
def _combine(
    rows, inv, base, out, n_tokens, d, stride_rows, stride_base,
    TOP_K: tl.constexpr, BASE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(d, BLOCK_D)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_N) * across, tl.num_programs(0)):
        token = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tile % across * BLOCK_D + tl.arange(0, BLOCK_D)
        here = token < n_tokens
        inside = here[:, None] & (column < d)[None, :]
        if BASE:
            at = base + (token.to(tl.int64) * stride_base)[:, None] + column[None, :]
            acc = wide(tl.load(at, mask=inside, other=0.0))
        else:
            acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for k in tl.static_range(TOP_K):
            row = tl.load(inv + token.to(tl.int64) * TOP_K + k, mask=here, other=-1)
            at = rows + (row.to(tl.int64) * stride_rows)[:, None] + column[None, :]
            acc += wide(tl.load(at, mask=(row >= 0)[:, None] & inside, other=0.0))
        at = out + (token.to(tl.int64) * d)[:, None] + column[None, :]
        tl.store(at, rounded(acc, out.dtype.element_ty), mask=inside)


def combine(rows: Tensor, inv: Tensor, base: Tensor | None = None) -> Tensor:
    """[M, D], [N, K] -> [N, D]: sum over k of rows[inv[n, k]], plus base [N, D]."""
    tiles.check("combine", rows, {} if base is None else {"base": base}, {"inv": inv})
    n, k = inv.shape
    d = rows.shape[1]
    tiles.fit("combine", base is None or base.shape == (n, d), rows=rows, inv=inv, base=base)
    out = tiles.empty(rows, n, d)
    if out.numel() == 0:
        return out
    rows, base = tiles.packed(rows), None if base is None else tiles.packed(base)
    block_d = min(512, triton.next_power_of_2(d))
    block_n = max(1, ELEMENTS // block_d)
    grid = (min(triton.cdiv(n, block_n) * triton.cdiv(d, block_d), 8 * device_of(rows).sms),)
    launch(
        _combine, grid, rows, inv, out if base is None else base, out, n, d,
        rows.stride(0), d if base is None else base.stride(0),
        TOP_K=k, BASE=base is not None, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out
