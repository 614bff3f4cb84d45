"""Causal attention on CPUs: blocks of queries, forward and backward by hand. B batch, T time, H heads.

Measurements behind each choice: docs/benchmarks.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # query rows a pass: keys after the block are never touched, and its scores stay in the cache (measured)


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, d] -> contiguous [B*H, T, d]."""
    b, t, h, d = x.shape
    return x.transpose(1, 2).reshape(b * h, t, d)


def _heads_last(x: Tensor, batch: int, heads: int) -> Tensor:
    """[B*H, T, d] -> contiguous [B, T, H, d]."""
    return x.view(batch, heads, *x.shape[1:]).transpose(1, 2).contiguous()


def attention_pairs(time: int) -> list[int]:
    """Scores a head holds for each block of queries."""
    ends = [min(start + BLOCK, time) for start in range(0, time, BLOCK)]
    return [(end - start) * end for start, end in zip(range(0, time, BLOCK), ends)]


def _blocks(p: Tensor, heads: int, time: int) -> list[tuple[int, int, Tensor]]:
    """Query blocks (start, end, probabilities [B*H, end - start, end]); the latter are views of one flat buffer.

    A buffer that holds only the largest block is used again by each: for who needs no block twice.
    """
    result, offset = [], 0
    pairs = attention_pairs(time)
    whole = p.numel() == heads * sum(pairs)
    for start, pair in zip(range(0, time, BLOCK), pairs):
        end = min(start + BLOCK, time)
        result.append((start, end, p[offset : offset + heads * pair].view(heads, end - start, end)))
        offset += heads * pair if whole else 0
    return result


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None, with_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """-> (o [B, T, H, dv], p: the causal half of the probabilities, flat, kept for the backward pass, else empty).

    Scores are held in the inputs' dtype (the products accumulate in fp32), the softmax runs in fp32. On the CPUs we
    measured this is 2-3 times faster than the fused scaled_dot_product_attention, which has no fast path there.
    """
    batch, time, heads, _ = q.shape
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    bh = batch * heads
    o = v.new_empty(bh, time, v.shape[2])
    p = q.new_empty(bh * sum(attention_pairs(time)) if with_grad else 0)
    minus_inf = float("-inf")
    for start, end, s in _blocks(p if with_grad else q.new_empty(bh * max(attention_pairs(time), default=0)), bh, time):
        torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2), out=s)
        s.mul_(scale)
        if segment_ids is None:
            s[:, :, start:end].add_(s.new_full((end - start, end - start), minus_inf).triu_(1))
        else:
            future = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu_(start + 1)
            hidden = future | (segment_ids[:, start:end, None] != segment_ids[:, None, :end])
            mask = torch.zeros(hidden.shape, dtype=s.dtype, device=q.device).masked_fill_(hidden, minus_inf)
            s.view(batch, heads, *s.shape[1:]).add_(mask.unsqueeze(1))
        torch.softmax(s, -1, out=s)
        o[:, start:end] = torch.bmm(s, v[:, :end])
    return _heads_last(o, batch, heads), p


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, in their shapes."""
    batch, time, heads, _ = q.shape
    q, k, v, o, do = (_heads_first(x) for x in (q, k, v, o, do))
    wide = torch.promote_types(q.dtype, torch.float32)
    delta = (o.to(wide) * do).sum(-1, keepdim=True).to(q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, end, s in reversed(_blocks(p, batch * heads, time)):
        g = do[:, start:end]
        dv[:, :end] += torch.bmm(s.transpose(1, 2), g)
        ds = torch.bmm(g, v[:, :end].transpose(1, 2))
        ds.sub_(delta[:, start:end]).mul_(s).mul_(scale)
        dq[:, start:end] = torch.bmm(ds, k[:, :end])
        dk[:, :end] += torch.bmm(ds.transpose(1, 2), q[:, start:end])
    return _heads_last(dq, batch, heads), _heads_last(dk, batch, heads), _heads_last(dv, batch, heads)
