"""Routed experts in PyTorch: forward and backward by hand, fast on CPUs, right on any device.

The backward pass is written out because autograd would keep twice the activations and add rows with `index_add`, which
is several times slower than a gather in a fixed order. Measurements behind each choice: docs/benchmarks.md.

    N tokens, D model, E experts, K choices, F expert width, M = N*K rows in expert order
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):  # grouped_mm takes no other layout
        weight = weight.contiguous()
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
    order = expert_order(experts, w13.shape[0], _fills(x))
    if x.shape[0] == 0:
        return x.new_zeros(x.shape), x.new_empty(order.choice.shape[0], w13.shape[1])
    rows, z = _forward(_gather(x, order), w13, w2, order.ends, _row_gates(gates, order, x.dtype))
    return _combine(rows, order), z


def rows_forward(rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M, D] in expert order -> (y [M, D], zero past ends[-1]; z [M, 2F])."""
    y, z = _forward(rows, w13, w2, ends, row_gates.to(rows.dtype).unsqueeze(1))
    return torch.where(_live(rows, ends), y, 0), z


def _live(rows: Tensor, ends: Tensor) -> Tensor:
    """[M, 1] bool: rows that an expert owns."""
    return (torch.arange(rows.shape[0], device=rows.device) < ends[-1]).unsqueeze(1)


def _forward(rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """[R, D] rows, [R, 1] gates -> [R, D], z [R, 2F]; what stands past ends[-1] means nothing."""
    width = w2.shape[2]
    z = rows_by_weight(rows, w13.mT, ends)
    if z.device.type == "cpu":  # elsewhere the tail stays unwritten, since its size would have to be waited for
        z[int(ends[-1]) :].zero_()
    a = F.silu(z[:, :width]).mul_(z[:, width:]).mul_(g)
    return rows_by_weight(a, w2.mT, ends), z


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
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor, weights: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w13, w2, gates, in their dtypes; those of the weights empty unless wanted.

    Rows without a choice carry gate zero, so their gradients are zero without a mask; rows past `ends[-1]` are never
    read by a product, nor by `place`.
    """
    if x.shape[0] == 0:
        dw13, dw2 = (w.new_zeros(w.shape if weights else 0) for w in (w13, w2))
        return x.new_zeros(x.shape), dw13, dw2, gates.new_zeros(gates.shape)
    order = expert_order(experts, w13.shape[0], _fills(x))
    g = _row_gates(gates, order, x.dtype)
    drows, dw13, dw2, dg = _backward(
        _gather(dy.contiguous(), order), lambda: _gather(x, order), w13, w2, order.ends, g, z, gates.dtype, weights
    )
    dgates = gates.new_zeros(experts.numel() + 1)
    dgates[order.choice] = dg
    return _combine(drows, order), dw13, dw2, dgates[:-1].view(gates.shape)


def rows_backward(
    dy: Tensor, rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, z: Tensor, weights: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of rows, w13, w2, row_gates, in their dtypes; those of the weights empty unless wanted."""
    g = row_gates.to(rows.dtype).unsqueeze(1)
    drows, dw13, dw2, dg = _backward(dy.contiguous(), lambda: rows, w13, w2, ends, g, z, row_gates.dtype, weights)
    live = _live(rows, ends)
    return torch.where(live, drows, 0), dw13, dw2, torch.where(live.squeeze(1), dg, 0)


def _backward(
    dy: Tensor, rows: Callable[[], Tensor], w13: Tensor, w2: Tensor, ends: Tensor, g: Tensor, z: Tensor,
    gate_dtype: torch.dtype, weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """[R, D] upstream rows -> gradients of rows, w13, w2 and g [R]. `rows` makes the forward's rows when needed."""
    width = w2.shape[2]
    gate, up = z[:, :width], z[:, width:]
    dh = rows_by_weight(dy, w2, ends)  # gradient of gate weight times activation
    sig = torch.sigmoid(gate)
    silu = gate * sig
    a = silu * up
    dg = (dh * a).sum(1, dtype=gate_dtype)
    dw2 = rows_by_rows(dy, a.mul_(g), ends) if weights else w2.new_empty(0)
    del dy
    dh.mul_(g)
    dz = torch.empty_like(z)
    torch.mul(dh, silu, out=dz[:, width:])
    sig.add_(silu.mul_(1 - sig))  # d silu / d gate = sigmoid + silu (1 - sigmoid)
    torch.mul(dh.mul_(up), sig, out=dz[:, :width])
    dw13 = rows_by_rows(dz, rows(), ends) if weights else w13.new_empty(0)
    return rows_by_weight(dz, w13, ends), dw13, dw2, dg
