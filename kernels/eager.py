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


FILL = 16  # rows an expert is filled up to, at least, where products are built for each size: see `_filled`


class Order(NamedTuple):
    """Expert order: rows of one expert are neighbours, in token order (stable). R > M rows; the size never depends on
    the ids, so nothing waits for the device. Rows without a choice (filling, and the tail past `ends[-1]`) hold N*K."""

    choice: Tensor
    """[R] int64: flat choice n*K + k that stands at each row, N*K for none."""
    place: Tensor
    """[N, K] int64: row of each choice; R - 1, which no expert owns, for one without an expert."""
    ends: Tensor
    """[E] int32: one past the last row of each expert, filling included."""


def _filled(counts: Tensor) -> Tensor:
    """Row counts rounded up to one of a few sizes: multiples of 16, of an eighth of the size from 256 on.

    oneDNN builds a new program for each new matrix size, and ragged experts meet a new one at almost every call:
    filling makes their bf16 products up to five times faster (measured, docs/benchmarks.md).
    """
    octave = torch.frexp(counts.double()).exponent.long() - 1
    step = torch.bitwise_left_shift(torch.ones_like(counts), (octave - 3).clamp_min(FILL.bit_length() - 1))
    return (counts + step - 1) // step * step


def expert_order(experts: Tensor, n_experts: int, fill: bool = False) -> Order:
    """[N, K] ids -> their expert order; ids outside [0, E) get no row. fill: see `_filled`."""
    flat = experts.reshape(-1)
    m = flat.shape[0]
    flat = torch.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    small = torch.int16 if n_experts < 2**15 else torch.int32  # sorts 3-4 times faster than int64 (measured)
    ids, perm = torch.sort(flat.to(small), stable=True)
    ids = ids.long()
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    filled = _filled(counts) if fill else counts
    ends = filled[:n_experts].cumsum(0)
    rows = _row_count(m, n_experts, fill)
    shift = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)
    row = torch.arange(m, device=flat.device) + shift[ids]
    row = torch.where(ids < n_experts, row, rows - 1)
    choice = torch.full((rows,), m, dtype=torch.int64, device=flat.device)
    choice[row] = perm
    choice[rows - 1] = m
    place = torch.empty_like(perm)
    place[perm] = row
    return Order(choice, place.view(experts.shape), ends.to(torch.int32))


