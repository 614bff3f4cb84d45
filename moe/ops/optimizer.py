"""The optimizer's step on one tensor in one pass, where the native kernels answer; elsewhere PyTorch's fused AdamW does
it (moe/train/engine.py)."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, step: int, lr: float, beta1: float, beta2: float,
    eps: float, decay: float, scale: float = 1.0,
) -> None:  # fmt: skip
    """In place: p, m, v fp32, and `copy`, p again in bf16. g fp32 or bf16, multiplied by `scale` first; any shape.

    What it means: kernels/reference.py. Raises ValueError on shapes and types that do not fit.
    """
    from moe.kernels.native import adamw as native

    for name, t in {"p": p, "m": m, "v": v}.items():
        if t.dtype != torch.float32 or t.shape != p.shape or not t.is_contiguous():
            raise ValueError(f"adamw: {name} is {t.dtype} {tuple(t.shape)}; expected contiguous float32 {tuple(p.shape)}")
    if g.shape != p.shape or g.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"adamw: the gradient is {g.dtype} {tuple(g.shape)}, the parameter {tuple(p.shape)}")
    if copy is not None and (copy.dtype != torch.bfloat16 or copy.shape != p.shape or not copy.is_contiguous()):
        raise ValueError(f"adamw: copy is {copy.dtype} {tuple(copy.shape)}; expected contiguous bfloat16 {tuple(p.shape)}")
    native.adamw(p, g.contiguous(), m, v, copy, step, lr, beta1, beta2, eps, decay, scale)


def square_sum(x: Tensor) -> float:
    """Sum of the squares of all numbers, in fp32 within blocks and in double over them. Native, as `adamw`."""
    from moe.kernels.native import adamw as native

    return native.square_sum(x.contiguous())
