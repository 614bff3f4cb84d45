"""Choice of experts by the native kernels (route.cpp), as in kernels/route.py, and the router's sequence-wise loss.

N tokens, E experts, K choices; B sequences of T tokens.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from moe.kernels.native.library import Struct, call, pointer, threads


class Route(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("n", "e", "k", "groups", "kept")),
        *((name, c_int32) for name in ("sigmoid", "norm", "threads")),
        ("scaling", c_float),
        *((name, c_void_p) for name in ("logits", "bias", "mask", "ids", "gates", "counts", "s")),
        *((name, c_void_p) for name in ("dgates", "ds", "dlogits")),
    ]


class SequenceLoss(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("b", "t", "e", "k")),
        ("threads", c_int32),
        *((name, c_void_p) for name in ("s", "mask", "loss", "f", "share", "gain", "dloss", "ds")),
    ]


def route(
    logits: Tensor, bias: Tensor, mask: Tensor | None, k: int, n_group: int, topk_group: int, scoring: str, norm: bool,
    scaling: float, keep_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logits [N, E], bias [E] fp32, mask [N] bool -> gates [N, K], ids [N, K], counts [E], affinities [N, E] or [0, E]."""
    _check(logits, scoring)
    n, e = logits.shape
    if bias.shape != (e,) or bias.dtype != torch.float32:
        raise ValueError(f"route: bias {tuple(bias.shape)} {bias.dtype} must be [{e}] float32")
    if e % n_group or not 1 <= topk_group <= n_group or not 1 <= k <= topk_group * (e // n_group):
        raise ValueError(
            f"route: k={k} of {e} experts in topk_group={topk_group} of n_group={n_group} cannot be chosen"
        )
    logits, bias, mask = logits.contiguous(), bias.contiguous(), _bytes(mask, (n,))
    ids, counts = (logits.new_empty(shape, dtype=torch.int64) for shape in ((n, k), (e,)))
    gates, s = logits.new_empty(n, k), logits.new_empty(n if keep_scores else 0, e)
    a = _arguments(logits, k, scoring, norm, scaling)
    a.groups, a.kept, a.bias, a.mask = n_group, topk_group, pointer(bias), pointer(mask)
    a.ids, a.gates, a.counts, a.s = pointer(ids), pointer(gates), pointer(counts), pointer(s) if keep_scores else None
    call("route_forward", a)
    return gates, ids, counts, s


def route_backward(
    dgates: Tensor, ds: Tensor, logits: Tensor, ids: Tensor, scoring: str, norm: bool, scaling: float
) -> Tensor:
    """Gradients of `route`'s gates [N, K] and affinities [N, E], which may be empty -> dlogits [N, E]."""
    _check(logits, scoring)
    n, e = logits.shape
    if ids.ndim != 2 or ids.shape[0] != n or dgates.shape != ids.shape or (ds.numel() and ds.shape != logits.shape):
        raise ValueError(
            f"route_backward: dgates {tuple(dgates.shape)}, ids {tuple(ids.shape)} must both be [{n}, K], and ds "
            f"{tuple(ds.shape)} [{n}, {e}]"
        )
    dgates, ds, logits, ids = dgates.float().contiguous(), ds.contiguous(), logits.contiguous(), ids.contiguous()
    dlogits = torch.empty_like(logits)
    a = _arguments(logits, ids.shape[1], scoring, norm, scaling)
    a.ids, a.dgates, a.dlogits = pointer(ids), pointer(dgates), pointer(dlogits)
    a.ds = pointer(ds) if ds.numel() else None
    call("route_backward", a)
    return dlogits


def sequence_loss(s: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s [B, T, E] fp32, mask [B, T] bool -> (loss, and for its gradient f [B, E], share and gain [B, T])."""
    if s.ndim != 3 or s.dtype != torch.float32 or not 1 <= k <= s.shape[2]:
        raise ValueError(f"sequence_loss: s {tuple(s.shape)} {s.dtype} must be [B, T, E] float32, with E >= k={k}")
    b, t, e = s.shape
    s, mask = s.contiguous(), _bytes(mask, (b, t))
    loss, f, share, gain = (s.new_empty(shape) for shape in ((), (b, e), (b, t), (b, t)))
    a = SequenceLoss(
        b=b, t=t, e=e, k=k, threads=threads(), s=pointer(s), mask=pointer(mask), loss=pointer(loss), f=pointer(f),
        share=pointer(share), gain=pointer(gain),
    )  # fmt: skip
    call("sequence_loss_forward", a)
    return loss, f, share, gain


def sequence_loss_backward(dloss: Tensor, f: Tensor, share: Tensor, gain: Tensor) -> Tensor:
    """-> gradient of s [B, T, E]."""
    dloss, (b, t), e = dloss.float().contiguous(), share.shape, f.shape[1]
    ds = f.new_empty(b, t, e)
    a = SequenceLoss(
        b=b, t=t, e=e, threads=threads(), f=pointer(f), share=pointer(share), gain=pointer(gain), dloss=pointer(dloss),
        ds=pointer(ds),
    )  # fmt: skip
    call("sequence_loss_backward", a)
    return ds


def _check(logits: Tensor, scoring: str) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"route: logits {tuple(logits.shape)} {logits.dtype} must be [N, E] float32")
    if scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"route: scoring={scoring!r} is not one of ['sigmoid', 'softmax']")


def _bytes(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"route: mask {tuple(mask.shape)} {mask.dtype} must be {list(shape)} bool")
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _arguments(logits: Tensor, k: int, scoring: str, norm: bool, scaling: float) -> Route:
    return Route(
        n=logits.shape[0], e=logits.shape[1], k=k, sigmoid=scoring == "sigmoid", norm=norm, threads=threads(),
        scaling=scaling, logits=pointer(logits),
    )  # fmt: skip
