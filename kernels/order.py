"""Expert order: a stable counting sort of the choices by expert, without atomics and without waiting for the device.

    experts [N, K] ids  ->  order [M] int32   row of the sorted list -> choice n * K + k; token = order // K
                            inv [N, K] int32  choice -> its row, -1 for one without an expert
                            ends [E] int32    one past the last row of each expert

Rows of one expert keep the order of their choices: the result is torch.sort(stable=True)'s. An id outside [0, E) is no
expert: it is neither counted nor placed, and `order` past ends[-1] is never written.

Three kernels: `_count` makes a histogram of each block of choices (`route` has it already), `_before` turns it into the
choices of the same expert in earlier blocks, `_place` adds the rank within the block and writes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch
from moe.kernels.route import ROWS

SLOTS = 128  # choices of a block when there is no histogram yet
COLUMNS = 64  # experts that one program counts
CHUNK, STRIPE = 256, 8  # blocks at a time, and experts, of one program of `_before`: 32 bytes of a row, one sector


class Order(NamedTuple):
    order: Tensor
    inv: Tensor
    ends: Tensor


@triton.jit
def _ids(experts, slot, live, E: tl.constexpr):
    """Expert of each choice, E for none."""
    e = tl.load(experts + slot, live, 0).to(tl.int64)
    return tl.where(live & (e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit(do_not_specialize=["m"])
def _count(experts, hist, m, E: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    e = _ids(experts, slot, slot < m, E)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    hits = e[:, None] == column[None, :]
    tl.store(hist + block.to(tl.int64) * E + column, tl.sum(hits.to(tl.int32), 0), column < E)


@triton.jit(do_not_specialize=["blocks"])
def _before(hist, before, counts, blocks, E: tl.constexpr, CHUNK: tl.constexpr, STRIPE: tl.constexpr):
    """hist [blocks, E] -> before: the sum of the rows above each row; counts [E]: of all rows."""
    column = tl.program_id(0) * STRIPE + tl.arange(0, STRIPE)
    seen = tl.zeros([STRIPE], tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        at = block.to(tl.int64)[:, None] * E + column[None, :]
        here = (block < blocks)[:, None] & (column < E)[None, :]
        tile = tl.load(hist + at, here, 0)
        tl.store(before + at, seen[None, :] + tl.cumsum(tile, 0) - tile, here)
        seen += tl.sum(tile, 0)
    tl.store(counts + column, seen, column < E)


@triton.jit(do_not_specialize=["m"])
def _place(
    experts, before, counts, order, inv, ends, m,
    E: tl.constexpr, W: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of USED choices, padded to BLOCK: row = start of the expert + choices before the block + in it."""
    block = tl.program_id(0)
    expert = tl.arange(0, W)
    count = tl.load(counts + expert, expert < E, 0)
    end = tl.cumsum(count, 0)
    if block == 0:
        tl.store(ends + expert, end, expert < E)

    i = tl.arange(0, BLOCK)
    slot = block * USED + i
    live = (i < USED) & (slot < m)
    e = _ids(experts, slot, live, E)
    some = e < E
    same = (e[:, None] == e[None, :]) & (i[None, :] < i[:, None])
    row = tl.sum(same.to(tl.int32), 1)
    row += tl.gather(end - count, tl.where(some, e, 0), 0)
    row += tl.load(before + block.to(tl.int64) * E + e, some, 0)
    tl.store(order + row, slot, some)
    tl.store(inv + slot, tl.where(some, row, -1), live)


def sort_by_expert(experts: Tensor, n_experts: int, hist: Tensor | None = None) -> Order:
    """[N, K] ids of any integer dtype -> Order. hist: `route`'s, for exactly these ids; it saves a pass over them."""
    if experts.ndim != 2 or experts.dtype.is_floating_point or experts.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"sort_by_expert: ids {tuple(experts.shape)} {experts.dtype} must be [N, K] integers")
    m, k, device = experts.numel(), experts.shape[1], experts.device
    if ROWS * k > SLOTS:
        hist = None  # its blocks are wider than `_place` has registers for
    if m >= 2**31 - 2**16:
        raise ValueError(f"sort_by_expert: {m} choices do not fit into int32; route fewer tokens at a time")
    used = SLOTS if hist is None else ROWS * k
    block, blocks = triton.next_power_of_2(used), triton.cdiv(m, used)
    if hist is not None and (hist.shape != (blocks, n_experts) or hist.dtype != torch.int32):
        raise ValueError(f"sort_by_expert: hist {tuple(hist.shape)} {hist.dtype} must be [{blocks}, {n_experts}] int32")
    order, inv, ends, counts = (
        torch.empty(shape, dtype=torch.int32, device=device) for shape in (m, experts.shape, n_experts, n_experts)
    )
    if not m:
        return Order(order, inv, ends.zero_())
    experts = experts.contiguous()
    if hist is None:
        hist = torch.empty(blocks, n_experts, dtype=torch.int32, device=device)
        grid = blocks, triton.cdiv(n_experts, COLUMNS)
        launch(_count, grid, experts, hist, m, E=n_experts, BLOCK=SLOTS, COLUMNS=COLUMNS, num_warps=4)
    hist = hist.contiguous()
    before = torch.empty_like(hist)
    launch(
        _before, (triton.cdiv(n_experts, STRIPE),), hist, before, counts, blocks,
        E=n_experts, CHUNK=CHUNK, STRIPE=STRIPE, num_warps=8,
    )  # fmt: skip
    launch(
        _place, (blocks,), experts, before, counts, order, inv, ends, m, E=n_experts,
        W=triton.next_power_of_2(n_experts), USED=used, BLOCK=block, num_warps=max(block // 32, 1),
    )  # fmt: skip
    return Order(order, inv, ends)