def _row_count(choices: int, n_experts: int, fill: bool) -> int:
    return choices + 1 + (choices // 8 + (FILL - 1) * min(choices, n_experts) if fill else 0)


def _fills(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def order_rows(x: Tensor, choices: int, n_experts: int) -> int:
    """R for `choices` = N*K ids over tokens like `x`, for whoever allocates."""
    return _row_count(choices, n_experts, _fills(x))


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


def _gather(x: Tensor, order: Order) -> Tensor:
    """[N, D] -> [R, D]: each row's token; rows without a choice repeat row 0's, and their gate is zero.

    Not just any token: one without an expert may hold NaN, and zero times NaN would reach the weight gradients.
    """
    n, k = order.place.shape
    choice = torch.where(order.choice < n * k, order.choice, order.choice[:1])
    return x.index_select(0, (choice // k).clamp_max(n - 1))


def _combine(rows: Tensor, order: Order) -> Tensor:
    """[R, D] rows in expert order -> [N, D]: the sum of each token's rows, in a fixed order."""
    # 4-9 times faster than index_add (measured); padding_idx: choices without an expert add nothing
    return F.embedding_bag(order.place, rows, mode="sum", padding_idx=rows.shape[0] - 1)


def _row_gates(gates: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
    """[N, K] -> [R, 1], zero for rows without a choice."""
    return torch.cat([gates.reshape(-1), gates.new_zeros(1)]).index_select(0, order.choice).to(dtype).unsqueeze(1)


def experts_forward(x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """-> (y [N, D], z [R, 2F] gate and up activations in expert order, kept for the backward pass)."""
    width = w2.shape[2]
    order = expert_order(experts, w13.shape[0], _fills(x))
    if x.shape[0] == 0:
        return x.new_zeros(x.shape), x.new_empty(order.choice.shape[0], 2 * width)
    z = rows_by_weight(_gather(x, order), w13.mT, order.ends)
    if z.device.type == "cpu":  # elsewhere the tail stays unwritten, since its size would have to be waited for
        z[int(order.ends[-1]) :].zero_()
    a = F.silu(z[:, :width]).mul_(z[:, width:]).mul_(_row_gates(gates, order, x.dtype))
    return _combine(rows_by_weight(a, w2.mT, order.ends), order), z


GATHER = 24 << 20  # bytes of gathered weights up to which copying them beats a product for each expert (measured)


def experts_are_few(w13: Tensor, w2: Tensor, choices: int) -> bool:
    return choices * (w13.numel() + w2.numel()) // w13.shape[0] * w13.element_size() <= GATHER


def experts_of_few(x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    """-> y [N, D], without what a backward pass needs: one product over the gathered weights of all choices.

    For decoding, where a loop over E experts finds most of them empty.
    """
    n, k = experts.shape
    width = w2.shape[2]
    ids = experts.reshape(-1)
    inside = ids.clamp(0, w13.shape[0] - 1)
    weight = w13.index_select(0, inside).view(n, k * 2 * width, x.shape[1])
    # rows on the left: products with a column on the right are several times slower
    gate, up = torch.bmm(x.unsqueeze(1), weight.mT).view(n * k, 1, 2 * width).chunk(2, -1)
    a = F.silu(gate).mul_(up).mul_(gates.reshape(-1, 1, 1).to(x.dtype))
    y = torch.bmm(a, w2.index_select(0, inside).mT)
    return y.masked_fill_((ids != inside).view(-1, 1, 1), 0).view(n, k, x.shape[1]).sum(1)


def experts_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w13, w2, gates, in their dtypes.

    Rows without a choice carry gate zero, so their gradients are zero without a mask; rows past `ends[-1]` are never
    read by a product, nor by `place`.
    """
    width = w2.shape[2]
    if x.shape[0] == 0:
        return x.new_zeros(x.shape), w13.new_zeros(w13.shape), w2.new_zeros(w2.shape), gates.new_zeros(gates.shape)
    order = expert_order(experts, w13.shape[0], _fills(x))
    gate, up = z[:, :width], z[:, width:]
    g = _row_gates(gates, order, x.dtype)
    dy_rows = _gather(dy.contiguous(), order)
    dh = rows_by_weight(dy_rows, w2, order.ends)  # gradient of gate weight times activation
    sig = torch.sigmoid(gate)
    silu = gate * sig
    a = silu * up
    dgates = gates.new_zeros(experts.numel() + 1)
    dgates[order.choice] = (dh * a).sum(1, dtype=gates.dtype)
    dw2 = rows_by_rows(dy_rows, a.mul_(g), order.ends)
    del dy_rows
    dh.mul_(g)
    dz = torch.empty_like(z)
    torch.mul(dh, silu, out=dz[:, width:])
    sig.add_(silu.mul_(1 - sig))  # d silu / d gate = sigmoid + silu (1 - sigmoid)
    torch.mul(dh.mul_(up), sig, out=dz[:, :width])
    dw13 = rows_by_rows(dz, _gather(x, order), order.ends)
    dx = _combine(rows_by_weight(dz, w13, order.ends), order)
    return dx, dw13, dw2, dgates[:-1].view(gates.shape)


# ---------------------------------------------------------------------------------------------------------------- norm


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (x / rms(x) * weight, 1 / rms(x) [..., 1] in fp32 or wider). Keeps no normalised copy for the backward pass."""
    wide = torch.promote_types(x.dtype, torch.float32)
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight).to(x.dtype).contiguous(), r.contiguous()


def rms_norm_of_few(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """-> y alone, for decoding, where time goes into calls: half as many as in the library's.

    A plain number in a sum costs more than a tensor with it (measured), hence `new_full`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, 2, -1, True, dtype=wide)
    mean = torch.addcmul(size.new_full((), eps), size, size, value=1 / x.shape[-1])
    y = (x * mean.rsqrt_()).mul_(weight)
    return y if x.dtype is wide else y.to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight: dx = r (dy w - xhat mean(dy w xhat))."""
    width = x.shape[-1]
    xhat = (x * r).reshape(-1, width)
    g = dy.reshape(-1, width) * xhat
    dw = g.sum(0)
    mean = torch.mv(g, weight.to(g.dtype)).div_(width).unsqueeze(1)
    dx = (dy.reshape(-1, width) * weight.to(g.dtype)).sub_(xhat.mul_(mean)).mul_(r.reshape(-1, 1))
    return dx.view(x.shape).to(x.dtype), dw.to(weight.dtype)


# --------------------------------------------------------------------------------------------------- products of few rows


def for_few_rows(weight: Tensor) -> Tensor:
    """[out, in] -> the same matrix, laid out in memory as a product with one row reads it fastest.

    In fp32 on a CPU that is by columns: a row's dot products fetch a cold matrix at a third of the speed (measured).
    """
    if weight.dtype == torch.float32 and weight.device.type == "cpu":
        return weight.t().contiguous().t()
    return weight


# ----------------------------------------------------------------------------------------------------------- attention

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


# ------------------------------------------------------------------------------------------------------ head with loss


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (sum of the losses, d loss / d hidden, d loss / d weight); gradients are empty when not asked for.

    Gradients are made while a chunk's logits are at hand, so [N, V] never exists. The losses and the sum of d weight
    are fp32 or wider; the logits and their gradient have the inputs' dtype.
    """
    n, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    dh = hidden.new_empty(hidden.shape) if with_grad else hidden.new_empty(0)
    dw = torch.zeros(vocab, weight.shape[1], dtype=wide, device=weight.device) if with_grad else weight.new_empty(0)
    for start in range(0, n, chunk):
        h, t = hidden[start : start + chunk], targets[start : start + chunk]
        logits = torch.mm(h, weight.t())
        valid = (t >= 0).unsqueeze(1)
        index = t.clamp_min(0).unsqueeze(1)
        logp = torch.log_softmax(logits, 1, dtype=wide)
        total -= torch.where(valid, logp.gather(1, index), 0).sum()
        if with_grad:
            p = torch.softmax(logits, 1)
            p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
            torch.mul(torch.mm(p, weight), valid, out=dh[start : start + chunk])
            dw += torch.mm(p.t(), h * valid)
    return total, dh, dw.to(weight.dtype)
