"""Routed experts by the native kernels (experts.cpp): the calls of kernels/eager.py, with the same meaning.

    N tokens, D model, E experts, K choices, F expert width, M rows
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from moe.kernels.native.library import DTYPES, Struct, call, pointer, threads


class Experts(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("n", "d", "f", "e", "k")),
        *((name, c_int32) for name in ("dtype", "threads")),
        *((name, c_void_p) for name in ("x", "w13", "w2", "ids", "ends", "gates", "y", "z")),
        *((name, c_void_p) for name in ("dy", "dx", "dw13", "dw2", "dgates")),
    ]


def experts_forward(
    x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, keep_z: bool = True
) -> tuple[Tensor, Tensor]:
    """-> (y [N, D], z [N * K, 2F] in expert order, kept for the backward pass; empty unless keep_z)."""
    return _forward(x, w13, w2, gates, keep_z, ids=experts.contiguous())


def rows_forward(
    rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, keep_z: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows [M, D] in expert order -> (y [M, D], zero past ends[-1]; z [M, 2F])."""
    return _forward(rows, w13, w2, row_gates, keep_z, ends=ends.contiguous())


def experts_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor, weights: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w13, w2, gates, in their dtypes; those of the weights empty unless wanted. z may be empty."""
    return _backward(dy, x, w13, w2, gates, z, weights, ids=experts.contiguous())


def rows_backward(
    dy: Tensor, rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, z: Tensor, weights: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of rows, w13, w2, row_gates, in their dtypes; those of the weights empty unless wanted."""
    return _backward(dy, rows, w13, w2, row_gates, z, weights, ends=ends.contiguous())


def _forward(x: Tensor, w13: Tensor, w2: Tensor, gates: Tensor, keep_z: bool, **order: Tensor) -> tuple[Tensor, Tensor]:
    x, w13, w2, g = x.contiguous(), w13.contiguous(), w2.contiguous(), gates.float().contiguous()
    y, z = x.new_empty(x.shape), x.new_empty(gates.numel() if keep_z else 0, w13.shape[1])
    a = _arguments(x, w13, w2, g, order)
    a.y, a.z = pointer(y), pointer(z) if keep_z else None
    call("experts_forward", a)
    return y, z


def _backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, gates: Tensor, z: Tensor, weights: bool, **order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w13, w2, g = x.contiguous(), w13.contiguous(), w2.contiguous(), gates.float().contiguous()
    dy, dx, dg = dy.contiguous(), x.new_empty(x.shape), torch.empty_like(g)
    dw13, dw2 = (w.new_empty(w.shape if weights else 0) for w in (w13, w2))
    a = _arguments(x, w13, w2, g, order)
    a.dy, a.dx, a.dgates, a.z = pointer(dy), pointer(dx), pointer(dg), pointer(z) if z.numel() else None
    if weights:
        a.dw13, a.dw2 = pointer(dw13), pointer(dw2)
    call("experts_backward", a)
    return dx, dw13, dw2, dg.to(gates.dtype)


def _arguments(x: Tensor, w13: Tensor, w2: Tensor, gates: Tensor, order: dict[str, Tensor]) -> Experts:
    k = gates.shape[1] if gates.ndim == 2 else 1
    return Experts(
        n=x.shape[0], d=x.shape[1], f=w2.shape[2], e=w13.shape[0], k=k, dtype=DTYPES[x.dtype], threads=threads(),
        x=pointer(x), w13=pointer(w13), w2=pointer(w2), gates=pointer(gates),
        **{name: pointer(t) for name, t in order.items()},
    )  # fmt: skip
