"""The router's product, and choice of experts, gates and counts as one op, where Triton or the native kernels answer.

Elsewhere the router does it in PyTorch. Kept for the backward pass: the logits, which are alive anyway, and the ids.
Affinities are made again from the logits. Triton's counts are sums of the blocks' histograms: exact, and in no order
that could differ between runs.

    N tokens, D model, E experts, K choices; B sequences of T tokens
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ops.paths import path_for

# ----------------------------------------------------------------------------------------------------------- product


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """[N, D], [E, D] -> x weight^T [N, E] in fp32 or wider. Natively, bf16 keeps its products as they are, and those of
    the gradients take dlogits rounded to bf16, as in any other layer."""
    if x.dtype == weight.dtype == torch.bfloat16 and path_for(x) == "native":
        return _linear(x, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


@torch.library.custom_op("moe::router_logits_native", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    from moe.kernels.native import linear as native

    return native.linear(x, weight)


@_linear.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def _linear_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _linear_grad(ctx, dlogits):
    x, weight = ctx.saved_tensors
    d = dlogits.to(x.dtype)
    return torch.mm(d, weight), torch.mm(d.t(), x)


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)

# ------------------------------------------------------------------------------------------------------------ choice


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
    if path_for(logits) == "native":
        gates, ids, counts, _ = _native(logits, bias, mask, k, n_group, topk_group, scoring, norm, scaling, False)
    else:
        gates, ids, counts = _route(logits, bias, mask, k, n_group, topk_group, scoring, norm, scaling)
    return ids, gates, counts


def route_scored(
    logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, scoring: str, norm: bool, scaling: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`route` by the native kernels, and the affinities [N, E], through which gradients reach the logits as well."""
    gates, ids, counts, s = _native(logits, bias, mask, k, n_group, topk_group, scoring, norm, scaling, True)
    return ids, gates, counts, s


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


@torch.library.custom_op("moe::route_native", mutates_args=())
def _native(
    logits: Tensor, bias: Tensor, mask: Tensor | None, k: int, n_group: int, topk_group: int, scoring: str, norm: bool,
    scaling: float, keep_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from moe.kernels.native import route as native

    return native.route(logits, bias, mask, k, n_group, topk_group, scoring, norm, scaling, keep_scores)


@_native.register_fake
def _(logits, bias, mask, k, n_group, topk_group, scoring, norm, scaling, keep_scores):
    n, e = logits.shape
    ids, counts = logits.new_empty(n, k, dtype=torch.int64), logits.new_empty(e, dtype=torch.int64)
    return logits.new_empty(n, k), ids, counts, logits.new_empty(n if keep_scores else 0, e)


@torch.library.custom_op("moe::route_native_backward", mutates_args=())
def _native_backward(
    dgates: Tensor, ds: Tensor, logits: Tensor, ids: Tensor, scoring: str, norm: bool, scaling: float
) -> Tensor:
    from moe.kernels.native import route as native

    return native.route_backward(dgates, ds, logits, ids, scoring, norm, scaling)


@_native_backward.register_fake
def _(dgates, ds, logits, ids, scoring, norm, scaling):
    return logits.new_empty(logits.shape)


def _native_setup(ctx, inputs, output):
    logits, *_, ctx.scoring, ctx.norm, ctx.scaling, _ = inputs
    _, ids, counts, _ = output
    ctx.save_for_backward(logits, ids)
    ctx.mark_non_differentiable(ids, counts)


def _native_grad(ctx, dgates, dids, dcounts, ds):
    return _native_backward(dgates, ds, *ctx.saved_tensors, ctx.scoring, ctx.norm, ctx.scaling), *[None] * 9


_native.register_autograd(_native_grad, setup_context=_native_setup)

# ----------------------------------------------------------------------------------------------- sequence-wise loss


def sequence_loss(s: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Affinities [B, T, E] fp32, mask [B, T] bool -> the sequence-wise balance loss by the native kernels, a scalar.

    What it means: kernels/reference.py. Differentiable in s, through the shares alone.
    """
    return _sequence_loss(s, mask, k)[0]


@torch.library.custom_op("moe::sequence_loss_native", mutates_args=())
def _sequence_loss(s: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe.kernels.native import route as native

    return native.sequence_loss(s, mask, k)


@_sequence_loss.register_fake
def _(s, mask, k):
    b, t, e = s.shape
    return s.new_empty(()), s.new_empty(b, e), s.new_empty(b, t), s.new_empty(b, t)


@torch.library.custom_op("moe::sequence_loss_native_backward", mutates_args=())
def _sequence_loss_backward(dloss: Tensor, f: Tensor, share: Tensor, gain: Tensor) -> Tensor:
    from moe.kernels.native import route as native

    return native.sequence_loss_backward(dloss, f, share, gain)


@_sequence_loss_backward.register_fake
def _(dloss, f, share, gain):
    return f.new_empty(*share.shape, f.shape[1])


def _sequence_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _sequence_loss_grad(ctx, dloss, *_):
    return _sequence_loss_backward(dloss, *ctx.saved_tensors), None, None


_sequence_loss.register_autograd(_sequence_loss_grad, setup_context=_sequence_loss_setup)
