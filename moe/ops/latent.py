"""MLA's attention core in its expanded form as one op, where the native kernels answer: rotation, scores, values.

Elsewhere the layer turns, joins and calls `attention`; this spares the copies, which cost a CPU as much as the scores.

    B batch, T time, H heads, R rotary channels
"""

from __future__ import annotations

import torch
from torch import Tensor


def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, segment_ids: Tensor | None = None
) -> Tensor:
    """Causal attention of heads that share a rotary key -> [B, T, H, dv].

    q [B, T, H, nope + R] and k_rope [B, T, R], rotary channels not turned yet; kv [B, T, H, nope + dv], keys then values;
    cos, sin [B or 1, T, R / 2] fp32. segment_ids [B, T]: a position sees its own run of equal ids. What it means:
    kernels/reference.py. Raises ValueError on shapes that do not fit.
    """
    rows, rope = q.shape[:3], k_rope.shape[-1]
    nope = q.shape[3] - rope
    tables = (rows[1], rope // 2)
    if kv.shape[:3] != rows or k_rope.shape[:2] != rows[:2] or not 0 <= nope < kv.shape[3] or rope % 2:
        raise ValueError(
            f"latent_attention: q {tuple(q.shape)}, kv {tuple(kv.shape)}, k_rope {tuple(k_rope.shape)} do not fit; expected "
            "[B, T, H, nope + R], [B, T, H, nope + dv], [B, T, R] with an even R"
        )
    if cos.shape != sin.shape or cos.shape[1:] != tables or cos.shape[0] not in (1, rows[0]):
        raise ValueError(
            f"latent_attention: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [B or 1, {tables[0]}, {tables[1]}]"
        )
    return _latent(q, kv, k_rope, cos, sin, scale, segment_ids)[0]


@torch.library.custom_op("moe::latent_attention_native", mutates_args=())
def _latent(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    from moe.kernels.native import attention as native

    return native.latent_forward(q, kv, k_rope, cos, sin, scale, segment_ids)


@_latent.register_fake
def _(q, kv, k_rope, cos, sin, scale, segment_ids):
    b, t, h, _ = q.shape
    width = kv.shape[3] - q.shape[3] + k_rope.shape[2]
    return q.new_empty(b, t, h, width), q.new_empty(b, h, t, dtype=torch.float32)


@torch.library.custom_op("moe::latent_attention_native_backward", mutates_args=())
def _latent_backward(
    do: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, o: Tensor, lse: Tensor, scale: float,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from moe.kernels.native import attention as native

    return native.latent_backward(do, q, kv, k_rope, cos, sin, o, lse, scale, segment_ids)


@_latent_backward.register_fake
def _(do, q, kv, k_rope, cos, sin, o, lse, scale, segment_ids):
    return tuple(t.new_empty(t.shape) for t in (q, kv, k_rope))


def _latent_setup(ctx, inputs, output):
    *kept, ctx.scale, segment_ids = inputs
    ctx.save_for_backward(*kept, *output, segment_ids)
    ctx.mark_non_differentiable(output[1])


def _latent_grad(ctx, do, _):
    *kept, segment_ids = ctx.saved_tensors
    return *_latent_backward(do, *kept, ctx.scale, segment_ids), None, None, None, None


_latent.register_autograd(_latent_grad, setup_context=_latent_setup)
