"""Backward through the down projection and SwiGLU of grouped rows, in one kernel.

    dy [N, D] (or [M, D] in expert order), w2 [E, D, F], z [M, 2F], gates, ends [E]
        -> dz [M, 2F], h [M, F] made again for dw2, dgates like gates

With p = dy_row w2[e], the gradient of h = silu(z_gate) z_up gate:

    dgate = sum over F of p silu(z_gate) z_up        dz_up = p silu(z_gate) gate        dz_gate = p silu'(z_gate) z_up gate

so the expert's result is not needed. A tile adds its columns of dgate; if there are more tiles of columns than one, a
second, small kernel adds theirs in order, each row by one thread. Choices without an expert get gradient zero; rows past ends[-1] are neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels import tiles
from moe.kernels.configs import Config
from moe.kernels.launch import device_of, launch
from moe.kernels.tiles import halves, product, rounded, tile_rows, tile_scan, wide

COLUMNS = tl.constexpr(32)
"""Of a tile finished at a time, so that not all of them wait in registers for what they meet. Half a tile at most: in
a half, columns lie as loads and stores want them, not as the tensor cores do."""


@triton.jit(do_not_specialize=["n_rows"])
def _bwd_act(
    dy, w2, z, gates, ends, order, dz, h, dgates, n_rows, f, k, n_experts, stride_dy, stride_we, stride_wk, stride_z,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, ALONE: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scan = tile_scan(ends, n_experts, EXPERTS, BLOCK_M)
    across = tl.cdiv(f, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.max(scan, 0) * across, tl.num_programs(0)):
        expert, first, count = tile_rows(scan, ends, tile // across, BLOCK_M)
        n0 = tile % across * BLOCK_N
        m, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        own, row = tl.where(m < count, m, 0), tl.cast(first, tl.int64)
        if GATHER:
            slot = tl.load(order + first + own)
            a, a_at = dy, (slot // TOP_K).to(tl.int64) * stride_dy
            gate = wide(tl.load(gates + slot))
        else:
            a, a_at = dy + row * stride_dy, own * stride_dy
            gate = wide(tl.load(gates + first + own))
        b = w2 + tl.cast(expert, tl.int64) * stride_we + n0
        p = product(a, a_at, b, c, stride_wk, k, c < f - n0, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, SWAP, PRECISION)

        z_at, dz_at, h_at = z + row * stride_z + n0, dz + row * (2 * f) + n0, h + row * f + n0
        share = _finish(p, gate, z_at, dz_at, h_at, m, count, f - n0, f, stride_z, BLOCK_N, min(COLUMNS, BLOCK_N // 2))
        if ALONE and GATHER:
            at = dgates + slot
        else:
            at = dgates + tl.cast(tile % across, tl.int64) * n_rows + row + m
        tl.store(at, rounded(share, dgates.dtype.element_ty), mask=m < count)


@triton.jit
def _finish(p, gate, z, dz, h, m, count, left, f, stride_z, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """Columns of a tile to dz and h, a piece at a time; -> their share of dgate. left: columns from here to the last."""
    if WIDTH > PIECE:
        HALF: tl.constexpr = WIDTH // 2
        p_a, p_b = halves(p)
        share = _finish(p_a, gate, z, dz, h, m, count, left, f, stride_z, HALF, PIECE)
        z, dz, h, left = z + HALF, dz + HALF, h + HALF, left - HALF
        return share + _finish(p_b, gate, z, dz, h, m, count, left, f, stride_z, HALF, PIECE)
    else:
        c = tl.arange(0, WIDTH)
        stored = (m < count)[:, None] & (c < left)[None, :]
        at = z + (m * stride_z)[:, None] + c[None, :]
        g, u = wide(tl.load(at, mask=stored, other=0.0)), wide(tl.load(at + f, mask=stored, other=0.0))
        s = tl.sigmoid(g)
        act = g * s
        share = tl.sum(p * act * u, 1)
        p *= gate[:, None]
        at = dz + (m * (2 * f))[:, None] + c[None, :]
        tl.store(at, rounded(p * u * (s + act * (1 - s)), dz.dtype.element_ty), mask=stored)
        tl.store(at + f, rounded(p * act, dz.dtype.element_ty), mask=stored)
        at = h + (m * f)[:, None] + c[None, :]
        tl.store(at, rounded(act * u * gate[:, None], h.dtype.element_ty), mask=stored)
        return share


@triton.jit(do_not_specialize=["n_rows"])
def _add_partials(partial, ends, order, dgates, n_rows, n_experts, parts, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    end = tl.load(ends + n_experts - 1)
    for first in tl.range(tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        row = first + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        for part in tl.range(0, parts):
            acc += tl.load(partial + tl.cast(part, tl.int64) * n_rows + row, mask=row < end, other=0.0)
        slot = row
        if GATHER:
            slot = tl.load(order + row, mask=row < end, other=0)
        tl.store(dgates + slot, rounded(acc, dgates.dtype.element_ty), mask=row < end)


def bwd_act(
    dy: Tensor, w2: Tensor, z: Tensor, gates: Tensor, ends: Tensor, order: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dz [M, 2F], h [M, F], dgates like gates. With order [M]: dy [N, D], gates [N, K]; without: dy [M, D], gates [M]."""
    tiles.check("bwd_act", dy, {"w2": w2, "z": z}, {"ends": ends, "order": order})
    tiles.check_gates("bwd_act", dy, gates)
    (experts, k, f), m = w2.shape, gates.numel()
    fits = dy.shape == (gates.shape[0], k) and gates.dim() == (1 if order is None else 2) and z.shape == (m, 2 * f)
    fits = fits and ends.shape == (experts,) and (order is None or order.shape == (m,))
    tiles.fit("bwd_act", fits, dy=dy, w2=w2, z=z, gates=gates, ends=ends, order=order)
    dz, h = tiles.empty(dy, m, 2 * f), tiles.empty(dy, m, f)
    dgates = torch.zeros_like(gates, memory_format=torch.contiguous_format)
    if h.numel() == 0:
        return dz, h, dgates
    dy, w2, z, gates = tiles.packed(dy), tiles.packed(w2), tiles.packed(z), gates.contiguous()
    c = tiles.tiles_of("bwd_act", dy, m, experts, f, k, config)
    parts = triton.cdiv(f, c.block_n)
    partial = dgates if parts == 1 else tiles.empty(dy, parts, m, dtype=torch.float32)
    order_or_any, gather = (ends, False) if order is None else (order, True)
    grid = tiles.programs(dy, tiles.row_tiles(m, experts, c.block_m) * parts, c)
    launch(
        _bwd_act, (grid,), dy, w2, z, gates, ends, order_or_any, dz, h, partial,
        m, f, k, experts, dy.stride(0), w2.stride(0), w2.stride(1), z.stride(0),
        TOP_K=gates.shape[1] if gather else 1, GATHER=gather, ALONE=parts == 1, **tiles.shape_of(c, experts, f, k, dy.dtype),
    )  # fmt: skip
    if parts > 1:
        grid = min(triton.cdiv(m, 256), 4 * device_of(dy).sms)
        launch(
            _add_partials, (grid,), partial, ends, order_or_any, dgates, m, experts, parts,
            GATHER=gather, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return dz, h, dgates
