"""Root-mean-square norm by the native kernels (norm.cpp): [..., D] x, [D] weight of the same dtype."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from moe.kernels.native.library import DTYPES, Struct, call, pointer, threads


class Norm(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("n", "d", "ldx", "lddy")),
        *((name, c_int32) for name in ("dtype", "threads")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("x", "weight", "y", "r", "dy", "dx", "dweight")),
    ]


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (x / rms(x) * weight, 1 / rms(x) [..., 1] fp32)."""
    rows, weight = _rows(x), weight.contiguous()
    y, r = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    a = _arguments(rows, weight)
    a.eps, a.y, a.r = eps, pointer(y), pointer(r)
    call("norm_forward", a)
    return y, r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of x, contiguous, and of weight."""
    rows, upstream, weight, r = _rows(x), _rows(dy), weight.contiguous(), r.contiguous()
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    a = _arguments(rows, weight)
    a.lddy, a.dy, a.r = upstream.stride(0), pointer(upstream), pointer(r)
    a.dx, a.dweight = pointer(dx), pointer(dweight)
    call("norm_backward", a)
    return dx, dweight


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [N, D] with neighbouring channels: the same memory wherever rows are equally far apart."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _arguments(rows: Tensor, weight: Tensor) -> Norm:
    return Norm(
        n=rows.shape[0], d=rows.shape[1], ldx=rows.stride(0), dtype=DTYPES[rows.dtype], threads=threads(),
        x=pointer(rows), weight=pointer(weight),
    )  # fmt: skip
