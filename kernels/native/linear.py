"""Product of rows with an fp32 result by the native kernels (linear.cpp)."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from moe.kernels.native.library import DTYPES, Struct, call, pointer, threads


class Linear(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("n", "d", "m")),
        *((name, c_int32) for name in ("dtype", "threads")),
        *((name, c_void_p) for name in ("x", "w", "y")),
    ]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[N, D], [M, D] of one dtype -> x weight^T [N, M] fp32: neither products nor sums are rounded to that dtype."""
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    call(
        "linear",
        Linear(
            n=x.shape[0], d=x.shape[1], m=weight.shape[0], dtype=DTYPES[x.dtype], threads=threads(), x=pointer(x),
            w=pointer(weight), y=pointer(y),
        ),
    )  # fmt: skip
    return y
