"""What is minimised: pure functions, and the modules that an engine wraps (design: the loss lives inside them).

    pretraining.py    next token, MTP and balance losses
    policy.py         policy-gradient losses: GRPO and its relatives

OBJECTIVES names the modules that `Engine` can train.
"""

from moe.objectives.pretraining import (
    Losses,
    Pretraining,
    count_targets,
    cross_entropy_sum,
    evenly_picked,
    picked_count,
    targets_ahead,
)

__all__ = [
    "OBJECTIVES", "Losses", "Pretraining", "count_targets", "cross_entropy_sum", "evenly_picked", "picked_count",
    "targets_ahead",
]  # fmt: skip

OBJECTIVES = {"pretrain": Pretraining}
