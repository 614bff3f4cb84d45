"""Output head and cross-entropy in one pass over chunks of tokens. N tokens, D model, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (sum of the losses, d loss / d hidden, d loss / d weight); gradients are empty when not asked for.

    Gradients are made while a chunk's logits are at hand, so [N, V] never exists. The losses and the sum of d weight
    are fp32 or wider; the logits and their gradient have the inputs' dtype.
    """
    n, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    dh = hidden.new_empty(hidden.shape) if with_grad else hidden.new_empty(0)
    dw = torch.zeros(vocab, weight.shape[1], dtype=wide, device=weight.device) if with_grad else weight.new_empty(0)
    for start in range(0, n, chunk):
        h, t = hidden[start : start + chunk], targets[start : start + chunk]
        logits = torch.mm(h, weight.t())
        valid = (t >= 0).unsqueeze(1)
        index = t.clamp_min(0).unsqueeze(1)
        logp = torch.log_softmax(logits, 1, dtype=wide)
        total -= torch.where(valid, logp.gather(1, index), 0).sum()
        if with_grad:
            p = torch.softmax(logits, 1)
            p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
            torch.mul(torch.mm(p, weight), valid, out=dh[start : start + chunk])
            dw += torch.mm(p.t(), h * valid)
    return total, dh, dw.to(weight.dtype)
