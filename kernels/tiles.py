"""What the grouped kernels share: which rows a tile has, one product over them, rounding; and the checks of wrappers.

Rows stand in expert order, those of expert e at [ends[e-1], ends[e]), so each expert owns ceil(count / BLOCK_M) tiles of
rows and an empty one owns none. Every program reads the E ends, scans the tile counts in registers and finds a tile's
expert by counting: no table of tiles, no padded copy, nothing for the host to wait for, and the same tiles whatever the
grid. Tiles of columns are innermost, so that neighbours find their rows in L2.

Rows and experts are addressed by 64-bit scalars, what lies within a tile by 32 bits (64-bit offsets cost registers).
Rows a tile does not own repeat its first one and are never stored, so loads of rows need no mask and a NaN in somebody
else's row stays there.

In Triton's interpreter bf16 is a bit pattern: it is widened before any arithmetic and rounded by hand, both no-ops
elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.configs import Config, lookup
from moe.kernels.launch import INTERPRET, device_of

INTERPRETED = tl.constexpr(INTERPRET)

# ------------------------------------------------------------------------------------------------------ inside kernels


@triton.jit
def tile_scan(ends, n_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """[EXPERTS] int32: tiles of rows of all experts up to and with each; EXPERTS is a power of two."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < n_experts, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < n_experts), other=0)
    return tl.cumsum(tl.cdiv(end - start, BLOCK_M), 0)


@triton.jit
def tile_rows(scan, ends, tile, BLOCK_M: tl.constexpr):
    """-> expert, first row and number of rows of a tile."""
    before = scan <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    first_tile = tl.max(tl.where(before, scan, 0), 0)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0) + (tile - first_tile) * BLOCK_M
    return expert, first, tl.minimum(tl.load(ends + expert) - first, BLOCK_M)


