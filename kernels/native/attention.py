"""Causal attention by the native kernels (attention.cpp): plain, and in MLA's expanded form.

B batch, T time, H heads; documents are runs of equal segment ids
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from moe.kernels import packed
from moe.kernels.native.library import DTYPES, Struct, call, pointer, threads


class Heads(Struct):
    """[B, T, H, n]: only the n channels of a head must be neighbours."""

    _fields_ = [("at", c_void_p), ("batch", c_int64), ("time", c_int64), ("head", c_int64)]


class Attention(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("b", "t", "h", "nope", "rope", "value")),
        *((name, c_int32) for name in ("dtype", "threads")),
        *((name, Heads) for name in ("q", "k", "k_rope", "v")),
        ("cos", c_void_p), ("sin", c_void_p), ("angle_batch", c_int64), ("first", c_void_p), ("scale", c_float),
        *((name, c_void_p) for name in ("o", "lse", "dy")),
        *((name, Heads) for name in ("dq", "dk", "dk_rope", "dv")),
    ]  # fmt: skip


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, dqk], v [B, T, H, dv] -> (o [B, T, H, dv], lse [B, H, T] fp32: what the backward pass needs)."""
    return _forward(q, k, v, (), scale, segment_ids)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, contiguous."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _backward(do, q, k, v, (), o, lse, scale, segment_ids, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


def latent_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, nope + R], kv [B, T, H, nope + dv], k_rope [B, T, R], rotary channels not turned yet; cos, sin
    [B or 1, T, R/2] fp32 -> (o [B, T, H, dv], lse [B, H, T] fp32)."""
    k, v = _halves(q, kv, k_rope)
    return _forward(q, k, v, (k_rope, cos, sin), scale, segment_ids)


def latent_backward(
    do: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, o: Tensor, lse: Tensor, scale: float,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of q, kv, k_rope, contiguous."""
    dq, dkv, dk_rope = (x.new_empty(x.shape) for x in (q, kv, k_rope))
    (k, v), (dk, dv) = _halves(q, kv, k_rope), _halves(dq, dkv, dk_rope)
    rotary, heads = (k_rope, cos, sin), dk_rope.unsqueeze(2)
    _backward(do, q, k, v, rotary, o, lse, scale, segment_ids, dq=dq, dk=dk, dv=dv, dk_rope=heads)
    return dq, dkv, dk_rope


def _halves(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """k_nope and v, views of kv."""
    nope = q.shape[3] - k_rope.shape[2]
    return kv[..., :nope], kv[..., nope:]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rotary: Sequence[Tensor], scale: float, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    o = v.new_empty(v.shape)
    lse = v.new_empty(batch, heads, time, dtype=torch.float32)
    _run("attention_forward", q, k, v, rotary, scale, segment_ids, o, lse)
    return o, lse


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Sequence[Tensor], o: Tensor, lse: Tensor, scale: float,
    segment_ids: Tensor | None, **gradients: Tensor,
) -> None:  # fmt: skip
    do = do.to(o.dtype).contiguous()
    out = {name: _heads(x) for name, x in gradients.items()}
    _run("attention_backward", q, k, v, rotary, scale, segment_ids, o, lse, dy=pointer(do), **out)


def _run(
    name: str, q: Tensor, k: Tensor, v: Tensor, rotary: Sequence[Tensor], scale: float, segment_ids: Tensor | None,
    o: Tensor, lse: Tensor, **more: int | Heads | None,
) -> None:  # fmt: skip
    if any(x.dtype != q.dtype for x in (k, v, o, *rotary[:1])):
        raise ValueError(f"{name}: queries are {q.dtype}, keys or values are not; convert them")
    batch, time, heads, _ = q.shape
    q, k, v = _readable(q), _readable(k), _readable(v)
    first = None if segment_ids is None else packed.starts(segment_ids, time)
    a = Attention(
        b=batch, t=time, h=heads, nope=k.shape[3], rope=q.shape[3] - k.shape[3], value=v.shape[3],
        dtype=DTYPES[q.dtype], threads=threads(), q=_heads(q), k=_heads(k), v=_heads(v),
        first=pointer(first), scale=scale, o=pointer(o), lse=pointer(lse), **more,
    )  # fmt: skip
    if rotary:
        k_rope, cos, sin = (
            _readable(rotary[0]).unsqueeze(2),
            rotary[1].float().contiguous(),
            rotary[2].float().contiguous(),
        )
        a.k_rope, a.cos, a.sin = _heads(k_rope), pointer(cos), pointer(sin)
        a.angle_batch = cos[0].numel() if cos.shape[0] > 1 else 0
    call(name, a)


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _heads(x: Tensor) -> Heads:
    return Heads(x.data_ptr(), *x.stride()[:3])
