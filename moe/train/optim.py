"""AdamW's parameter groups and the learning-rate schedules.

Source: DeepSeek-V3 (arXiv 2412.19437) section 4.2: AdamW (0.9, 0.95), decay 0.1, and the schedule in fractions of its
14.8 T tokens. Norms carry no decay; router biases are buffers and never reach the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe import ops
from moe.config import OptimConfig, UserError, nearest


def adamw(parameters: list[Tensor], c: OptimConfig) -> torch.optim.AdamW:
    """One fused AdamW over matrices with decay and vectors without."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True
    )


@torch.no_grad()
def one_pass(
    optimizer: torch.optim.AdamW, parameters: list[Tensor], gradients: list[Tensor], copies: list[Tensor] | None,
    scale: float = 1.0,
) -> None:  # fmt: skip
    """`optimizer.step()` by ops.adamw, for gradients that need not be fp32 and are multiplied by `scale` on the way.

    copies: the bf16 working copy, written too. State and groups stay torch's, so either step can follow the other.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        group, state = group_of[id(p)], optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        ops.adamw(
            p, g, state["exp_avg"], state["exp_avg_sq"], copies[i] if copies else None, int(state["step"]), group["lr"],
            group["betas"][0], group["betas"][1], group["eps"], group["weight_decay"], scale,
        )  # fmt: skip


def v3(progress: float, final: float) -> float:
    """Constant to 10 T, cosine to `final` until 14.3 T, constant for 333 B, a third of it for the last 167 B tokens."""
    hold, decay, last = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8
    if progress < hold:
        return 1.0
    if progress < decay:
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (progress - hold) / (decay - hold)))
    return final if progress < last else final / 3


def cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def constant(progress: float, final: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {"v3": v3, "cosine": cosine, "constant": constant}


def learning_rate(c: OptimConfig, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (from 1) of `steps`: linear warm-up, then the schedule over the whole run.

    Raises UserError for a schedule that is not in the table."""
    if c.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={c.schedule!r} is not one of {list(SCHEDULES)}{nearest(c.schedule, SCHEDULES)}")
    warmup = c.warmup * steps
    return c.lr * SCHEDULES[c.schedule]((step - 1) / steps, c.final_lr) * min(1.0, step / max(warmup, 1.0))
