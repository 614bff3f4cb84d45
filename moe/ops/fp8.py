"""Products over block-scaled E4M3 operands, simulated in the working dtype: what train.precision=fp8 computes.

One path on every device (kernels/fp8.py): neither `select` nor MOE_OPS reaches it, since another path would be other
numbers. Scales are those of kernels/fp8.Scales, spread over two arguments, which custom ops want plain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels import eager, fp8
from moe.ops.grouped import check_weights

Scales = fp8.Scales
FLOAT = Scales()


def fp8_linear(x: Tensor, weight: Tensor, scales: Scales = FLOAT) -> Tensor:
    """x [..., D], weight [O, D] -> [..., O] with all three products, forward and both gradients, over E4M3 operands.

    Raises ValueError on shapes that do not fit.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"fp8_linear: x {tuple(x.shape)} ends in another width than weight {tuple(weight.shape)}")
    return _linear(x.reshape(-1, x.shape[-1]), weight, *scales).view(*x.shape[:-1], weight.shape[0])


def fp8_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    experts: Tensor,
    gates: Tensor,
    scales: Scales = FLOAT,
    recompute_z: bool = False,
) -> Tensor:
    """`ops.experts` with all its products over E4M3 operands; shapes, ids outside [0, E) and zero gradients as there."""
    check_weights("fp8_experts", x, w13, w2)
    if experts.shape != gates.shape or experts.shape[0] != x.shape[0] or experts.ndim != 2:
        raise ValueError(
            f"fp8_experts: ids {tuple(experts.shape)} and gates {tuple(gates.shape)} must both be [N, K] with "
            f"N={x.shape[0]}"
        )
    return _experts(x, w13, w2, experts, gates, *scales, recompute_z)[0]


@torch.library.custom_op("moe::fp8_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, inputs: bool, others: bool) -> Tensor:
    return fp8.linear_forward(x, weight, Scales(inputs, others))


@_linear.register_fake
def _(x, weight, inputs, others):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("moe::fp8_linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, inputs: bool, others: bool) -> tuple[Tensor, Tensor]:
    return fp8.linear_backward(dy, x, weight, Scales(inputs, others))


@_linear_backward.register_fake
def _(dy, x, weight, inputs, others):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _linear_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.scales = inputs[2:]


def _linear_grad(ctx, dy):
    return *_linear_backward(dy, *ctx.saved_tensors, *ctx.scales), None, None


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


@torch.library.custom_op("moe::fp8_experts", mutates_args=())
def _experts(
    x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, inputs: bool, others: bool, recompute_z: bool
) -> tuple[Tensor, Tensor]:
    y, z = fp8.experts_forward(x, w13, w2, experts, gates, Scales(inputs, others))
    return y, z.new_empty(0) if recompute_z else z


@_experts.register_fake
def _(x, w13, w2, experts, gates, inputs, others, recompute_z):
    rows = eager.order_rows(x, experts.numel(), w13.shape[0])
    return x.new_empty(x.shape), x.new_empty(0) if recompute_z else x.new_empty(rows, w13.shape[1])


@torch.library.custom_op("moe::fp8_experts_backward", mutates_args=())
def _experts_backward(
    dy: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    experts: Tensor,
    gates: Tensor,
    z: Tensor,
    inputs: bool,
    others: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = Scales(inputs, others)
    if not z.numel():
        z = fp8.experts_forward(x, w13, w2, experts, gates, scales)[1]
    return fp8.experts_backward(dy, x, w13, w2, experts, gates, z, scales)


@_experts_backward.register_fake
def _(dy, x, w13, w2, experts, gates, z, inputs, others):
    return tuple(t.new_empty(t.shape) for t in (x, w13, w2, gates))


def _experts_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.scales = inputs[5:7]


def _experts_grad(ctx, dy, dz):
    dx, dw13, dw2, dgates = _experts_backward(dy, *ctx.saved_tensors, *ctx.scales)
    return dx, dw13, dw2, None, dgates, None, None, None


_experts.register_autograd(_experts_grad, setup_context=_experts_setup)
