"""What is minimised: pure functions, and the modules that an engine wraps (design: the loss lives inside them).

    pretraining.py    next token, MTP and balance losses
    advantages.py     rewards of groups as advantages; pass@k
    policy.py         policy-gradient losses: GRPO and its relatives
    reinforcement.py  a policy loss over a whole model, with routing replay

OBJECTIVES names the modules that `Engine` can train.
"""

from moe.objectives.advantages import group_advantages, live_groups, pass_at_k
from moe.objectives.policy import LOSSES, policy_loss, token_logprobs
from moe.objectives.pretraining import (
    Finetuning,
    Losses,
    Pretraining,
    count_targets,
    cross_entropy_sum,
    evenly_picked,
    picked_count,
    targets_ahead,
)
from moe.objectives.reinforcement import Reinforcement

__all__ = [
    "LOSSES", "OBJECTIVES", "Finetuning", "Losses", "Pretraining", "Reinforcement", "count_targets", "cross_entropy_sum",
    "evenly_picked", "group_advantages", "live_groups", "pass_at_k", "picked_count", "policy_loss", "targets_ahead",
    "token_logprobs",
]  # fmt: skip

OBJECTIVES = {"pretrain": Pretraining, "sft": Finetuning, "grpo": Reinforcement}
