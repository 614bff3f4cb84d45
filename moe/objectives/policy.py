"""Policy gradients: losses of GRPO and its relatives, group advantages, token log-probabilities. Pure functions.

    logp [S, T]             sampled tokens under the current policy, fp32 or wider; the only input with a gradient
    logp_old [S, T]         under the policy that anchors the clip
    logp_rollout [S, T]     under the sampler, which should be the anchor and may differ by rounding or age
    logp_ref [S, T]         under the policy that the KL holds on to
    advantages [S]          of whole sequences
    mask [S, T] bool        tokens that count; anything may stand elsewhere, NaN included

A loss is a row of LOSSES: level of the ratio x surrogate x aggregation. At ratio 1 every surrogate has the gradient
-A grad logp, so on-policy they differ in the weights of tokens alone.

Sources: GRPO (arXiv 2402.03300) 4.1, DAPO (2503.14476), Dr. GRPO (2503.20783), GSPO (2507.18071), CISPO (MiniMax-M1,
2506.13585), SAPO (2511.20347), dual clip (1912.09729); KL estimators: Schulman, "Approximating KL divergence"; KL times
ratio: DeepSeek-V3.2. Not here: advantages (advantages.py), critics, entropy bonus, rewards, refilling of dead groups, sequence-level truncation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.config import UserError, nearest

LARGEST = 20.0  # log-ratios are clamped to +-this before exp: e^20 is finite in fp32, and so is its square


def policy_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: str = "dapo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    logp_rollout: Tensor | None = None,
    logp_ref: Tensor | None = None,
    beta: float = 0.0,
    max_length: int | None = None,
    total_tokens: float | Tensor | None = None,
    total_sequences: float | Tensor | None = None,
    *,
    kl: str = "k3_ratio",
    correction: str = "off",
    correction_bounds: tuple[float, float] | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> (scalar loss, detached figures). Shapes are in the module's docstring.

    total_*: counts of the whole minibatch over micro-batches and ranks (None: this call's own), so that the losses add
    up to the minibatch's. A sequence counts if any of its tokens does. Clips are distances from ratio 1; None: the
    loss's own. dual_clip bounds the ratio of negative advantages. A correction weighs the KL too.

    Figures are sums: tokens, sequences, clip_low and clip_high (tokens that a clip stopped); kl; mismatch, mismatch_k3;
    weights, weights_squared, rejected; each where its input was given. Not sums: max_ratio, max_mismatch.
    """
    rule, fix = _entry("grpo.loss", loss, LOSSES), _entry("grpo.correction", correction, CORRECTIONS)
    divergence, clip = _entry("grpo.kl", kl, KLS), _clip(rule, loss, clip_low, clip_high, dual_clip)
    _check_shapes(logp, advantages, mask, logp_old=logp_old, logp_rollout=logp_rollout, logp_ref=logp_ref)
    for name, value, low in (("beta", beta, 0), ("max_length", max_length, 1)):
        if value is not None and not value >= low:
            raise UserError(f"policy_loss: {name}={value} must be at least {low}")
    _needs(f"grpo.loss={loss!r} divides by a constant length", rule.aggregate is fixed_length, max_length=max_length)
    _needs(f"grpo.correction={correction!r} weighs by the sampler", fix is not None, logp_rollout=logp_rollout)
    _needs(f"grpo.beta={beta} pulls to a reference policy", beta != 0, logp_ref=logp_ref)

    def kept(x: Tensor) -> Tensor:  # selected, not multiplied: 0 * NaN is NaN
        return torch.where(mask, x.to(logp.dtype), 0)

    now, old, advantage = kept(logp), kept(logp_old.detach()), kept(advantages.detach().unsqueeze(1))
    ratio = rule.ratio(now - old, mask)
    each, low, high = rule.surrogate(ratio, now, advantage, clip)  # 0 outside the mask, where the advantage is 0
    figures = {"tokens": mask.sum(), "sequences": mask.any(1).sum(), "clip_low": low.sum(), "clip_high": high.sum()}
    figures["max_ratio"] = _largest(kept(ratio))
    if logp_ref is not None:
        penalty = divergence((kept(logp_ref.detach()) - now).clamp(-LARGEST, LARGEST), token_ratio(now - old, mask))
        figures["kl"] = penalty.sum()
        each = each + beta * penalty if beta else each
    if logp_rollout is not None:
        sampler = kept(logp_rollout.detach())
        figures |= _mismatch(now - sampler)
        if fix:
            weight = kept(fix.weight(fix.ratio(old - sampler, mask), *(correction_bounds or fix.bounds)))
            each = each * weight
            figures |= _used(weight, mask)
    tokens = _total(total_tokens, figures["tokens"], logp)
    sequences = _total(total_sequences, figures["sequences"], logp)
    total = rule.aggregate(each, mask, tokens, sequences, max_length)
    return total, {name: value.detach() for name, value in figures.items()}


