"""What is minimised: pure functions of states and tokens, and the module that an engine wraps.

    tokens [B, T+1] int64: position i of the T inputs predicts token i+1 (main loss), i+1+k (MTP depth k)
    segment_ids [B, T+1] or None: a prediction across a document border is no target
    mask [B, T+1] bool or None: False is no target (padding, prompts)

The loss lives inside the wrapped module, since under ZeRO-3 a weight used outside its forward is an empty shard.
Sources: DeepSeek-V3 (arXiv 2412.19437), equations 24-25 (MTP, averaged over depths, normalised like the main loss) and
17 (sequence-wise balance loss, added up over layers).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe import ops
from moe.config import UserError, nearest
from moe.layers.balance import BALANCERS, State
from moe.model import Transformer


def targets_ahead(tokens: Tensor, ahead: int, segment_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """[B, T+1] -> [B, T+1-ahead]: the token `ahead` places later, or -1 where it is masked or in another document."""
    target = tokens[:, ahead:]
    if segment_ids is not None:
        target = torch.where(segment_ids[:, ahead:] == segment_ids[:, :-ahead], target, -1)
    if mask is not None:
        target = torch.where(mask[:, ahead:], target, -1)
    return target


def count_targets(tokens: Tensor, segment_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Tokens that the main loss is a mean over; summed over the global batch it is the divisor of every loss."""
    return (targets_ahead(tokens, 1, segment_ids, mask) >= 0).sum()


def cross_entropy_sum(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """[B, T, D] states, [V, D] head, [B, T] targets (negative: none) -> sum in nats, [N, V] never whole."""
    return ops.linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1))


class Losses(NamedTuple):
    loss: Tensor
    """Scalar to call backward on; summed over micro-batches and ranks it is the loss of the global batch."""
    sums: dict[str, Tensor]
    """Detached: `loss` and `mtp` in nats, `tokens` and `mtp_tokens` their target counts, `balance` weighted."""
    balance: dict[str, State]
    """Balance statistics of this micro-batch by layer, sum-reducible."""
    health: dict[str, dict[str, Tensor]]
    """Routing.stats by layer, sum-reducible."""


class Pretraining(nn.Module):
    """Next token + MTP + balance for one micro-batch."""

    def __init__(self, model: Transformer, balance: str = "bias") -> None:
        super().__init__()
        if balance not in BALANCERS:
            raise UserError(f"model.balance={balance!r} is not one of {list(BALANCERS)}{nearest(balance, BALANCERS)}")
        self.model = model
        self.balancer = BALANCERS[balance]

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None,
        mask: Tensor | None,
        divisor: float,
        row_share: float = 1.0,
        mtp_weight: float = 0.0,
    ) -> Losses:
        """divisor: targets of the global batch. row_share: this micro-batch's rows over those of the global batch."""
        model = self.model
        inputs, segments = tokens[:, :-1], None if segment_ids is None else segment_ids[:, :-1]
        hidden, routings = model.encode(inputs, segments)
        targets = targets_ahead(tokens, 1, segment_ids, mask)
        ce = cross_entropy_sum(hidden, model.head.weight, targets)
        total = ce
        sums = {"loss": ce.detach(), "tokens": (targets >= 0).sum()}
        if self.training and len(model.mtp) and mtp_weight > 0:
            # The first rows stand for all: row order is random. Scaling up keeps the gradient's expectation.
            some = max(1, round(tokens.shape[0] * model.config.mtp_rows))
            part = [None if x is None else x[:some] for x in (tokens, segment_ids, mask)]
            states, more = model.look_ahead(hidden[:some], inputs[:some], None if segments is None else segments[:some])
            routings |= more
            mtp = torch.zeros_like(ce)
            counted = torch.zeros_like(sums["tokens"])
            for depth, state in enumerate(states):
                ahead = targets_ahead(part[0], depth + 2, part[1], part[2])
                mtp = mtp + cross_entropy_sum(state, model.head.weight, ahead)
                counted += (ahead >= 0).sum()
            total = total + mtp * (mtp_weight / len(states) * tokens.shape[0] / some)
            sums |= {"mtp": mtp.detach(), "mtp_tokens": counted}
        loss = total / divisor
        if auxiliary := [value for r in routings.values() for value in r.losses.values()]:
            balance = torch.stack(auxiliary).sum() * row_share
            loss = loss + balance
            sums["balance"] = balance.detach()
        with torch.no_grad():
            states_by_layer = {
                name: self.balancer.observe(self.balancer.init(r.counts.shape[0], r.counts.device), r)
                for name, r in routings.items()
            }
        return Losses(loss, sums, states_by_layer, {name: r.stats for name, r in routings.items()})


OBJECTIVES = {"pretrain": Pretraining}
