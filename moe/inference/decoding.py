"""Text out of the model: prefill in MLA's expanded form, then one token at a time in the absorbed form over the latents.

    prompts, ragged lists of ids -> Generated(tokens, logprobs, routings)

A sequence is a function of weights, prompt and seed: its draws come from a counter, not from a generator that others
share, so neither its neighbours nor their end move it. MTP takes no part, and none of its tensors is touched.
Source of the counter: splitmix64 (Steele, Lea, Flood, OOPSLA 2014). Not here: drafting with MTP (speculative.py, later).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import ops
from moe.config import UserError
from moe.layers.cache import LatentCache
from moe.model import Routings, Transformer


class Generated(NamedTuple):
    tokens: list[list[int]]
    """New ids of each prompt, end-of-text included when it was drawn."""
    logprobs: list[list[float]]
    """Log-probability of each new id under the distribution it was drawn from (temperature and top-p applied)."""
    routings: dict[str, Tensor] | None = None
    """With keep_routings: experts by layer name, int16 [B, S, K], for the token at place t of prompt + new ids; -1 where
    nothing was routed: past a sequence's end, and its last id. `model(tokens, routings=...)` replays them."""


class Sampling(NamedTuple):
    """How ids are drawn. keys [B] int64: the stream of each sequence, see `stream_keys`."""

    temperature: float
    top_p: float
    keys: Tensor


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    speculative: bool = False,
    *,
    top_p: float = 1.0,
    eos: int | None = None,
    stream: Callable[[int, int], None] | None = None,
    keep_routings: bool = False,
) -> Generated:
    """Continue ragged prompts (lists of ids). temperature=0 is greedy; eos ends a sequence.

    seed: prompt i draws from the stream (seed, i); or one seed a prompt, then from (seed[i], 0) in whatever batch.
    stream(i, token) is called as each token is drawn. Raises UserError for an empty prompt, an unknown id, more tokens
    than `max_position_embeddings`, or logits that are not finite.
    """
    if speculative:
        raise UserError("speculative=True is not available yet; use speculative=False, the output is the same")
    _check(model, prompts, max_new_tokens, temperature, top_p, seed, keep_routings)
    sampling = Sampling(temperature, top_p, stream_keys(seed, len(prompts)).to(model.embed.weight.device))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():  # a step is made of many small calls, and each is 12 % cheaper than in no_grad
            out = _decode(model, prompts, max_new_tokens, sampling, eos, stream, keep_routings)
    finally:
        model.train(training)
    if out.routings is None:
        return out
    return out._replace(routings={name: chosen.clone() for name, chosen in out.routings.items()})  # ordinary tensors


def _decode(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos: int | None,
    stream: Callable[[int, int], None] | None,
    keep_routings: bool,
) -> Generated:
    device, batch = model.embed.weight.device, len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    record = _Record(batch, max(map(len, prompts), default=0) + max_new_tokens) if keep_routings else None
    if not batch or max_new_tokens == 0:
        return Generated(tokens, logprobs, record.experts if record else None)
    last, cache = _prefill(model, prompts, max_new_tokens, record)
    head = ops.for_few_rows(model.head.weight)
    active, rows = list(range(batch)), torch.arange(batch, device=device)
    for step in range(max_new_tokens):
        chosen, logp = _sample(F.linear(last, head).float(), sampling, step)
        for i, token, lp in zip(active, chosen.tolist(), logp.tolist(), strict=True):
            if math.isnan(lp):
                raise UserError(f"prompt {i}: the model's logits are not finite at token {step}; check its weights")
            tokens[i].append(token)
            logprobs[i].append(lp)
            if stream:
                stream(i, token)
        going = [row for row, i in enumerate(active) if eos is None or tokens[i][-1] != eos]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(active):  # finished sequences leave the batch
            kept = torch.tensor(going, device=device)
            cache.keep(kept)
            active = [active[row] for row in going]
            rows, chosen, sampling = rows[kept], chosen[kept], sampling._replace(keys=sampling.keys[kept])
        with _light_products(len(active) == 1):
            hidden, routings = model.encode(chosen.unsqueeze(1), cache=cache)
        if record:
            record.write(routings, rows, cache.positions(1))
        cache.advance(1)
        last = hidden[:, -1]
    return Generated(
        tokens, logprobs, record.cut(max(len(p) + len(t) for p, t in zip(prompts, tokens))) if record else None
    )


