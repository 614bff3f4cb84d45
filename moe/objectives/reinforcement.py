"""The policy objective as a module that an engine wraps: samples in, policy loss and its figures out.

    tokens [S, T+1] int64    prompt, then the sampled answer, then padding; position i of T predicts token i+1
    answer [S, T+1] bool     tokens that were sampled: the only ones that are scored
    valid  [S, T+1] bool     False is padding, which is neither seen nor routed
    logp_* [S, T] fp32       log-probability of token i+1 at the sampling temperature; anything outside answers

The sampler and this module are the same weights; with `replay` each token goes to the experts that the sampler chose, so
that a rounding difference cannot send it elsewhere (Rollout Routing Replay; see docs/post_training.md). Router gradients stay
alive, since only indices are replayed. Not here: the loss itself (policy.py), advantages, rollouts (rl/).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.config import GrpoConfig
from moe.layers.routing import Routing
from moe.model import Transformer
from moe.objectives.policy import policy_loss, token_logprobs


class Samples(NamedTuple):
    tokens: Tensor
    answer: Tensor
    valid: Tensor
    logp_rollout: Tensor
    """Of the sampler."""
    logp_old: Tensor
    """Of the policy that anchors the clip."""
    advantages: Tensor
    """[S]"""
    routings: dict[str, Tensor]
    """The sampler's expert choices, {layer: [S, T+1, K]}; -1 where nothing was routed."""
    logp_ref: Tensor | None = None

    def rows(self, at: Tensor | slice) -> Samples:
        """These samples alone."""
        cut: dict[str, Any] = {k: v if v is None else v[at] for k, v in self._asdict().items() if k != "routings"}
        return Samples(**cut, routings={name: chosen[at] for name, chosen in self.routings.items()})


class PolicyLosses(NamedTuple):
    loss: Tensor
    sums: dict[str, Tensor]
    """Detached, sum-reducible, except keys that start with `max_`."""
    logp: Tensor
    """[S, T], detached, 0 outside answers."""


class Reinforcement(nn.Module):
    """Policy loss of one micro-batch of samples."""

    def __init__(
        self,
        model: Transformer,
        loss: str = "dapo",
        clip_low: float | None = None,
        clip_high: float | None = None,
        beta: float = 0.0,
        kl: str = "k3_ratio",
        correction: str = "off",
        temperature: float = 1.0,
        max_length: int | None = None,
        replay: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.temperature, self.replay = model, temperature, replay
        self.options: dict[str, Any] = dict(loss=loss, clip_low=clip_low, clip_high=clip_high, beta=beta, kl=kl, correction=correction)
        self.options["max_length"] = max_length

    @classmethod
    def from_config(cls, model: Transformer, g: GrpoConfig, max_length: int) -> Reinforcement:
        return cls(
            model, g.loss, g.clip_low, g.clip_high, g.beta, g.kl, g.correction, g.temperature, max_length, g.replay
        )

    def forward(self, s: Samples, total_tokens: float, total_sequences: float) -> PolicyLosses:
        """total_*: answer tokens and samples of the whole minibatch, over micro-batches and ranks."""
        logp, entropy, records = self.score(s)
        mask = s.answer[:, 1:]
        loss, sums = policy_loss(
            logp, s.logp_old, s.advantages, mask, logp_rollout=s.logp_rollout, logp_ref=s.logp_ref,
            total_tokens=total_tokens, total_sequences=total_sequences, **self.options,
        )  # fmt: skip
        sums = {**sums, "entropy": entropy.sum(), **self._flips(s, records)}
        return PolicyLosses(loss, sums, logp.detach())

    def score(self, s: Samples, model: Transformer | None = None) -> tuple[Tensor, Tensor, dict[str, Routing]]:
        """-> log-probabilities [S, T] and entropies [S, T] of the answers' tokens, 0 elsewhere; routings.

        model: another one's opinion (a reference policy), by experts of its own choice."""
        own, model = model is None, self.model if model is None else model
        replay = {name: r[:, :-1].long() for name, r in s.routings.items()} if self.replay and own else None
        hidden, records = model.encode(s.tokens[:, :-1], routings=replay, mask=s.valid[:, :-1])
        mask = s.answer[:, 1:]
        found, spread = token_logprobs(hidden[mask], model.head.weight, s.tokens[:, 1:][mask], self.temperature)
        blank = torch.zeros(mask.shape, dtype=found.dtype, device=found.device)
        return blank.masked_scatter(mask, found), blank.masked_scatter(mask, spread), records

    def _flips(self, s: Samples, records: dict[str, Routing]) -> dict[str, Tensor]:
        """How many expert choices differ from the sampler's: 0 under replay."""
        flips, choices = s.tokens.new_zeros(()), s.tokens.new_zeros(())
        for name, routing in records.items():
            then, now = s.routings[name][:, :-1].long(), routing.experts
            routed = s.valid[:, :-1].unsqueeze(-1) & (then >= 0)
            kept = (now.unsqueeze(-1) == then.unsqueeze(-2)).any(-2)
            flips, choices = flips + (routed & ~kept).sum(), choices + routed.sum()
        return {"flips": flips, "choices": choices}


def check_loss(g: GrpoConfig, max_length: int) -> None:
    """Tell a wrong loss, clip, KL or correction before anything is trained or sampled."""
    one = torch.zeros(1, 1)
    policy_loss(
        one, one, one[0], one == 0, g.loss, g.clip_low, g.clip_high, one, one, g.beta, max_length,
        kl=g.kl, correction=g.correction,
    )  # fmt: skip
