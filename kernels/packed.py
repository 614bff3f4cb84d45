"""Rows of packed documents: where each document starts, and tensors brought to the sizes that fused kernels take.

A document is a run of equal segment ids in a row, padding (negative ids) included. B batch, T time, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 8  # numbers, 16 bytes in bf16: what kernels load at once, so heads are as wide as several of it


def starts(ids: Tensor, time: int) -> Tensor:
    """[B, T] segment ids -> [B, time] int32: the place where the document of each place starts.

    Places from T on, which fill up the last block of a kernel, are a document of their own.
    """
    batch, real = ids.shape
    at = torch.arange(real, dtype=torch.int32, device=ids.device)
    first = torch.zeros(batch, time, dtype=torch.int32, device=ids.device)
    first[:, 1:real] = torch.where(ids[:, 1:] != ids[:, :-1], at[1:], 0)
    if time > real:
        first[:, real] = real
    return first.cummax(1).values


def fitted(x: Tensor, time: int, width: int) -> Tensor:
    """[B, T, H, d] -> contiguous [B, time, H, width], zeros at the end of both.

    MLA's values are a view beside its keys: not every kernel can load it, and it would keep the keys for the backward
    pass too.
    """
    later, wider = time - x.shape[1], width - x.shape[3]
    return F.pad(x, (0, wider, 0, 0, 0, later)) if later or wider else x.contiguous()


def multiple(size: int, of: int) -> int:
    """The next multiple, `size` itself included."""
    return -(-size // of) * of