def _prefill(
    model: Transformer, prompts: list[list[int]], room: int, record: _Record | None
) -> tuple[Tensor, LatentCache]:
    """-> state of each prompt's last token [B, D], and the cache, with room for as many new tokens."""
    weight, longest = model.embed.weight, max(map(len, prompts))
    padded = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=weight.device)
    lengths = torch.tensor([len(p) for p in prompts], device=weight.device)
    places = torch.arange(longest, device=weight.device).expand_as(padded)
    mask = places < lengths.unsqueeze(1)
    cache = LatentCache.for_model(model.config, len(prompts), longest + room, dtype=weight.dtype, device=weight.device)
    hidden, routings = model.encode(padded, mask=mask, cache=cache)
    rows = torch.arange(len(prompts), device=weight.device)
    if record:
        record.write(routings, rows, places, mask)
    cache.advance(lengths)
    return hidden[rows, lengths - 1], cache


@contextmanager
def _light_products(wanted: bool) -> Iterator[None]:
    """oneDNN sets a bf16 product up for longer than a single row of it takes (18 against 12 us, measured): there
    PyTorch's own kernels answer, with the same fp32 sums."""
    before = torch.backends.mkldnn.set_flags(False)[0] if wanted else None
    try:
        yield
    finally:
        if before is not None:
            torch.backends.mkldnn.set_flags(before)


class _Record:
    """Expert choices by layer, int16 [B, S, K], -1 where nothing was routed."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.experts: dict[str, Tensor] = {}

    def write(self, routings: Routings, rows: Tensor, places: Tensor, mask: Tensor | None = None) -> None:
        """Choices [b, T, K] of sequences `rows` [b] at `places` [b, T]; mask [b, T]: False was not routed."""
        for name, routing in routings.items():
            chosen = routing.experts.to(torch.int16)
            if name not in self.experts:
                self.experts[name] = chosen.new_full((self.batch, self.capacity, chosen.shape[-1]), -1)
            if mask is not None:
                chosen = chosen.masked_fill(~mask.unsqueeze(-1), -1)
            self.experts[name][rows.unsqueeze(1), places] = chosen

    def cut(self, length: int) -> dict[str, Tensor]:
        return {name: chosen[:, :length] for name, chosen in self.experts.items()}


# ------------------------------------------------------------------------------------------------------------- drawing


def _sample(logits: Tensor, sampling: Sampling, step: int) -> tuple[Tensor, Tensor]:
    """[B, V] logits -> ids [B] and their log-probabilities under the distribution drawn from."""
    temperature, top_p, keys = sampling
    if temperature == 0:
        chosen = logits.argmax(-1)
        return chosen, logits.log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
    logp = (logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        logp = logp.masked_fill(torch.zeros_like(logp, dtype=torch.bool).scatter(1, order, before >= top_p), -torch.inf)
        logp = logp.log_softmax(-1)
    cumulative = torch.cumsum(logp.exp(), -1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, uniform(keys, step).unsqueeze(1) * cumulative[:, -1:], right=True)
    chosen = chosen.clamp_max(logits.shape[1] - 1)  # reached by NaN only
    return chosen.squeeze(1), logp.gather(1, chosen).squeeze(1)


# splitmix64's constants as int64, whose sums and products wrap to the bits of its unsigned arithmetic
GOLDEN, MIX = 0x9E3779B97F4A7C15 - 2**64, (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def stream_keys(seed: int | Sequence[int], count: int) -> Tensor:
    """[count] int64: the stream (seed, i) of each prompt, or (seed[i], 0)."""
    seeds, places = (seed, [0] * count) if isinstance(seed, Sequence) else ([seed] * count, range(count))
    base = torch.tensor([_int64(s) for s in seeds], dtype=torch.int64)
    return _mixed(_mixed(base + GOLDEN) + torch.tensor([*places], dtype=torch.int64) * GOLDEN)


def uniform(keys: Tensor, step: int) -> Tensor:
    """[B] streams -> number `step` of each, in [0, 1), float64. 52 bits: times a total it stays below the total."""
    return _shifted(_mixed(keys + _int64((step + 1) * GOLDEN)), 12).double() * 2.0**-52


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * MIX[0]
    z = (z ^ _shifted(z, 27)) * MIX[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _int64(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _check(model, prompts, max_new_tokens, temperature, top_p, seed, keep_routings) -> None:
    c = model.config
    if max_new_tokens < 0 or not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: expected max_new_tokens >= 0, "
            "temperature >= 0 and 0 < top_p <= 1"
        )
    if isinstance(seed, Sequence) and len(seed) != len(prompts):
        raise UserError(f"seed holds {len(seed)} numbers for {len(prompts)} prompts; give one number, or one a prompt")
    if keep_routings and c.n_routed_experts > 2**15 - 1:
        raise UserError(
            f"keep_routings holds 32,767 experts, model.n_routed_experts={c.n_routed_experts}; leave it out"
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
