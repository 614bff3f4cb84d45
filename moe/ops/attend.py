"""Causal attention as one op: [B, T, H, .] queries, keys and values of unequal widths.

CPUs have native kernels, or blocks in PyTorch with a written-out backward pass; on GPUs backends.py chooses, and
`documents` makes once a batch what all layers need to keep packed documents apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels import attention as blocks
from moe.kernels import reference
from moe.ops import fused
from moe.ops.backends import backend_for
from moe.ops.fused import Documents
from moe.ops.paths import path_for, selected, wants_grad


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | Documents | None = None) -> Tensor:
    """Causal attention. q, k [B, T, H, dqk], v [B, T, H, dv] -> [B, T, H, dv]; softmax(q k^T * scale) v.

    segment_ids [B, T] (documents packed in a row), or what `documents` made of them: a position sees its own segment
    only, a run of equal ids. Key and value widths may differ, as in MLA.
    """
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must share [B, T, H], q and k dqk too"
        )
    ids = segment_ids.ids if isinstance(segment_ids, Documents) else segment_ids
    if selected() == "reference":
        return reference.attention(q, k, v, scale, ids)
    if path_for(q) == "native" and scale >= 0:  # the kernels take a row's largest score for that of its softmax
        return _native(q, k, v, scale, ids)[0]
    backend = backend_for(q.device, q.dtype, q.shape[3], v.shape[3], ids is not None) if v.numel() else "blocks"
    if backend == "blocks":
        if wants_grad(q, k, v):
            return _attention(q, k, v, scale, ids)[0]
        return blocks.attention_forward(q, k, v, scale, ids, with_grad=False)[0]
    if not isinstance(segment_ids, Documents) or segment_ids.backend != backend:
        segment_ids = fused.prepare(backend, ids, q)
    return fused.attention(q, k, v, scale, segment_ids)


def documents(segment_ids: Tensor | None, x: Tensor, widths: tuple[int, int]) -> Tensor | Documents | None:
    """[B, T] ids, and the model's state x [B, T, D] -> what every layer may hand to `attention` in their place.

    widths: of keys and of values. Where nothing can be prepared these are the ids themselves.
    """
    if selected() == "reference" or not x.numel():
        return segment_ids
    backend = backend_for(x.device, x.dtype, *widths, segment_ids is not None)
    return segment_ids if backend == "blocks" else fused.prepare(backend, segment_ids, x)


@torch.library.custom_op("moe::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    return blocks.attention_forward(q, k, v, scale, segment_ids)


@_attention.register_fake
def _(q, k, v, scale, segment_ids):
    b, t, h, _ = q.shape
    return v.new_empty(v.shape), q.new_empty(b * h * sum(blocks.attention_pairs(t)))


@torch.library.custom_op("moe::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return blocks.attention_backward(do, q, k, v, o, p, scale)


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


@torch.library.custom_op("moe::attention_native", mutates_args=())
def _native(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    from moe.kernels.native import attention as native

    return native.attention_forward(q, k, v, scale, segment_ids)


@_native.register_fake
def _(q, k, v, scale, segment_ids):
    b, t, h, _ = q.shape
    return v.new_empty(v.shape), v.new_empty(b, h, t, dtype=torch.float32)


@torch.library.custom_op("moe::attention_native_backward", mutates_args=())
def _native_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from moe.kernels.native import attention as native

    return native.attention_backward(do, q, k, v, o, lse, scale, segment_ids)


@_native_backward.register_fake
def _(do, q, k, v, o, lse, scale, segment_ids):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _native_setup(ctx, inputs, output):
    q, k, v, ctx.scale, segment_ids = inputs
    ctx.save_for_backward(q, k, v, *output, segment_ids)
    ctx.mark_non_differentiable(output[1])


def _native_grad(ctx, do, _):
    *kept, segment_ids = ctx.saved_tensors
    return *_native_backward(do, *kept, ctx.scale, segment_ids), None, None


_native.register_autograd(_native_grad, setup_context=_native_setup)