def _total(given: float | Tensor | None, own: Tensor, like: Tensor) -> Tensor:
    """Scalar divisor, at least 1: where nothing counts the loss is 0."""
    return torch.as_tensor(own if given is None else given, dtype=like.dtype, device=like.device).clamp_min(1)


# -------------------------------------------------------------------------------------------------------------- ratios
# (log-ratio [S, T], 0 outside the mask; mask) -> [S, T]


def token_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST, LARGEST).exp()


def mean_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Geometric mean over a sequence; each of its tokens gets 1/length of the gradient."""
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return token_ratio(mean, mask).expand_as(log_ratio)


def product_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Of the whole sequence."""
    return token_ratio(log_ratio.sum(1, keepdim=True), mask).expand_as(log_ratio)


# ---------------------------------------------------------------------------------------------------------- surrogates
# (ratio, logp, advantages, all [S, T]; clip) -> loss of each token; where the lower, where the upper clip stops it


class Clip(NamedTuple):
    low: float
    high: float
    dual: float


def clipped(ratio: Tensor, logp: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """PPO: no gradient for a ratio that has already gone past the clip the way its advantage points."""
    inside = ratio.clamp(1 - clip.low, 1 + clip.high)
    each = -torch.minimum(ratio.clamp(max=clip.dual) * advantages, inside * advantages)
    high = (advantages > 0) & (ratio > 1 + clip.high) | (advantages < 0) & (ratio > clip.dual)
    return each, (advantages < 0) & (ratio < 1 - clip.low), high


def weighted(ratio: Tensor, logp: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO: the clipped ratio is a constant weight, so every token keeps a gradient. Bound 1 + high (in TRL: high)."""
    each = -ratio.detach().clamp(max=1 + clip.high) * advantages * logp
    return each, torch.zeros_like(ratio, dtype=torch.bool), (ratio > 1 + clip.high) & (advantages != 0)


def soft(ratio: Tensor, logp: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """SAPO: a sigmoid gate in place of a clip, a little steeper for negative advantages; temperatures of the paper."""
    tau = torch.where(advantages > 0, torch.ones_like(ratio), 1.05)
    none = torch.zeros_like(ratio, dtype=torch.bool)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages, none, none


# -------------------------------------------------------------------------------------------------------- aggregations
# (loss of each token [S, T], 0 outside the mask; mask; counts of the minibatch; max_length) -> scalar


def token_mean(each: Tensor, mask: Tensor, tokens: Tensor, sequences: Tensor, max_length: int | None) -> Tensor:
    return each.sum() / tokens


def sequence_mean(each: Tensor, mask: Tensor, tokens: Tensor, sequences: Tensor, max_length: int | None) -> Tensor:
    """Every sequence weighs the same: a token of a long one less."""
    return (each.sum(1) / mask.sum(1).clamp_min(1)).sum() / sequences


def fixed_length(each: Tensor, mask: Tensor, tokens: Tensor, sequences: Tensor, max_length: int | None) -> Tensor:
    return each.sum() / (sequences * max_length)


def micro_mean(each: Tensor, mask: Tensor, tokens: Tensor, sequences: Tensor, max_length: int | None) -> Tensor:
    """Of this call's tokens, whatever the totals: depends on how the minibatch is cut. For parity with TRL only."""
    return each.sum() / mask.sum().clamp_min(1)


# ------------------------------------------------------------------------------------------------------------- figures


def _mismatch(gap: Tensor) -> dict[str, Tensor]:
    """logp - logp_rollout -> sums of |gap| and of k3 (KL of sampler to trainer), largest |gap|.

    Before the first update the current policy is the anchor; later the gap also holds what training moved.
    """
    near = gap.clamp(-LARGEST, LARGEST)
    return {
        "mismatch": gap.abs().sum(),
        "mismatch_k3": (near.exp() - near - 1).sum(),
        "max_mismatch": _largest(gap.abs()),
    }


def _used(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """For the effective share of the tokens, (sum w)^2 / (tokens * sum w^2), and the rejected one."""
    rejected = (mask & (weight == 0)).sum()
    return {"weights": weight.sum(), "weights_squared": (weight**2).sum(), "rejected": rejected}


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())


# -------------------------------------------------------------------------------------------------------------- tables


class Rule(NamedTuple):
    ratio: Callable[[Tensor, Tensor], Tensor]
    """Its level: token_ratio, or mean_ratio of the sequence."""
    surrogate: Callable[[Tensor, Tensor, Tensor, Clip], tuple[Tensor, Tensor, Tensor]]
    aggregate: Callable[[Tensor, Tensor, Tensor, Tensor, int | None], Tensor]
    clip_low: float | None
    """Default distance below ratio 1; None: this loss has no such clip."""
    clip_high: float | None


class Correction(NamedTuple):
    """Importance weight anchor / sampler, a constant for the gradient."""

    ratio: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Tensor, float, float], Tensor]
    bounds: tuple[float, float]


def _zeroed(weight: Tensor, low: float, high: float) -> Tensor:
    return torch.where((weight >= low) & (weight <= high), weight, 0)


