"""Attention by the fused kernels of GPUs: what is prepared once a batch for all layers, and the call itself.

    flex    documents and whole rows      kernels/flex.py
    flash   documents and whole rows      kernels/varlen.py, by flash-attn
    sdpa    whole rows                    kernels/sdpa.py
            documents                     kernels/varlen.py, by PyTorch's own copy of those kernels

None forms a mask or scores of T x T. Which one answers: backends.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels import flex, packed, sdpa, varlen


class Documents(NamedTuple):
    """Segment ids and what one backend made of them; `attention` takes it in the place of the ids."""

    ids: Tensor | None
    """[B, T]; None: whole rows."""
    backend: str
    plan: tuple
    """flex: starts [B, T rounded up], its lists. flash, sdpa: borders, the longest document. sdpa on whole rows: ()."""


def prepare(backend: str, ids: Tensor | None, x: Tensor) -> Documents:
    """For rows like those of `x` [B, T, ...]."""
    if backend == "sdpa" and ids is None:
        return Documents(ids, backend, ())
    batch, time = x.shape[:2]
    runs = torch.zeros(batch, time, dtype=torch.int32, device=x.device) if ids is None else ids
    if backend == "flex":
        starts = packed.starts(runs, packed.multiple(time, flex.BLOCK))
        return Documents(ids, backend, (starts, flex.lists(starts)))
    borders, sizes = varlen.borders(packed.starts(runs, time))
    if _waiting_is_allowed(x):
        return Documents(ids, backend, varlen.trimmed(borders, sizes))
    return Documents(ids, backend, (borders, time))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents, trial: bool = False) -> Tensor:
    """q, k [B, T, H, dqk], v [B, T, H, dv] -> [B, T, H, dv]."""
    ids, backend, plan = documents
    if backend == "flex":
        starts, lists = plan
        return flex.attention(q, k, v, scale, starts, lists, trial)
    if backend == "sdpa" and ids is None:
        return sdpa.attention(q, k, v, scale)
    borders, longest = plan
    return varlen.attention(q, k, v, scale, borders, longest, "flash_attn" if backend == "flash" else "torch")


def _waiting_is_allowed(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
