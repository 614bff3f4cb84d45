"""FP8 as numerics: tensors rounded to what block-scaled E4M3 can hold, and the three products over such tensors.

    quantise_rows      1 x 128 tiles along the width     activations, and gradients of outputs
    quantise_blocks    128 x 128                         weights
    quantise_columns   128 x 1 tiles along the tokens    both operands of a weight gradient

    y = rows(x) blocks(w)^T        dx = rows(dy) blocks(w)        dw = columns(dy)^T columns(x)

A quantiser returns its input, in the input's dtype, as storage in E4M3 would give it back: one fp32 scale a tile,
amax / 448 found online, nearest E4M3 number, ties to even. The last tile of a row or column may be short. Every operand
is quantised once, from the working dtype, and gradients go straight through the quantisers.

The products run in the working dtype: E4M3 has 4 significant bits, so its products are exact there, and sums are kept in
fp32, as V3 keeps them by promotion. What bf16 adds is the rounding of value x scale to 8 bits (at most 2^-9 of it;
nothing with power-of-two scales, and nothing in fp32), next to E4M3's own 2^-4.

Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3. Not here: FP8 matrix products (nothing gets faster or smaller), the
14-bit accumulators of the H800, E5M6 for attention outputs, and caching SwiGLU's inputs in FP8.

    N tokens, D model, E experts, K choices, F expert width, R rows in expert order
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels import eager

TILE = 128
LARGEST = 448.0  # of E4M3
SMALLEST_NORMAL = 2.0**-6  # of E4M3; below it numbers are multiples of 2^-9
FLOOR = 1e-30  # of amax. DeepSeek's inference code has 1e-4, which would swallow gradients of a large batch's mean


class Scales(NamedTuple):
    """Which scales are rounded up to a power of two, as V3 does for what is kept or sent in FP8."""

    inputs: bool = False
    """Those of a Linear's input; of experts: of what travels to them, tokens and upstream gradients."""
    others: bool = False


# ---------------------------------------------------------------------------------------------------------- quantisers


def quantise_rows(x: Tensor, power_of_two: bool = False, block: int = TILE) -> Tensor:
    """[..., R, C] -> the same; each row's `block` neighbouring channels share a scale."""
    return _tiled(x, 1, block, power_of_two)


def quantise_columns(x: Tensor, power_of_two: bool = False, block: int = TILE) -> Tensor:
    """[..., R, C] -> the same; each channel's `block` neighbouring rows share a scale."""
    return _tiled(x, block, 1, power_of_two)


def quantise_blocks(w: Tensor, power_of_two: bool = False, block: int = TILE) -> Tensor:
    """[..., R, C] -> the same; squares of `block` x `block` share a scale."""
    return _tiled(w, block, block, power_of_two)


def _tiled(x: Tensor, height: int, width: int, power_of_two: bool) -> Tensor:
    if not x.numel():
        return x.clone()
    rows, columns = x.shape[-2:]
    height, width = min(height, rows), min(width, columns)
    whole = F.pad(x.float(), (0, -columns % width, 0, -rows % height))
    tiles = whole.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # [..., down, height, across, width]
    scale = _scale(tiles.abs().amax((-3, -1), keepdim=True), power_of_two)
    return _rounded(tiles, scale, x.dtype).reshape(whole.shape)[..., :rows, :columns].contiguous()


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """fp32 amax of each tile -> the fp32 number that E4M3 values are multiplied by."""
    scale = amax.clamp_min(FLOOR) / LARGEST
    if power_of_two:  # upwards, by the exponent's bits: a logarithm may miss an exact power
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale


def _rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 numbers and their scales -> what is left of them, in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return (_e4m3(x / scale).to(wide) * scale).to(dtype)


def _e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 numbers, in place, for fp32 of at most 448: NaN stays, nothing overflows.

    Adding 1.5 * 2^20 times a number's power of two leaves it 3 bits after the point, rounded by the adder itself. On a
    CPU that is 3 times faster than torch's conversions to float8 and back (measured), and no device lacks it.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    shift = power.clamp_min_(SMALLEST_NORMAL).mul_(1.5 * 2.0**20)
    return x.add_(shift).sub_(shift)


# -------------------------------------------------------------------------------------------------------------- linear


def linear_forward(x: Tensor, w: Tensor, scales: Scales) -> Tensor:
    """[N, D], [O, D] -> [N, O]."""
    return F.linear(quantise_rows(x, scales.inputs), quantise_blocks(w, scales.others))