@triton.jit
def accumulate(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in fp32."""
    if INTERPRETED:
        a, b = wide(a), wide(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(
    rows, row_at, weights, column_at, step, k, live,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] fp32: rows at row_at times columns at column_at, of which `live` exist; depth k.

    step: distance of a weight to the next in depth. EVEN: widths are multiples of the blocks, so nothing is masked.
    SWAP: few rows are the product's right-hand side, since tensor cores want 64 rows on the left.
    """
    d = tl.arange(0, BLOCK_K)
    if SWAP:
        left, left_at = weights, column_at[:, None] + (d * step)[None, :]
        right, right_at = rows, row_at[None, :] + d[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        left, left_at = rows, row_at[:, None] + d[None, :]
        right, right_at = weights, column_at[None, :] + (d * step)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in tl.range(0, k, BLOCK_K):
        if EVEN:
            a, b = tl.load(left + left_at), tl.load(right + right_at)
        else:
            deep = d < k - done
            if SWAP:
                a = tl.load(left + left_at, mask=live[:, None] & deep[None, :], other=0.0)
                b = tl.load(right + right_at, mask=deep[:, None], other=0.0)
            else:
                a = tl.load(left + left_at, mask=deep[None, :], other=0.0)
                b = tl.load(right + right_at, mask=deep[:, None] & live[None, :], other=0.0)
        acc = accumulate(a, b, acc, PRECISION)
        left += BLOCK_K * (step if SWAP else 1)
        right += BLOCK_K * (1 if SWAP else step)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def halves(x):
    """[M, N] -> its left and its right columns, which in a product's result lie in registers of the same threads."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def wide(x):
    """To fp32, first thing after a load."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def store(x, out, stride, rows, columns, WIDTH: tl.constexpr):
    """A tile's results to `out`, of which that many rows and columns exist; 128 bytes of each row at a time."""
    if WIDTH * out.dtype.element_ty.primitive_bitwidth > 1024:
        HALF: tl.constexpr = WIDTH // 2
        x_a, x_b = halves(x)
        store(x_a, out, stride, rows, columns, HALF)
        store(x_b, out + HALF, stride, rows, columns - HALF, HALF)
    else:
        m, c = tl.arange(0, x.shape[0]), tl.arange(0, WIDTH)
        inside = (m < rows)[:, None] & (c < columns)[None, :]
        tl.store(out + (m * stride)[:, None] + c[None, :], rounded(x, out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------------ wrappers

FAR = 1 << 22
"""Rows further apart than this could be 2^31 elements apart within a tile."""


def packed(t: Tensor) -> Tensor:
    """`t` itself if its last dimension is dense and every row starts at a multiple of 16 bytes, else a copy.

    A stride or an address that is no such multiple turns 16-byte loads into 2-byte ones. Widths that are no multiple of
    16 bytes are left: no copy helps them.
    """
    strides, size = t.stride(), t.element_size()
    dense = strides[-1] == 1 and strides[-2] < FAR if t.dim() > 1 else t.is_contiguous()
    if not dense or (t.shape[-1] * size % 16 == 0 and any(s * size % 16 for s in strides[:-1])):
        return t.contiguous()
    if t.shape[-1] * size % 16 == 0 and not t.is_meta and t.data_ptr() % 16:
        return t.clone(memory_format=torch.contiguous_format)
    return t


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


def tf32(dtype: torch.dtype) -> str:
    """Whether fp32 products may take the tensor cores: PyTorch's own switch."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def tiles_of(kernel: str, like: Tensor, m: int, experts: int, n: int, k: int, config: Config | None) -> Config:
    """The table's tile sizes, or the given ones, no larger than the problem."""
    if config is None:
        config = lookup(kernel, device_of(like).arch, like.dtype, n, k, m / experts)
    return config._replace(block_n=clip(config.block_n, n), block_k=clip(config.block_k, k))


def clip(block: int, width: int) -> int:
    return min(block, max(16, triton.next_power_of_2(width)))


def programs(tensor: Tensor, tiles: int, config: Config) -> int:
    """As many as run at once, or one for each tile if those are fewer."""
    return min(tiles, device_of(tensor).sms * config.ctas)


def row_tiles(rows: int, experts: int, block_m: int) -> int:
    """The most tiles of rows there can be, however the rows fall."""
    return min(rows, triton.cdiv(rows, block_m) + min(experts, rows))


def shape_of(config: Config, experts: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel built on `product` takes by name."""
    return {
        "EXPERTS": max(16, triton.next_power_of_2(experts)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN": n % config.block_n == 0 and k % config.block_k == 0,
        "SWAP": config.block_m < 64,
        "PRECISION": tf32(dtype),
        **resources(config),
    }


def resources(config: Config) -> dict[str, int | None]:
    """Triton's options. ptxas takes all the registers it may: the limit holds it to the row's programs at once."""
    limit = 65536 // (32 * config.num_warps * config.ctas) // 8 * 8
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": limit if limit < 255 else None,
    }


def check(kernel: str, like: Tensor, same: dict[str, Tensor], indices: dict[str, Tensor | None]) -> None:
    """Dtypes and devices: `same` have those of `like`, indices are int32 there too."""
    if like.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{kernel}: {like.dtype} is not bfloat16, float16 or float32; moe.ops has a path for it")
    for name, t in same.items():
        if t.dtype != like.dtype or t.device != like.device:
            raise ValueError(f"{kernel}: {name} is {t.dtype} on {t.device}, the rows are {like.dtype} on {like.device}")
    for name, t in indices.items():
        if t is not None and (t.dtype != torch.int32 or t.device != like.device or not t.is_contiguous()):
            raise ValueError(f"{kernel}: {name} must be contiguous int32 on {like.device}, not {t.dtype} on {t.device}")


def check_gates(kernel: str, like: Tensor, gates: Tensor) -> None:
    if not gates.is_floating_point() or gates.device != like.device:
        raise ValueError(
            f"{kernel}: gates are {gates.dtype} on {gates.device}; they must be floating, on {like.device}"
        )


def fit(kernel: str, fits: bool, **tensors: Tensor | None) -> None:
    if not fits:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items() if t is not None)
        raise ValueError(f"{kernel}: shapes do not fit: {shapes}")
