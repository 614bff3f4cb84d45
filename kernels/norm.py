"""Root-mean-square norm in PyTorch, without normalised copies: [..., D] x, [D] weight."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (x / rms(x) * weight, 1 / rms(x) [..., 1] in fp32 or wider). Keeps no normalised copy for the backward pass."""
    wide = torch.promote_types(x.dtype, torch.float32)
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight).to(x.dtype).contiguous(), r.contiguous()


def rms_norm_of_few(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """-> y alone, for decoding, where time goes into calls: half as many as in the library's.

    A plain number in a sum costs more than a tensor with it (measured), hence `new_full`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, 2, -1, True, dtype=wide)
    mean = torch.addcmul(size.new_full((), eps), size, size, value=1 / x.shape[-1])
    y = (x * mean.rsqrt_()).mul_(weight)
    return y if x.dtype is wide else y.to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight: dx = r (dy w - xhat mean(dy w xhat))."""
    width = x.shape[-1]
    xhat = (x * r).reshape(-1, width)
    g = dy.reshape(-1, width) * xhat
    dw = g.sum(0)
    mean = torch.mv(g, weight.to(g.dtype)).div_(width).unsqueeze(1)
    dx = (dy.reshape(-1, width) * weight.to(g.dtype)).sub_(xhat.mul_(mean)).mul_(r.reshape(-1, 1))
    return dx.view(x.shape).to(x.dtype), dw.to(weight.dtype)