def linear_backward(dy: Tensor, x: Tensor, w: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """-> gradients of x and w."""
    dx = quantise_rows(dy, scales.others) @ quantise_blocks(w, scales.others)
    return dx, quantise_columns(dy, scales.others).t() @ quantise_columns(x, scales.inputs)


# ------------------------------------------------------------------------------------------------------------- experts


def experts_forward(
    x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, scales: Scales
) -> tuple[Tensor, Tensor]:
    """`eager.experts_forward` with tokens quantised before they travel, activations before their gate.

    -> (y [N, D], z [R, 2F] gate and up activations in expert order, kept for the backward pass).
    """
    order = eager.expert_order(experts, w13.shape[0], eager._fills(x))
    if x.shape[0] == 0:
        return x.new_zeros(x.shape), x.new_empty(order.choice.shape[0], w13.shape[1])
    rows = eager._gather(quantise_rows(x, scales.inputs), order)
    z = eager.rows_by_weight(rows, quantise_blocks(w13, scales.others).mT, order.ends)
    if z.device.type == "cpu":  # elsewhere the tail stays unwritten, since its size would have to be waited for
        z[int(order.ends[-1]) :].zero_()
    gate, up = z.chunk(2, 1)
    h = quantise_rows(F.silu(gate).mul_(up), scales.others).mul_(eager._row_gates(gates, order, x.dtype))
    y = eager.rows_by_weight(h, quantise_blocks(w2, scales.others).mT, order.ends)
    return eager._combine(y, order), z


def experts_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor, scales: Scales
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w13, w2, gates. That of a gate is rows(dy) blocks(w2) . rows(h): no product is made for it."""
    if x.shape[0] == 0:
        return x.new_zeros(x.shape), w13.new_zeros(w13.shape), w2.new_zeros(w2.shape), gates.new_zeros(gates.shape)
    order = eager.expert_order(experts, w13.shape[0], eager._fills(x))
    tiles, ends = _expert_tiles(order), order.ends
    g = eager._row_gates(gates, order, x.dtype)
    sent = eager._gather(quantise_rows(dy, scales.inputs), order)
    dh = eager.rows_by_weight(sent, quantise_blocks(w2, scales.others), ends)
    del sent
    gate, up = z.chunk(2, 1)
    sig = torch.sigmoid(gate)
    silu = gate * sig
    h = silu * up
    dgates = gates.new_zeros(experts.numel() + 1)
    dgates[order.choice] = (dh * quantise_rows(h, scales.others)).sum(1, dtype=gates.dtype)
    dout = _expert_columns(eager._gather(dy.contiguous(), order).mul_(g), tiles, scales.inputs)
    dw2 = eager.rows_by_rows(dout, _expert_columns(h, tiles, scales.others), ends)
    del dout, h
    dh.mul_(g)
    dz = torch.cat((dh * up * (sig + silu * (1 - sig)), dh * silu), 1)
    del dh, sig, silu
    dz_columns = _expert_columns(dz, tiles, scales.others)
    dw13 = eager.rows_by_rows(dz_columns, _expert_columns(eager._gather(x, order), tiles, scales.inputs), ends)
    del dz_columns
    drows = eager.rows_by_weight(quantise_rows(dz, scales.others), quantise_blocks(w13, scales.others), ends)
    return eager._combine(drows, order), dw13, dw2, dgates[:-1].view(gates.shape)


class Tiles(NamedTuple):
    """Tiles of 128 rows along each expert's own rows; their number depends on sizes alone, so nothing waits for it."""

    of_row: Tensor
    """[R] int64. Rows without a choice share two tiles at the end that no expert reads: filling, which is finite, and
    the tail past `ends[-1]`, which may hold anything."""
    number: int


def _expert_tiles(order: eager.Order) -> Tiles:
    ends = order.ends.long()
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    tiles = (sizes + TILE - 1) // TILE
    row = torch.arange(order.choice.shape[0], device=ends.device)
    expert = torch.searchsorted(ends, row, right=True).clamp_max(len(ends) - 1)
    of_row = (tiles.cumsum(0) - tiles)[expert] + (row - (ends - sizes)[expert]) // TILE
    most = len(row) // TILE + len(ends)
    of_row = torch.where(order.choice < order.place.numel(), of_row, most)
    return Tiles(torch.where(row < ends[-1], of_row, most + 1), most + 2)


def _expert_columns(rows: Tensor, tiles: Tiles, power_of_two: bool) -> Tensor:
    """[R, C] -> `quantise_columns` of each expert's rows by themselves."""
    wide = rows.float()
    index = tiles.of_row.unsqueeze(1).expand_as(wide)
    amax = wide.new_zeros(tiles.number, wide.shape[1]).scatter_reduce_(0, index, wide.abs(), "amax")
    return _rounded(wide, _scale(amax, power_of_two).index_select(0, tiles.of_row), rows.dtype)
