"""Text out of the model: prefill in MLA's expanded form, then one token at a time in the absorbed form over the latents.

MTP takes no part. Each sequence draws from its own generator, so a prompt's continuation does not depend on its batch.
Not here: drafting with MTP (speculative.py, later).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import UserError
from moe.layers.cache import LatentCache
from moe.model import Transformer


class Generated(NamedTuple):
    tokens: list[list[int]]
    """New ids of each prompt, end-of-text included when it was drawn."""
    logprobs: list[list[float]]
    """Log-probability of each new id under the distribution it was drawn from (temperature and top-p applied)."""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    speculative: bool = False,
    *,
    top_p: float = 1.0,
    eos: int | None = None,
) -> Generated:
    """Continue ragged prompts (lists of ids). temperature=0 is greedy; eos ends a sequence. Raises UserError for an
    empty prompt, an unknown id, or more tokens than `max_position_embeddings`."""
    if speculative:
        raise UserError("speculative=True is not available yet; use speculative=False, the output is the same")
    _check(model, prompts, max_new_tokens, temperature, top_p)
    device = model.embed.weight.device
    training = model.training
    model.eval()
    try:
        return _decode(model, prompts, max_new_tokens, temperature, seed, top_p, eos, device)
    finally:
        model.train(training)


def _decode(model, prompts, max_new_tokens, temperature, seed, top_p, eos, device) -> Generated:
    batch, longest = len(prompts), max(map(len, prompts), default=0)
    tokens = [[] for _ in prompts]
    logprobs = [[] for _ in prompts]
    if not batch or max_new_tokens == 0:
        return Generated(tokens, logprobs)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    padded = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    cache = LatentCache.for_model(
        model.config, batch, longest + max_new_tokens, dtype=model.embed.weight.dtype, device=device
    )
    hidden, _ = model.encode(padded, mask=mask, cache=cache)
    cache.advance(lengths)
    logits = model.head(hidden[torch.arange(batch, device=device), lengths - 1])
    draws = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(batch)]
    active = list(range(batch))
    for step in range(max_new_tokens):
        chosen, logp = _sample(logits.float().cpu(), temperature, top_p, [draws[i] for i in active])
        for i, token, lp in zip(active, chosen.tolist(), logp.tolist(), strict=True):
            tokens[i].append(token)
            logprobs[i].append(lp)
        going = [row for row, i in enumerate(active) if eos is None or tokens[i][-1] != eos]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(active):  # finished sequences leave the batch
            cache.keep(torch.tensor(going, device=device))
            active = [active[row] for row in going]
        last = torch.tensor([[tokens[i][-1]] for i in active], device=device)
        hidden, _ = model.encode(last, cache=cache)
        cache.advance(1)
        logits = model.head(hidden[:, -1])
    return Generated(tokens, logprobs)


def _sample(logits: Tensor, temperature: float, top_p: float, draws: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """[B, V] -> ids [B] and their log-probabilities under the distribution drawn from."""
    if temperature == 0:
        logp = logits.log_softmax(-1)
        chosen = logits.argmax(-1)
        return chosen, logp.gather(1, chosen.unsqueeze(1)).squeeze(1)
    logp = (logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        logp = logp.masked_fill(torch.zeros_like(logp, dtype=torch.bool).scatter(1, order, before >= top_p), -torch.inf)
        logp = logp.log_softmax(-1)
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in draws])
    cumulative = logp.double().exp().cumsum(-1)
    chosen = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    chosen = chosen.clamp_max(logits.shape[1] - 1)
    return chosen, logp.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _check(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
    c = model.config
    if max_new_tokens < 0 or not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: expected max_new_tokens >= 0, "
            "temperature >= 0 and 0 < top_p <= 1"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty; give at least one token, such as the tokenizer's bos")
        if min(prompt) < 0 or max(prompt) >= c.vocab_size:
            raise UserError(f"prompt {i} holds a token outside [0, {c.vocab_size}); was it made by this tokenizer?")
        if len(prompt) + max_new_tokens > c.max_position_embeddings:
            raise UserError(
                f"prompt {i} of {len(prompt)} tokens plus max_new_tokens={max_new_tokens} exceeds "
                f"model.max_position_embeddings={c.max_position_embeddings}; shorten one of them"
            )
