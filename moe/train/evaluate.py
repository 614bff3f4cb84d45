"""Held-out loss: cross-entropy of the main head alone, in nats a token and in bits a byte of text.

Bits a byte is the figure that can be compared across tokenizers; MTP and balance losses never enter it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from moe.data import Evaluation
from moe.objectives import Pretraining
from moe.parallel import Ranks


class Score(NamedTuple):
    loss: float
    """Nats a token."""
    bpb: float
    """Bits a byte."""


@torch.no_grad()
def evaluate(objective: Pretraining, held_out: Evaluation, rows: int, ranks: Ranks) -> Score:
    """Score every target of `held_out` once over all ranks, `rows` rows a pass. No router bias or counter moves."""
    training = objective.training
    objective.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch in held_out.batches(rows, ranks.rank, ranks.world):
        tensors = [None if t is None else t.to(ranks.device) for t in batch]
        sums = objective(*tensors, divisor=1.0).sums
        total += torch.stack([sums["loss"].double(), sums["tokens"].double()])
    ranks.all_reduce([total])
    objective.train(training)
    nats, tokens = total.tolist()
    assert int(tokens) == held_out.tokens, (tokens, held_out.tokens)
    return Score(nats / max(tokens, 1), nats / math.log(2) / max(held_out.bytes, 1))
