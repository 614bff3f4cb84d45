"""Text out of the model: prefill in MLA's expanded form, then one token at a time in the absorbed form over the latents.

    prompts, ragged lists of ids -> Generated(tokens, logprobs, routings)

A step is one native call where native.py can take it, and `model.encode` elsewhere. A sequence is a function of weights,
prompt and seed: its draws come from a counter, not from a generator that others share, so neither its neighbours nor
their end move it. MTP takes no part, and none of its tensors is touched.
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
from moe.inference import native
from moe.inference.native import Stepped
from moe.layers.cache import LatentCache
from moe.model import Transformer


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
        return Generated(tokens, logprobs, record.experts(0) if record else None)
    now, cache = _prefill(model, prompts, max_new_tokens, record)
    take_step = native.stepper(model, cache, keep_routings) or _Stepper(model, cache)
    active, rows = list(range(batch)), torch.arange(batch, device=device)
    for step in range(max_new_tokens):
        drawn, logp = _draw(now, sampling, step)
        for i, token, lp in zip(active, drawn, logp, strict=True):
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
            active, drawn = [active[row] for row in going], [drawn[row] for row in going]
            rows, sampling = rows[kept], sampling._replace(keys=sampling.keys[kept])
        now = take_step(drawn, sampling, step + 1)
        if record:
            record.write(now.experts, rows, cache.lengths)
        cache.advance(1)
    longest = max(len(p) + len(t) for p, t in zip(prompts, tokens))
    return Generated(tokens, logprobs, record.experts(longest) if record else None)


def _prefill(
    model: Transformer, prompts: list[list[int]], room: int, record: _Record | None
) -> tuple[Stepped, LatentCache]:
    """-> logits after each prompt's last token [B, V], and the cache, with room for as many new tokens."""
    weight, longest = model.embed.weight, max(map(len, prompts))
    padded = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=weight.device)
    lengths = torch.tensor([len(p) for p in prompts], device=weight.device)
    mask = torch.arange(longest, device=weight.device) < lengths.unsqueeze(1)
    cache = LatentCache.for_model(model.config, len(prompts), longest + room, dtype=weight.dtype, device=weight.device)
    hidden, routings = model.encode(padded, mask=mask, cache=cache)
    rows = torch.arange(len(prompts), device=weight.device)
    experts = {name: routing.experts for name, routing in routings.items()}
    if record:
        record.write(experts, rows, cache.lengths, mask)
    cache.advance(lengths)
    last = hidden[rows, lengths - 1]
    return Stepped(F.linear(last, model.head.weight).float(), last, experts), cache


class _Stepper:
    """`native.Stepper` by PyTorch, for any model and device."""

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model, self.cache, self.head = model, cache, ops.for_few_rows(model.head.weight)

    def __call__(self, ids: list[int], sampling: Sampling, number: int) -> Stepped:
        tokens = torch.tensor(ids, device=self.head.device).view(len(self.cache.lengths), -1)
        with _light_products(len(ids) == 1):
            hidden, routings = self.model.encode(tokens, cache=self.cache)
        last = hidden.flatten(0, 1)
        experts = {name: routing.experts for name, routing in routings.items()}
        return Stepped(F.linear(last, self.head).float(), last, experts)


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
    """Expert choices of all steps, put in their places at the end: one call a layer."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.steps: list[tuple[dict[str, Tensor], Tensor, Tensor | None]] = []

    def write(self, chosen: dict[str, Tensor], rows: Tensor, starts: Tensor, mask: Tensor | None = None) -> None:
        """Choices [b, T, K] of sequences `rows` [b] from places `starts` [b] on; mask [b, T]: False was not routed."""
        if chosen:
            time = next(iter(chosen.values())).shape[1]
            places = (rows * self.capacity + starts).unsqueeze(1) + torch.arange(time, device=rows.device)
            self.steps.append((chosen, places, mask))

    def experts(self, length: int) -> dict[str, Tensor]:
        """By layer name, int16 [B, length, K], -1 where nothing was routed."""
        if not self.steps:
            return {}
        places = torch.cat([p.flatten() if mask is None else p[mask] for _, p, mask in self.steps])
        made = {}
        for name in self.steps[0][0]:
            ids = torch.cat(
                [(c[name].flatten(0, 1) if m is None else c[name][m]).to(torch.int16) for c, _, m in self.steps]
            )
            held = ids.new_full((self.batch * self.capacity, ids.shape[1]), -1)
            held[places] = ids
            made[name] = held.view(self.batch, self.capacity, -1)[:, :length]
        return made


# ------------------------------------------------------------------------------------------------------------- drawing


def _draw(now: Stepped, sampling: Sampling, step: int) -> tuple[list[int], list[float]]:
    """Ids and their log-probabilities, one a sequence."""
    if now.drawn is not None:
        return now.drawn, now.logprobs
    chosen, logp = _sample(now.logits, sampling, step)
    return chosen.tolist(), logp.tolist()


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