LOSSES = {
    "grpo": Rule(token_ratio, clipped, sequence_mean, 0.2, 0.2),
    "dapo": Rule(token_ratio, clipped, token_mean, 0.2, 0.28),
    "dr_grpo": Rule(token_ratio, clipped, fixed_length, 0.2, 0.2),  # its advantages are not divided by a std
    "bnpo": Rule(token_ratio, clipped, micro_mean, 0.2, 0.2),
    "gspo": Rule(mean_ratio, clipped, sequence_mean, 3e-4, 4e-4),
    "cispo": Rule(token_ratio, weighted, token_mean, None, 4.0),
    "sapo": Rule(token_ratio, soft, sequence_mean, None, None),
}

KLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # d = logp_ref - logp, ratio -> estimate of each token
    "k1": lambda d, ratio: -d,  # no gradient on average
    "k2": lambda d, ratio: d**2 / 2,  # right gradient, wrong value
    "k3": lambda d, ratio: d.exp() - d - 1,  # right value, gradient of KL(ref || policy)
    "k1_ratio": lambda d, ratio: ratio * -d,  # both right, here and below: of KL(policy || ref)
    "k3_ratio": lambda d, ratio: ratio * (d.exp() - d - 1),
}

CORRECTIONS: dict[str, Correction | None] = {
    "off": None,
    "token_tis": Correction(token_ratio, torch.clamp, (0.0, 2.0)),
    "token_mis": Correction(token_ratio, _zeroed, (0.5, 2.0)),
    "seq_mis": Correction(product_ratio, _zeroed, (0.0, 3.0)),
    "detached": Correction(token_ratio, torch.clamp, (0.0, math.inf)),
}


def _entry(knob: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"{knob}={name!r} is not one of {list(table)}{nearest(name, table)}")
    return table[name]


def _clip(rule: Rule, loss: str, low: float | None, high: float | None, dual: float | None) -> Clip:
    """What was asked for, or the rule's own; a clip that the rule would ignore is refused."""
    for side, asked, own in (("low", low, rule.clip_low), ("high", high, rule.clip_high)):
        if asked is not None and own is None:
            raise UserError(f"grpo.clip_{side}={asked}: grpo.loss={loss!r} has no such clip; leave it null")
        if asked is not None and not asked > 0:
            raise UserError(f"grpo.clip_{side}={asked} must be above 0: it is a distance from ratio 1")
    low, high = rule.clip_low if low is None else low, rule.clip_high if high is None else high
    if dual is not None and (rule.surrogate is not clipped or dual <= 1 + high):
        raise UserError(
            f"dual_clip={dual} needs a loss with a clipped ratio and a value above 1 + clip_high; leave it out"
        )
    return Clip(*(math.inf if bound is None else bound for bound in (low, high, dual)))


def _needs(why: str, wanted: bool, **given: Any) -> None:
    ((name, value),) = given.items()
    if wanted and value is None:
        raise UserError(f"{why}; give {name}, or choose another value")


def _check_shapes(logp: Tensor, advantages: Tensor, mask: Tensor, **others: Tensor | None) -> None:
    """A wrong shape would broadcast, and train on something else."""
    given = {"logp": logp, "mask": mask} | {name: x for name, x in others.items() if x is not None}
    if logp.ndim != 2 or any(x.shape != logp.shape for x in given.values()) or advantages.shape != logp.shape[:1]:
        found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
        raise UserError(f"policy_loss: {found} must all be [S, T], and advantages {tuple(advantages.shape)} [S]")


# --------------------------------------------------------------------------------------------------- log-probabilities


def token_logprobs(
    hidden: Tensor, head: Tensor | None, targets: Tensor, temperature: float = 1.0, chunk: int = 2**22
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy (detached) of its distribution, softmax(logits / temperature).

    hidden [..., D], head [V, D] (or logits [..., V], None), targets [...] int64 -> [...], [...] fp32 or wider. `chunk`
    logits exist at a time; the backward pass makes them again.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head = None if head is None else head.to(wide)
    rows = max(1, chunk // (hidden.shape[-1] if head is None else head.shape[0]))
    states, wanted = hidden.reshape(-1, hidden.shape[-1]).split(rows), targets.reshape(-1).split(rows)

    def scored(h: Tensor, weight: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = h.to(wide) if weight is None else h.to(wide) @ weight.t()
        every = (logits / temperature).log_softmax(-1)
        entropy = torch.special.entr(every.detach().exp()).sum(-1)  # entr(0) is 0, for logits of -inf
        return every.gather(-1, target.unsqueeze(-1)).squeeze(-1), entropy

    if len(states) > 1:  # one piece is small enough to keep
        parts = [
            checkpoint(scored, h, head, t, use_reentrant=False, preserve_rng_state=False)
            for h, t in zip(states, wanted)
        ]
    else:
        parts = [scored(h, head, t) for h, t in zip(states, wanted)]
    logp, entropy = (torch.cat(found).view(targets.shape) for found in zip(*parts))
    return logp, entropy
