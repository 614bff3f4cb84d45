"""Output head and cross-entropy as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels import head, reference
from moe.ops.paths import path_for, wants_grad


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """Sum over tokens of the cross-entropy of `hidden @ weight.T`, in nats.

    hidden [N, D], weight [V, D], targets [N] int64, negative: no target -> scalar, fp32 or wider. `chunk` rows of
    logits exist at a time.
    """
    if hidden.shape[-1] != weight.shape[-1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)} do not fit; expected [N, D], [V, D], [N]"
        )
    path = path_for(hidden)
    if path == "reference":
        return reference.linear_cross_entropy(hidden, weight, targets)
    op = _native if path == "native" else _linear_cross_entropy
    return op(hidden, weight, targets, chunk, wants_grad(hidden, weight))[0]


@torch.library.custom_op("moe::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return head.linear_cross_entropy_forward(hidden, weight, targets, chunk, with_grad)


@torch.library.custom_op("moe::linear_cross_entropy_native", mutates_args=())
def _native(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from moe.kernels.native import cross_entropy as native

    return native.linear_cross_entropy_forward(hidden, weight, targets, chunk, with_grad)


def _fake(hidden, weight, targets, chunk, with_grad):
    total = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    if not with_grad:
        return total, hidden.new_empty(0), weight.new_empty(0)
    return total, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _grad(ctx, g, *_):
    dh, dw = ctx.saved_tensors
    return dh * g, dw * g, None, None, None  # g is a scalar and keeps its fp32 value


for _op in (_linear_cross_entropy, _native):
    _op.register_fake(_fake)
    _op.register_autograd(_grad, setup_context=_setup)
