"""The one door to `moe.kernels`: what the layers call, and the choice of the path that answers.

    experts(x, w13, w2, experts, gates)          [N, D] -> [N, D]   routed experts
    attention(q, k, v, scale, segment_ids)       [B, T, H, .]       causal attention, unequal key and value widths
    rms_norm(x, weight, eps)                     [..., D]           without normalised copies
    linear_cross_entropy(hidden, weight, targets)  -> scalar sum    output head and loss, [N, V] never whole
    for_few_rows(weight)                         [out, in]          a weight as decoding reads it fastest

Each but the last is one custom op with a written-out backward, so torch.compile and engines see a single node. Paths: `reference`
(loops, the oracle) and `torch` (kernels/eager.py; fused attention on CUDA). The environment variable MOE_OPS wins over
`select()`, which recipes call with `train.ops`.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import UserError, nearest

try:
    from moe.kernels import eager, reference
except ImportError as error:  # a checkout without symbolic links holds a text file there
    raise ImportError(
        "moe/kernels is not a link to ../kernels; run `git config core.symlinks true` and check it out again"
    ) from error

PATHS = ("auto", "reference", "torch")
_selected = "auto"


def select(path: str) -> None:
    """Choose the path for this process: auto, reference or torch. MOE_OPS, when set, wins."""
    global _selected
    if path not in PATHS:
        raise UserError(f"train.ops={path!r} is not one of {list(PATHS)}{nearest(path, PATHS)}")
    _selected = path
    selected()  # a wrong MOE_OPS is told now, not in the first layer


def selected() -> str:
    """The path that answers: reference or torch."""
    path = os.environ.get("MOE_OPS") or _selected
    if path not in PATHS:
        raise UserError(f"MOE_OPS={path!r} is not one of {list(PATHS)}{nearest(path, PATHS)}")
    return "torch" if path == "auto" else path


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ------------------------------------------------------------------------------------------------------------- experts


def experts(x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    """Routed SwiGLU experts, weighted and summed for each token.

    x [N, D]; w13 [E, 2F, D] gate rows then up rows; w2 [E, D, F]; experts [N, K] int64; gates [N, K] -> [N, D] in x's
    dtype. Differentiable in x, w13, w2 and gates. An id outside [0, E) is no expert: no compute, zero gradient; K is a
    maximum. Every expert's weight receives a gradient, zero for an expert without tokens. Raises ValueError on shapes
    that do not fit.
    """
    n_experts, double, width = w13.shape
    if x.shape[-1] != width or tuple(w2.shape) != (n_experts, width, double // 2) or double % 2:
        raise ValueError(
            f"experts: x {tuple(x.shape)}, w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)} do not fit; "
            "expected x [N, D], w13 [E, 2F, D], w2 [E, D, F]"
        )
    if experts.shape != gates.shape or experts.shape[0] != x.shape[0] or experts.ndim != 2:
        raise ValueError(
            f"experts: ids {tuple(experts.shape)} and gates {tuple(gates.shape)} must both be [N, K] with N={x.shape[0]}"
        )
    if selected() == "reference":
        return reference.experts(x, w13, w2, experts, gates)
    if not _wants_grad(x, w13, w2, gates) and eager.experts_are_few(w13, w2, experts.numel()):
        return eager.experts_of_few(x, w13, w2, experts, gates)
    return _experts(x, w13, w2, experts, gates)[0]


@torch.library.custom_op("moe::experts", mutates_args=())
def _experts(x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return eager.experts_forward(x, w13, w2, experts, gates)


@_experts.register_fake
def _(x, w13, w2, experts, gates):
    return x.new_empty(x.shape), x.new_empty(eager.order_rows(x, experts.numel(), w13.shape[0]), w13.shape[1])


@torch.library.custom_op("moe::experts_backward", mutates_args=())
def _experts_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return eager.experts_backward(dy, x, w13, w2, experts, gates, z)


@_experts_backward.register_fake
def _(dy, x, w13, w2, experts, gates, z):
    return tuple(t.new_empty(t.shape) for t in (x, w13, w2, gates))


def _experts_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _experts_grad(ctx, dy, dz):
    x, w13, w2, ids, gates, z = ctx.saved_tensors
    dx, dw13, dw2, dgates = _experts_backward(dy, x, w13, w2, ids, gates, z)
    return dx, dw13, dw2, None, dgates


_experts.register_autograd(_experts_grad, setup_context=_experts_setup)


# --------------------------------------------------------------------------------------------------- products of few rows


def for_few_rows(weight: Tensor) -> Tensor:
    """[out, in] -> the same matrix in the layout that F.linear reads fastest at every step of decoding; mostly a copy."""
    return eager.for_few_rows(weight)


# ----------------------------------------------------------------------------------------------------------- attention


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None = None) -> Tensor:
    """Causal attention. q, k [B, T, H, dqk], v [B, T, H, dv] -> [B, T, H, dv]; softmax(q k^T * scale) v.

    segment_ids [B, T] (documents packed in a row): a position sees its own segment only. Key and value widths may
    differ, as in MLA.
    """
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must share [B, T, H], q and k dqk too"
        )
    if selected() == "reference":
        return reference.attention(q, k, v, scale, segment_ids)
    if q.device.type == "cpu":
        if _wants_grad(q, k, v):
            return _attention(q, k, v, scale, segment_ids)[0]
        return eager.attention_forward(q, k, v, scale, segment_ids, with_grad=False)[0]
    return _fused_attention(q, k, v, scale, segment_ids)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]).tril().unsqueeze(1)
    pad = q.shape[-1] - v.shape[-1]  # the fused kernels want one width
    o = F.scaled_dot_product_attention(
        q, k, F.pad(v, (0, pad)) if pad > 0 else v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return o[..., : v.shape[-1]].transpose(1, 2)


@torch.library.custom_op("moe::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    return eager.attention_forward(q, k, v, scale, segment_ids)


@_attention.register_fake
def _(q, k, v, scale, segment_ids):
    b, t, h, _ = q.shape
    return v.new_empty(v.shape), q.new_empty(b * h * sum(eager.attention_pairs(t)))


@torch.library.custom_op("moe::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return eager.attention_backward(do, q, k, v, o, p, scale)


@_attention_backward.register_fake
def _(do, q, k, v, o, p, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _attention_setup(ctx, inputs, output):
    q, k, v, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _attention_grad(ctx, do, dp):
    dq, dk, dv = _attention_backward(do, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None


_attention.register_autograd(_attention_grad, setup_context=_attention_setup)


# ---------------------------------------------------------------------------------------------------------------- norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D]: x / sqrt(mean(x^2) + eps) * weight, computed in fp32 or wider."""
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} ends in another width than weight {tuple(weight.shape)}")
    if selected() == "reference":
        return reference.rms_norm(x, weight, eps)
    if x.device.type == "cpu":  # the library's own takes five passes and keeps two fp32 copies there
        if _wants_grad(x, weight) or x.numel() > SMALL:
            return _rms_norm(x, weight, eps)[0]
        return eager.rms_norm_of_few(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


SMALL = 2**15  # numbers of a decoding step: there the call of an op costs more than its passes (measured)


@torch.library.custom_op("moe::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return eager.rms_norm_forward(x, weight, eps)


@_rms_norm.register_fake
def _(x, weight, eps):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


@torch.library.custom_op("moe::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return eager.rms_norm_backward(dy, x, weight, r)


@_rms_norm_backward.register_fake
def _(dy, x, weight, r):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rms_norm_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _rms_norm_grad(ctx, dy, dr):
    dx, dw = _rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dw, None


_rms_norm.register_autograd(_rms_norm_grad, setup_context=_rms_norm_setup)


# ------------------------------------------------------------------------------------------------------ head with loss


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
    if selected() == "reference":
        return reference.linear_cross_entropy(hidden, weight, targets)
    return _linear_cross_entropy(hidden, weight, targets, chunk, _wants_grad(hidden, weight))[0]


@torch.library.custom_op("moe::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return eager.linear_cross_entropy_forward(hidden, weight, targets, chunk, with_grad)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, chunk, with_grad):
    total = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    if not with_grad:
        return total, hidden.new_empty(0), weight.new_empty(0)
    return total, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _linear_cross_entropy_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _linear_cross_entropy_grad(ctx, g, *_):
    dh, dw = ctx.saved_tensors
    return dh * g, dw * g, None, None, None  # g is a scalar and keeps its fp32 value


_linear_cross_entropy.register_autograd(_linear_cross_entropy_grad, setup_context=_linear_cross_entropy_setup)
