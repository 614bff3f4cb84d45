"""SwiGLU of a dense feed-forward as one op, where the native kernels answer: one pass, and only z is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels import reference
from moe.ops.paths import path_for, wants_grad

SMALL = 2**16  # numbers of a decoding step: there the call of an op costs more than its passes (measured)


def swiglu(z: Tensor) -> Tensor:
    """[..., 2F], gate channels and then up channels -> silu(gate) * up [..., F]."""
    if z.shape[-1] % 2:
        raise ValueError(f"swiglu: z {tuple(z.shape)} has no two halves")
    path = path_for(z)
    if path == "reference":
        return reference.swiglu(z)
    if path == "native" and (wants_grad(z) or z.numel() > SMALL):
        return _swiglu(z)
    gate, up = z.chunk(2, -1)
    return F.silu(gate) * up


@torch.library.custom_op("moe::swiglu_native", mutates_args=())
def _swiglu(z: Tensor) -> Tensor:
    from moe.kernels.native import swiglu as native

    return native.swiglu_forward(z)


@_swiglu.register_fake
def _(z):
    return z.new_empty(*z.shape[:-1], z.shape[-1] // 2)


@torch.library.custom_op("moe::swiglu_native_backward", mutates_args=())
def _swiglu_backward(da: Tensor, z: Tensor) -> Tensor:
    from moe.kernels.native import swiglu as native

    return native.swiglu_backward(da, z)


@_swiglu_backward.register_fake
def _(da, z):
    return z.new_empty(z.shape)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_grad(ctx, da):
    return _swiglu_backward(da, *ctx.saved_tensors)


_swiglu.register_autograd(_swiglu_grad, setup_context=_swiglu_setup)
