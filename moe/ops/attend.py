"""Causal attention as one op: [B, T, H, .] queries, keys and values of unequal widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels import attention as cpu
from moe.kernels import reference
from moe.ops.paths import path_for, wants_grad


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None = None) -> Tensor:
    """Causal attention. q, k [B, T, H, dqk], v [B, T, H, dv] -> [B, T, H, dv]; softmax(q k^T * scale) v.

    segment_ids [B, T] (documents packed in a row): a position sees its own segment only. Key and value widths may
    differ, as in MLA.
    """
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must share [B, T, H], q and k dqk too"
        )
    if path_for(q) == "reference":
        return reference.attention(q, k, v, scale, segment_ids)
    if q.device.type == "cpu":
        if wants_grad(q, k, v):
            return _attention(q, k, v, scale, segment_ids)[0]
        return cpu.attention_forward(q, k, v, scale, segment_ids, with_grad=False)[0]
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
    return cpu.attention_forward(q, k, v, scale, segment_ids)


@_attention.register_fake
def _(q, k, v, scale, segment_ids):
    b, t, h, _ = q.shape
    return v.new_empty(v.shape), q.new_empty(b * h * sum(cpu.attention_pairs(t)))


@torch.library.custom_op("moe::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.attention_backward(do, q, k, v, o, p, scale)


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
