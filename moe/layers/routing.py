"""What a router decided: the record that losses, replay, balance rules and diagnostics read.

Nothing about routing is parked in globals or on modules between calls; it travels in this tuple. A NamedTuple because
engines and compilers walk tuples, not dataclasses.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """One router's decision for a batch of tokens; leading dimensions are those of the tokens."""

    experts: Tensor
    """[..., K] int64 chosen experts; an id outside [0, E) (padding) means no expert."""
    gates: Tensor
    """[..., K] fp32 weights of the chosen experts; gradients reach the router through them."""
    counts: Tensor
    """[E] int64 tokens routed to each expert, padding not counted."""
    losses: dict[str, Tensor]
    """Weighted auxiliary losses, scalars to be added to the training loss."""
    stats: dict[str, Tensor]
    """Detached sums for router health: `tokens`, `margin` (best minus second-best affinity), `kept` (choices that the
    bias and the group limit left unchanged). Sum-reducible over ranks and micro-steps."""
    scores: Tensor | None = None
    """[..., E] fp32 affinities, only with keep_scores=True: they would add a third to the saved activations."""
