"""Held-out loss of the main head, in nats a token and in bits a byte of text, and held-out load of the experts.

Bits a byte is the figure that can be compared across tokenizers; MTP and balance losses never enter it.
MaxVio is arXiv 2408.15664's MaxVio_global: load over all held-out tokens, the bias frozen. Padding is not counted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.analysis.diagnostics import maxvio_floor, watched
from moe.data import Evaluation
from moe.objectives import Pretraining
from moe.parallel import Ranks


class Score(NamedTuple):
    loss: float
    """Nats a token."""
    bpb: float
    """Bits a byte."""
    counts: dict[str, list[int]] = {}
    """Held-out tokens of each expert, by layer: inputs, also those whose target does not count."""
    k: int = 1
    """Experts a token goes to."""

    def record(self) -> dict[str, float]:
        """Figures for metrics.jsonl and summary.json. MaxVio: mean and worst over layers; dead: sum over layers."""
        record = {"val/loss": self.loss, "val/bpb": self.bpb}
        loads = [load for load in self.counts.values() if sum(load)]
        if not loads:
            return record
        vio = [max(load) * len(load) / sum(load) - 1 for load in loads]
        floors = [maxvio_floor(sum(load) // self.k, self.k, len(load)) for load in loads]
        return record | {
            "val/maxvio": sum(vio) / len(vio),
            "val/maxvio_worst": max(vio),
            "val/maxvio_floor": sum(floors) / len(floors),
            "val/dead": float(sum(load.count(0) for load in loads)),
        }


@torch.no_grad()
def evaluate(objective: Pretraining, held_out: Evaluation, rows: int, ranks: Ranks) -> Score:
    """Score every target of `held_out` once over all ranks, `rows` rows a pass. No router bias or counter moves."""
    training, config = objective.training, objective.model.config
    objective.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    counts: dict[str, Tensor] = {}
    with watched(objective.model) as routings:
        for batch in held_out.batches(rows, ranks.rank, ranks.world):
            tokens, segments, mask = (None if t is None else t.to(ranks.device) for t in batch)
            sums = objective(tokens, segments, mask, divisor=1.0).sums
            total += torch.stack([sums["loss"].double(), sums["tokens"].double()])
            real = None if mask is None or objective.padded else mask[:, :-1]  # padded: the routers have seen to it
            for layer, routing in routings.items():
                counts[layer] = counts.get(layer, 0) + _load(routing.experts, real, config.n_routed_experts)
    ranks.all_reduce([total, *counts.values()])
    objective.train(training)
    nats, scored = total.tolist()
    assert int(scored) == held_out.tokens, (scored, held_out.tokens)
    loads = {layer: load.tolist() for layer, load in counts.items()}
    return Score(
        nats / max(scored, 1), nats / math.log(2) / max(held_out.bytes, 1), loads, max(config.num_experts_per_tok, 1)
    )


def _load(experts: Tensor, real: Tensor | None, n_experts: int) -> Tensor:
    """[B, T, K] choices, [B, T] which tokens are no padding -> [E] tokens of each expert."""
    inside = (experts >= 0) & (experts < n_experts)
    if real is not None:
        inside &= real.unsqueeze(-1)
    return torch.bincount(torch.where(inside, experts, n_experts).flatten(), minlength=n_experts + 1)[:n_experts]
