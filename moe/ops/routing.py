"""Choice of experts, gates and counts as one op, where Triton answers; elsewhere the router does it in PyTorch.

Kept for the backward pass: the logits, which are alive anyway, and the ids. Affinities are made again from the logits.
The counts are sums of the blocks' histograms: exact, and in no order that could differ between runs.

    N tokens, E experts, K choices
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(
    logits: Tensor,
    bias: Tensor,
    k: int,
    n_group: int,
    topk_group: int,
    scoring: str,
    norm: bool,
    scaling: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, E], bias [E] fp32, mask [N] bool -> ids [N, K] int64, gates [N, K] fp32, counts [E] int64.

    What `moe.layers.Router` means by them: kernels/route.py has the formulas. Differentiable in logits, through the
    gates; the choice and the bias have no gradient. Raises ValueError on shapes or types that do not fit.
    """
    gates, ids, counts = _route(logits, bias, mask, k, n_group, topk_group, scoring, norm, scaling)
    return ids, gates, counts


@torch.library.custom_op("moe::route", mutates_args=())
def _route(
    logits: Tensor, bias: Tensor, mask: Tensor | None, k: int, n_group: int, topk_group: int, scoring: str, norm: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from moe.kernels import route as kernel

    ids, gates, hist = kernel.route(logits, bias, k, n_group, topk_group, scoring, norm, scaling, mask)
    return gates, ids, hist.sum(0)  # the differentiable one first: opcheck adds up the outputs in its type


@_route.register_fake
def _(logits, bias, mask, k, n_group, topk_group, scoring, norm, scaling):
    n, e = logits.shape
    int64 = torch.int64
    return logits.new_empty(n, k), logits.new_empty(n, k, dtype=int64), logits.new_empty(e, dtype=int64)


@torch.library.custom_op("moe::route_backward", mutates_args=())
def _route_backward(dgates: Tensor, logits: Tensor, ids: Tensor, scoring: str, norm: bool, scaling: float) -> Tensor:
    from moe.kernels import route as kernel

    return kernel.route_backward(dgates, logits, ids, scoring, norm, scaling)


@_route_backward.register_fake
def _(dgates, logits, ids, scoring, norm, scaling):
    return logits.new_empty(logits.shape)


def _route_setup(ctx, inputs, output):
    logits, *_, ctx.scoring, ctx.norm, ctx.scaling = inputs
    _, ids, counts = output
    ctx.save_for_backward(logits, ids)
    ctx.mark_non_differentiable(ids, counts)


def _route_grad(ctx, dgates, *_):
    return _route_backward(dgates, *ctx.saved_tensors, ctx.scoring, ctx.norm, ctx.scaling), *[None] * 8


_route.register_autograd(_route_grad, setup_context=_route_setup)
