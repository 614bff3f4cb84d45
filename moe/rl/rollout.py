"""Groups of sampled answers, as the update needs them: tokens, masks, log-probabilities, expert choices.

The sampler is the trained module itself. A sample's draws follow from (run seed, step, prompt, sample), so that answers
do not depend on how prompts are spread over ranks or batches. Masks come from the sampler's lengths, never from token
ids: padding may be a legal token. Not here: external engines, rewards (rewards.py), what is done with it (grpo.py).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from moe.data.tokenizer import Tokenizer
from moe.inference.decoding import generate
from moe.model import Transformer


class Rollouts(NamedTuple):
    """S = prompts x group_size samples, those of a prompt side by side; L the longest."""

    tokens: Tensor
    """[S, L] int64: prompt, answer, padding."""
    answer: Tensor
    """[S, L] bool: sampled tokens, end-of-text included."""
    valid: Tensor
    """[S, L] bool: prompt and answer."""
    logp: Tensor
    """[S, L-1] fp32: token i+1 under the sampler, 0 outside answers."""
    routings: dict[str, Tensor]
    """{layer: [S, L, K] int16}, -1 where nothing was routed."""
    new: list[list[int]]
    """Sampled ids of each."""
    truncated: list[bool]
    """No end-of-text within max_new_tokens."""


def rollout(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], group_size: int, max_new_tokens: int,
    temperature: float, seeds: list[int],
) -> Rollouts:  # fmt: skip
    """`group_size` answers to each prompt. seeds: one for each sample, in the order of the samples."""
    many = [p for p in prompts for _ in range(group_size)]
    drawn = generate(model, many, max_new_tokens, temperature, seeds, eos=tokenizer.eos, keep_routings=True)
    starts = torch.tensor([len(p) for p in many])
    lengths = starts + torch.tensor([len(new) for new in drawn.tokens])
    longest = int(lengths.max()) if many else 0
    device = model.embed.weight.device
    rows = [[*p, *new, *[tokenizer.pad] * (longest - len(p) - len(new))] for p, new in zip(many, drawn.tokens)]
    at = torch.arange(longest)
    valid = at < lengths.unsqueeze(1)
    answer = valid & (at >= starts.unsqueeze(1))
    logp = torch.zeros(len(many), max(longest - 1, 0))
    logp[answer[:, 1:]] = torch.tensor([lp for row in drawn.logprobs for lp in row])
    ended = [bool(new) and new[-1] == tokenizer.eos for new in drawn.tokens]
    tokens, answer, valid, logp = (t.to(device) for t in (torch.tensor(rows), answer, valid, logp))
    return Rollouts(tokens, answer, valid, logp, drawn.routings, drawn.tokens, [not done for done in ended])


def sample_seed(*place: int) -> int:
    """63 bits for one sample, from (run seed, step, prompt, sample)."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "little") >> 1
