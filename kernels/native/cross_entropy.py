"""Output head and cross-entropy by the native kernels (cross_entropy.cpp): the call of kernels/head.py, same meaning.

PyTorch multiplies; between its products one pass turns a chunk's logits into their gradient.

N tokens, D model, V vocabulary.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from moe.kernels.native.library import DTYPES, Struct, call, pointer, threads


class CrossEntropy(Struct):
    _fields_ = [
        *((name, c_int64) for name in ("n", "v")),
        *((name, c_int32) for name in ("dtype", "threads", "gradient")),
        *((name, c_void_p) for name in ("logits", "targets", "total")),
    ]


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (sum of the losses fp32, d loss / d hidden, d loss / d weight); gradients are empty when not asked for."""
    n, vocab = hidden.shape[0], weight.shape[0]
    targets = targets.long().contiguous()
    if n and int(targets.amax()) >= vocab:
        raise IndexError(f"linear_cross_entropy: target {int(targets.amax())} is not one of {vocab} tokens")
    total = torch.zeros((), dtype=torch.float64)
    dh = hidden.new_empty(hidden.shape if with_grad else 0)
    dw = torch.zeros(weight.shape, dtype=torch.float32) if with_grad else weight.new_empty(0)
    logits = hidden.new_empty(min(chunk, n), vocab)
    for start in range(0, n, chunk):
        h, t = hidden[start : start + chunk], targets[start : start + chunk]
        p = torch.mm(h, weight.t(), out=logits[: h.shape[0]])
        cross_entropy_(p, t, total, with_grad)
        if with_grad:
            torch.mm(p, weight, out=dh[start : start + chunk])
            dw += torch.mm(p.t(), h)
    return total.float(), dh, dw.to(weight.dtype)


def cross_entropy_(logits: Tensor, targets: Tensor, total: Tensor, with_grad: bool) -> None:
    """Adds the losses of logits [N, V] to `total`, float64; then the logits are d loss / d logits, if wanted."""
    assert logits.is_contiguous() and targets.is_contiguous() and total.dtype == torch.float64
    a = CrossEntropy(
        n=logits.shape[0], v=logits.shape[1], dtype=DTYPES[logits.dtype], threads=threads(), gradient=with_grad,
        logits=pointer(logits), targets=pointer(targets), total=pointer(total),
    )  # fmt: skip
    call("cross_entropy", a)
