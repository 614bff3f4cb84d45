"""AdamW in one pass, and sums of squares, by the native kernels (adamw.cpp)."""

from __future__ import annotations

from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from ctypes import pointer as address

from torch import Tensor

from moe.kernels.native.library import DTYPES, Struct, call, pointer, threads


class Adamw(Struct):
    _fields_ = [
        ("n", c_int64),
        *((name, c_int32) for name in ("dtype", "threads")),
        *((name, c_void_p) for name in ("p", "m", "v", "g", "copy")),
        *((name, c_float) for name in ("scale", "beta1", "beta2", "eps", "keep", "rate", "root2")),
    ]


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, step: int, lr: float, beta1: float, beta2: float,
    eps: float, decay: float, scale: float,
) -> None:  # fmt: skip
    """Updates p, m, v (fp32) and the bf16 `copy` in place, all contiguous; g fp32 or bf16, times `scale`."""
    call(
        "adamw",
        Adamw(
            n=p.numel(), dtype=DTYPES[g.dtype], threads=threads(), p=pointer(p), m=pointer(m), v=pointer(v),
            g=pointer(g), copy=pointer(copy), scale=scale, beta1=beta1, beta2=beta2, eps=eps, keep=1 - lr * decay,
            rate=lr / (1 - beta1**step), root2=(1 - beta2**step) ** -0.5,
        ),
    )  # fmt: skip


class SquareSum(Struct):
    _fields_ = [
        ("n", c_int64),
        *((name, c_int32) for name in ("dtype", "threads")),
        ("x", c_void_p),
        ("sum", POINTER(c_double)),
    ]


def square_sum(x: Tensor) -> float:
    """Of all numbers of x, fp32 or bf16, contiguous."""
    total = c_double()
    call(
        "square_sum",
        SquareSum(n=x.numel(), dtype=DTYPES[x.dtype], threads=threads(), x=pointer(x), sum=address(total)),
    )
    return total.value
