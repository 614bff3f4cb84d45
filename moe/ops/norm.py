"""Root-mean-square norm as one op, and weights laid out for products of few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels import layout, reference
from moe.kernels import norm as cpu
from moe.ops.paths import path_for, wants_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D]: x / sqrt(mean(x^2) + eps) * weight, computed in fp32 or wider."""
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} ends in another width than weight {tuple(weight.shape)}")
    path = path_for(x)
    if path == "reference":
        return reference.rms_norm(x, weight, eps)
    if x.device.type == "cpu":  # the library's own takes five passes and keeps two fp32 copies there
        if not wants_grad(x, weight) and x.numel() <= SMALL:
            return cpu.rms_norm_of_few(x, weight, eps)
        op = _native if path == "native" and x.dtype == weight.dtype else _rms_norm
        return op(x, weight, eps)[0]
    return F.rms_norm(x, weight.shape, weight, eps)


SMALL = 2**15  # numbers of a decoding step: there the call of an op costs more than its passes (measured)


@torch.library.custom_op("moe::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cpu.rms_norm_forward(x, weight, eps)


@torch.library.custom_op("moe::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return cpu.rms_norm_backward(dy, x, weight, r)


@torch.library.custom_op("moe::rms_norm_native", mutates_args=())
def _native(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from moe.kernels.native import norm as native

    return native.rms_norm_forward(x, weight, eps)


@torch.library.custom_op("moe::rms_norm_native_backward", mutates_args=())
def _native_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    from moe.kernels.native import norm as native

    return native.rms_norm_backward(dy, x, weight, r)


def _register(forward, backward) -> None:
    """Both paths keep the same things."""

    @forward.register_fake
    def _(x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)

    @backward.register_fake
    def _(dy, x, weight, r):
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1], output[1])

    def grad(ctx, dy, dr):
        dx, dw = backward(dy, *ctx.saved_tensors)
        return dx, dw, None

    forward.register_autograd(grad, setup_context=setup)


_register(_rms_norm, _rms_norm_backward)
_register(_native, _native_backward)


def for_few_rows(weight: Tensor) -> Tensor:
    """[out, in] -> the same matrix in the layout that F.linear reads fastest at every step of decoding; mostly a copy."""
    return layout.for_few_rows(weight)
