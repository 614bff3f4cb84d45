"""The PyTorch path of every op: forward and backward by hand, fast on CPUs, right on any device.

Backward passes are written out because autograd would keep twice the activations and add rows with `index_add`, which
is several times slower than a gather in a fixed order. Measurements behind each choice: docs/benchmarks.md.

    N tokens, D model, E experts, K choices, F expert width, M = N*K rows in expert order, V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------- experts


class Order(NamedTuple):
    """Expert order of M = N*K choices: rows of one expert are neighbours, ties keep token order (stable)."""

    perm: Tensor
    """[M] int64: flat choice n*K + k that stands at each row; choices without an expert come last."""
    ends: Tensor
    """[E] int32: one past the last row of each expert."""
    live: int
    """Rows that have an expert."""


def expert_order(experts: Tensor, n_experts: int) -> Order:
    """[N, K] ids -> their expert order. Ids outside [0, E) sort last and are not counted."""
    flat = experts.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    small = torch.int16 if n_experts < 2**15 else torch.int32  # radix-sorts faster than int64 (measured 4x)
    perm = torch.sort(flat.to(small), stable=True).indices
    counts = torch.bincount(flat, minlength=n_experts + 1)[:n_experts]
    ends = counts.cumsum(0).to(torch.int32)
    return Order(perm, ends, int(ends[-1]) if n_experts else 0)


def _groups(ends: Tensor) -> list[tuple[int, int, int]]:
    bounds = [0, *ends.tolist()]
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]


def _fits_grouped_mm(*widths_and_dtype) -> bool:
    """F.grouped_mm takes no float64, and rows of 16-byte multiples only."""
    *widths, dtype = widths_and_dtype
    return dtype in (torch.float32, torch.bfloat16) and all(w * dtype.itemsize % 16 == 0 for w in widths)


def rows_by_weight(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[M, A], [E, A, B] -> [M, B]: rows of expert e times weight[e]. `weight` may be a transposed view."""
    if rows.shape[0] and _fits_grouped_mm(rows.shape[1], weight.shape[2], rows.dtype):
        return F.grouped_mm(rows, weight, offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, start, end in _groups(ends):
        torch.mm(rows[start:end], weight[e], out=out[start:end])
    return out


def rows_by_rows(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """[M, A], [M, B] -> [E, A, B]: left^T right over the rows of each expert; zero for an empty one."""
    if left.shape[0] and _fits_grouped_mm(left.shape[1], right.shape[1], left.dtype):
        return F.grouped_mm(left.t(), right, offs=ends)
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    for e, start, end in _groups(ends):
        torch.mm(left[start:end].t(), right[start:end], out=out[e])
    return out


def _combine(rows: Tensor, perm: Tensor, n: int, k: int) -> Tensor:
    """Rows in expert order (choices without an expert left out) -> [N, D], summing the K rows of each token."""
    place = torch.empty_like(perm)
    place[perm] = torch.arange(perm.shape[0], device=perm.device)
    if rows.shape[0] < perm.shape[0]:  # rows of choices without an expert: one row of zeros serves them all
        place = place.clamp_max(rows.shape[0])
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(place.view(n, k), rows, mode="sum")  # fixed order, 4-9x faster than index_add


def experts_forward(x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """-> (y [N, D], z [M, 2F] gate and up activations in expert order, kept for the backward pass)."""
    n, k = experts.shape
    width = w2.shape[2]
    order = expert_order(experts, w13.shape[0])
    perm = order.perm[: order.live]
    rows = x.index_select(0, perm // k)
    z = rows_by_weight(rows, w13.mT, order.ends)
    a = F.silu(z[:, :width]).mul_(z[:, width:])
    a.mul_(gates.reshape(-1).index_select(0, perm).to(a.dtype).unsqueeze(1))
    y = rows_by_weight(a, w2.mT, order.ends)
    z_all = z if order.live == n * k else torch.cat([z, z.new_zeros(n * k - order.live, z.shape[1])])
    return _combine(y, order.perm, n, k), z_all.contiguous()


def experts_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w13, w2, gates; in their dtypes. The gate is folded into rows once, so nothing is rounded
    twice."""
    n, k = experts.shape
    width = w2.shape[2]
    order = expert_order(experts, w13.shape[0])
    perm = order.perm[: order.live]
    token = perm // k
    gate, up = z[: order.live, :width], z[: order.live, width:]
    dy_rows = dy.contiguous().index_select(0, token)
    dh = rows_by_weight(dy_rows, w2, order.ends)  # gradient of gate weight * activation
    sig = torch.sigmoid(gate)
    silu = gate * sig
    a = silu * up
    g = gates.reshape(-1).index_select(0, perm).to(a.dtype).unsqueeze(1)
    dgates = torch.zeros(n * k, dtype=gates.dtype, device=gates.device)
    dgates[perm] = (dh * a).sum(1, dtype=gates.dtype)
    dw2 = rows_by_rows(dy_rows, a.mul_(g), order.ends)
    del dy_rows
    dh.mul_(g)
    dz = torch.empty_like(z[: order.live])
    torch.mul(dh, silu, out=dz[:, width:])
    sig.add_(silu.mul_(1 - sig))  # d silu / d gate = sigmoid + silu (1 - sigmoid)
    torch.mul(dh.mul_(up), sig, out=dz[:, :width])
    dw13 = rows_by_rows(dz, x.index_select(0, token), order.ends)
    dx = _combine(rows_by_weight(dz, w13, order.ends), order.perm, n, k)
    return dx, dw13, dw2, dgates.view(n, k)


# ----------------------------------------------------------------------------------------------------------- attention

BLOCK = 128  # query rows a pass: keys after the block are never touched, and its scores stay in the cache (measured)


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, d] -> contiguous [B*H, T, d]."""
    b, t, h, d = x.shape
    return x.transpose(1, 2).reshape(b * h, t, d)


def _heads_last(x: Tensor, batch: int) -> Tensor:
    """[B*H, T, d] -> contiguous [B, T, H, d]."""
    bh, t, d = x.shape
    return x.view(batch, bh // batch, t, d).transpose(1, 2).contiguous()


def _blocks(p: Tensor, heads: int, time: int) -> list[tuple[int, int, Tensor]]:
    """Query blocks (start, end, probabilities [B*H, end - start, end]); the latter are views of one flat buffer."""
    result, offset = [], 0
    for start in range(0, time, BLOCK):
        end = min(start + BLOCK, time)
        size = heads * (end - start) * end
        result.append((start, end, p[offset : offset + size].view(heads, end - start, end)))
        offset += size
    return result


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> (o [B, T, H, dv], p: the causal half of the probabilities, flat, kept for the backward pass).

    Scores are held in the inputs' dtype (the products accumulate in fp32), the softmax runs in fp32. On the CPUs we
    measured this is 2-3 times faster than the fused scaled_dot_product_attention, which has no fast path there.
    """
    batch, time, heads, _ = q.shape
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    bh = batch * heads
    o = v.new_empty(bh, time, v.shape[2])
    sizes = [(s, min(s + BLOCK, time)) for s in range(0, time, BLOCK)]
    p = q.new_empty(bh * sum((e - s) * e for s, e in sizes))
    minus_inf = float("-inf")
    for start, end, s in _blocks(p, bh, time):
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
    return _heads_last(o, batch), p


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
    return _heads_last(dq, batch), _heads_last(dk, batch), _heads_last(dv, batch)


# ------------------------------------------------------------------------------------------------------ head with loss


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (sum of the losses, d loss / d hidden, d loss / d weight); gradients are empty when not asked for.

    Gradients are made while a chunk's logits are at hand, so [N, V] never exists. fp32 accumulation of d weight.
    """
    n, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    dh = torch.empty_like(hidden) if with_grad else hidden.new_empty(0)
    dw = torch.zeros(vocab, weight.shape[1], dtype=wide, device=weight.device) if with_grad else weight.new_empty(0)
    for start in range(0, n, chunk):
        h, t = hidden[start : start + chunk], targets[start : start + chunk]
        logits = torch.mm(h, weight.t()).to(wide)
        lse = torch.logsumexp(logits, 1)
        valid = t >= 0
        index = t.clamp_min(0).unsqueeze(1)
        total += torch.where(valid, lse - logits.gather(1, index).squeeze(1), 0).sum()
        if with_grad:
            p = logits.sub_(lse.unsqueeze(1)).exp_()
            p.scatter_add_(1, index, torch.full_like(index, -1, dtype=wide))
            p.mul_(valid.unsqueeze(1))
            p = p.to(hidden.dtype)
            dh[start : start + chunk] = torch.mm(p, weight)
            dw += torch.mm(p.t(), h)
    return total, dh, dw.to(weight.dtype)
