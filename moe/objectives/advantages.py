"""Rewards of groups as advantages, and how many problems a number of answers solves. Pure functions of tensors.

    rewards [P, G]    G answers to each of P prompts; NaN: could not be scored

Sources: GRPO (arXiv 2402.03300) 4.1; without the std: Dr. GRPO (2503.20783); pass@k: Chen et al. 2021 (2107.03374).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.config import UserError


def group_advantages(rewards: Tensor, how: str = "group", std_epsilon: float = 1e-4) -> Tensor:
    """[P, G] -> [P, G]: reward minus the mean of its group, over the std (Bessel) of: its group, the batch, or none.

    NaN rewards take no part and have advantage 0; a group whose rewards are all equal has exactly 0.
    """
    if how not in ("group", "batch", "none"):
        raise UserError(f"grpo.advantage={how!r} is not one of ['group', 'batch', 'none']")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if infinite := int(rewards.isinf().sum()):
        raise UserError(
            f"{infinite} of {rewards.numel()} rewards are infinite; return a finite number, or NaN to leave out"
        )
    known = ~rewards.isnan()
    centred = _centred(rewards, known)
    if how == "group":
        centred = centred / (_std(centred, known) + std_epsilon)
    elif how == "batch":
        every, where = rewards.reshape(1, -1), known.reshape(1, -1)
        centred = centred / (_std(_centred(every, where), where) + std_epsilon)
    return torch.where(known & live_groups(rewards).unsqueeze(1), centred, 0)  # sums round: equal is not always 0


def _centred(x: Tensor, known: Tensor) -> Tensor:
    """Each row minus its mean over what is known, 0 elsewhere."""
    mean = torch.where(known, x, 0).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
    return torch.where(known, x - mean, 0)


def _std(centred: Tensor, known: Tensor) -> Tensor:
    return (centred.square().sum(1, keepdim=True) / (known.sum(1, keepdim=True) - 1).clamp_min(1)).sqrt()


def live_groups(rewards: Tensor) -> Tensor:
    """[P, G] -> [P] bool: groups with a signal, i.e. two known rewards that differ."""
    unknown = rewards.isnan()
    return rewards.masked_fill(unknown, -math.inf).amax(1) > rewards.masked_fill(unknown, math.inf).amin(1)


def pass_at_k(n: Tensor | int, c: Tensor | int, k: int) -> Tensor:
    """Chance that k of n answers, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k), float64, elementwise.

    Unbiased (Chen et al. 2021, arXiv 2107.03374), unlike 1 - (1 - c/n)^k.
    """
    n, c = torch.as_tensor(n, dtype=torch.float64), torch.as_tensor(c, dtype=torch.float64)
    if k < 1 or bool((n < k).any()) or bool((c < 0).any()) or bool((c > n).any()):
        raise UserError(f"pass_at_k: expected 1 <= k={k} <= n and 0 <= c <= n; draw at least k answers to each problem")
    missed = torch.ones_like(n - c)
    for j in range(k):
        missed = missed * (n - c - j) / (n - j)  # exactly 0 from j = n - c on
    return 1 - missed
