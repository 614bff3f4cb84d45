"""Next-token, multi-token and balance losses: pure functions of states and tokens, and the module that an engine wraps.

    tokens [B, T+1] int64: position i of the T inputs predicts token i+1 (main loss), i+1+k (MTP depth k)
    segment_ids [B, T+1] or None: a prediction across a document border is no target; negative: padding (Finetuning)
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
from moe.layers.routing import Routing
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


def picked_count(rows: int, share: float) -> int:
    return max(1, round(rows * share))


def evenly_picked(first: int, count: int, rows: int, wanted: int) -> list[int]:
    """Which of the rows [first, first + count) of a batch of `rows` belong to `wanted` evenly spaced ones; from 0.

    Row order is random, so these stand for all.
    """
    return [i for i in range(count) if (first + i + 1) * wanted // rows > (first + i) * wanted // rows]


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

    padded = False  # rows of a corpus are full, and a mask would cost every router a pass

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
        first_row: int = 0,
        rows: int | None = None,
        mtp_weight: float = 0.0,
    ) -> Losses:
        """divisor: targets of the global batch; rows: its rows (default: these are all); first_row: where these stand.

        The loss does not depend on how the global batch is cut: `mtp_rows` picks rows by their place in it.
        """
        model = self.model
        rows = tokens.shape[0] if rows is None else rows
        segments = None if segment_ids is None else segment_ids[:, :-1]
        valid = segments >= 0 if self.padded and segments is not None else None
        hidden, routings = model.encode(tokens[:, :-1], segments, mask=valid)
        targets = targets_ahead(tokens, 1, segment_ids, mask)
        ce = cross_entropy_sum(hidden, model.head.weight, targets)
        sums = {"loss": ce.detach(), "tokens": (targets >= 0).sum()}
        total, parts = ce, dict.fromkeys(routings, tokens.shape[0] / rows)  # part of the global mean over sequences
        if self.training and len(model.mtp) and mtp_weight > 0:
            wanted = picked_count(rows, model.config.mtp_rows)
            picked = evenly_picked(first_row, tokens.shape[0], rows, wanted)
            mtp, sums["mtp_tokens"], more = self._look_ahead(hidden, tokens, segment_ids, mask, picked)
            sums["mtp"] = mtp.detach()
            total = total + mtp * (mtp_weight / len(model.mtp) * rows / wanted)  # scaled up: all rows' expectation
            routings, parts = routings | more, parts | dict.fromkeys(more, len(picked) / wanted)
        loss = total / divisor
        if auxiliary := [value * parts[name] for name, r in routings.items() for value in r.losses.values()]:
            balance = torch.stack(auxiliary).sum()
            loss = loss + balance
            sums["balance"] = balance.detach()
        with torch.no_grad():
            states = {
                name: self.balancer.observe(self.balancer.init(r.counts.shape[0], r.counts.device), r)
                for name, r in routings.items()
            }
        return Losses(loss, sums, states, {name: r.stats for name, r in routings.items()})

    def _look_ahead(
        self, hidden: Tensor, tokens: Tensor, segment_ids: Tensor | None, mask: Tensor | None, picked: list[int]
    ) -> tuple[Tensor, Tensor, dict[str, Routing]]:
        """MTP over the picked rows: -> (summed loss of all depths, its targets, routings)."""
        model = self.model
        valid = segment_ids >= 0 if self.padded and segment_ids is not None else None
        if not picked:  # all ranks and micro-batches must use the same weights: one row, in which nothing counts
            picked, valid = [0], torch.zeros_like(tokens[:1], dtype=torch.bool)
        if len(picked) < tokens.shape[0]:
            at = torch.tensor(picked, device=tokens.device)
            hidden, tokens = hidden[at], tokens[at]
            segment_ids, mask, valid = (None if t is None else t[at] for t in (segment_ids, mask, valid))
        if valid is not None:
            mask = valid if mask is None else mask & valid
        states, routings = model.look_ahead(
            hidden,
            tokens[:, :-1],
            None if segment_ids is None else segment_ids[:, :-1],
            mask=None if valid is None else valid[:, :-1],
        )
        loss, counted = (
            hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
            tokens.new_zeros(()),
        )
        for depth, state in enumerate(states):
            ahead = targets_ahead(tokens, depth + 2, segment_ids, mask)
            loss = loss + cross_entropy_sum(state, model.head.weight, ahead)
            counted = counted + (ahead >= 0).sum()
        return loss, counted, routings


class Finetuning(Pretraining):
    """The same losses over packed samples: `mask` is True at answers only, negative segments are padding, not routed."""

    padded = True
