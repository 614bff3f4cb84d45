"""Causal attention over packed documents by FlexAttention: blocks that nobody sees are not computed. Unequal widths.

    starts [B, T] (packed.py)  ->  lists: which blocks of 128 keys each block of 128 queries meets, and the reverse
    a query i of row b sees keys starts[b, i] .. i

The lists come from the documents' borders, a few numbers a block; create_block_mask would evaluate all T x T places
first. They serve every layer. The kernels are PyTorch's Triton templates: they exist under torch.compile alone; called
without it, flex_attention forms the whole scores, which is for tests on CPUs.

Source: FlexAttention, arXiv 2412.05496. Not here: grouped queries, autotuning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe.kernels.packed import fitted, multiple

BLOCK = 128
BLOCK_MASK = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
LEAST_WIDTH = 16  # the templates' products take no narrower heads
NARROW = {(8, 6), (8, 9), (12, 0), (12, 1)}  # 99 KB of shared memory a block; 163 KB or more elsewhere


def lists(starts: Tensor) -> tuple[Tensor, ...]:
    """[B, T] -> (counts [B, 1, n], ids [B, 1, n, n]) four times, int32, n = T / BLOCK; T is a multiple of BLOCK.

    For blocks of queries the blocks of keys seen in part and in whole, then for blocks of keys those of queries. In
    part: the mask is applied. Ids past the count mean nothing.
    """
    i = torch.arange(starts.shape[1] // BLOCK, dtype=torch.int32, device=starts.device).unsqueeze(1)
    j = i.T * BLOCK
    earliest, latest = starts[:, None, ::BLOCK, None], starts[:, None, BLOCK - 1 :: BLOCK, None]
    past = j < i * BLOCK
    whole = past & (j >= latest)  # the last query sees it all, so all queries do
    part = ((j == i * BLOCK) | past & (j + BLOCK > earliest)) & ~whole
    return (*_ordered(part), *_ordered(whole), *_ordered(part.mT.contiguous()), *_ordered(whole.mT.contiguous()))


def _ordered(seen: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, n, m] -> how many of each row, and which ones first."""
    ids = torch.argsort(seen.to(torch.int8), dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32), ids.to(torch.int32)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, blocks: tuple[Tensor, ...], trial: bool = False
) -> Tensor:
    """[B, T, H, dqk] x 2, [B, T, H, dv] -> [B, T, H, dv]. starts [B, T rounded up to BLOCK] and what `lists` made of it.

    trial: compile apart, so that the sizes of a trial do not make later ones count as dynamic.
    """
    time, width = q.shape[1], v.shape[3]
    whole = multiple(time, BLOCK)  # MTP's T - 1 places run the main model's kernel
    q, k, v = (fitted(x, whole, max(x.shape[3], LEAST_WIDTH)).transpose(1, 2) for x in (q, k, v))
    call = _rows
    if q.is_cuda and not torch.compiler.is_compiling():
        call = _compiled(_trial if trial else _rows)
    o = call(q, k, v, scale, starts, blocks, _options(q, v))
    return o.transpose(1, 2)[:, :time, :, :width]


def _rows(q, k, v, scale, starts, blocks, options):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def seen(b, h, i, j):
        return (j <= i) & (j >= starts[b, i])

    time = q.shape[2]
    parts: Any = dict(zip(BLOCK_MASK, blocks, strict=True))
    mask = BlockMask(seq_lengths=(time, time), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=seen, **parts)
    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


def _trial(*args):
    return _rows(*args)  # compilers remember sizes by code object


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)  # an error rather than eager mode, which would form whole scores


def _options(q: Tensor, v: Tensor) -> dict[str, int | bool]:
    """What the templates cannot know: T is whole blocks, even where it is a symbol; and tiles for little shared memory.

    PyTorch's own tiles for wide heads need 112 to 140 KB (pytorch issues 180278, 198224).
    """
    options: dict[str, int | bool] = {"IS_DIVISIBLE": True}
    if q.is_cuda and max(q.shape[3], v.shape[3]) > 128 and _capability(q.device.index) in NARROW:
        options |= {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2, "fwd_num_warps": 4}
        options |= {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
        options |= {"bwd_num_stages": 1, "bwd_num_warps": 4}
    return options


def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# Compilers call it and take the answer for a constant; torch.compiler's decorator for this would load them at import.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
