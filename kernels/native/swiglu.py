"""SwiGLU of a dense feed-forward by the native kernels (swiglu.cpp): z [..., 2F], gate channels, then up channels."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p

from torch import Tensor

from moe.kernels.native.library import DTYPES, Struct, call, pointer, threads


class Swiglu(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("n", "f")),
        *((name, c_int32) for name in ("dtype", "threads")),
        *((name, c_void_p) for name in ("z", "a", "da", "dz")),
    ]


def swiglu_forward(z: Tensor) -> Tensor:
    """-> silu(gate) * up [..., F]."""
    z = z.contiguous()
    a = z.new_empty(*z.shape[:-1], z.shape[-1] // 2)
    _call("swiglu_forward", z, a=pointer(a))
    return a


def swiglu_backward(da: Tensor, z: Tensor) -> Tensor:
    """-> gradient of z."""
    da, z = da.contiguous(), z.contiguous()
    dz = z.new_empty(z.shape)
    _call("swiglu_backward", z, da=pointer(da), dz=pointer(dz))
    return dz


def _call(name: str, z: Tensor, **more: int | None) -> None:
    f = z.shape[-1] // 2
    n = z.numel() // (2 * f) if f else 0
    call(name, Swiglu(n=n, f=f, dtype=DTYPES[z.dtype], threads=threads(), z=pointer(z), **more))
