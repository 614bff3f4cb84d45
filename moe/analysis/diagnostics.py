"""What experts do, in a few numbers a step, and a check of the faults that a falling loss hides.

    router_health(balance, health, biases, k) -> {"moe/maxvio": ..., ...}     one transfer from the device
    HealthCheck(config)                       -> lists of messages, empty when all is well
    maxvio_floor(tokens, k, experts)          -> MaxVio that no router can beat, but by luck

Every check stands for a fault that public code trained through unnoticed: gates that are constant because one expert is
chosen and normalised, experts zero after a meta-device initialisation, expert gradients from rows of other experts,
MTP fed the token it should predict, losses with something else mixed in.
MaxVio = (largest load - mean load) / mean load: arXiv 2408.15664.
Not here: plots (chart.py), and what to do about a message: the trainer prints it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.layers.balance import State, routers
from moe.layers.moe import MoE
from moe.layers.routing import Routing

Counts = dict[str, Tensor]
Grads = dict[str, Tensor | None]
IDLE_STEPS = 100
MIN_TOKENS = 8  # of an expert, before a zero gradient is a fault: a document's last token has no target, so none flows
DEAD_ROUTER = 1e-5  # see `_relative`: healthy routers measured 6e-3 to 9e-2, constant gates 1e-9 (rounding errors)


# ------------------------------------------------------------------------------------------------------ router health


@torch.no_grad()
def router_health(
    balance: dict[str, State], health: dict[str, dict[str, Tensor]], biases: dict[str, Tensor], k: int
) -> dict[str, float]:
    """Metrics of one optimizer step from sums over its micro-steps and ranks. k: experts a token goes to.

    balance: `counts` [E] by layer. health: `Routing.stats` by layer; may be empty (evaluation). biases: [E] by layer.
    """
    if not balance:
        return {}
    rows = {layer: _load(state["counts"]) for layer, state in balance.items()}
    columns = ["maxvio", "dead", "load_entropy"]
    for layer, row in rows.items():
        missing = row.new_tensor(float("nan"))
        bias, stats = biases.get(layer), health.get(layer)
        spread = missing if bias is None else (bias.max() - bias.min()).to(row)
        margin = kept = missing
        if stats:
            tokens = stats["tokens"].to(row).clamp_min(1)
            margin, kept = stats["margin"].to(row) / tokens, stats["kept"].to(row) / (k * tokens)
        rows[layer] = torch.cat([row, torch.stack([spread, margin, 1 - kept])])
    columns += ["bias_range", "margin", "intervention"]
    values = torch.stack(list(rows.values())).tolist()  # the one synchronisation
    known = {name: [v for v in column if not math.isnan(v)] for name, column in zip(columns, zip(*values))}
    combine: dict[str, Callable[[list[float]], float]] = {"dead": sum, "bias_range": max}
    result = {f"moe/{name}": float(combine.get(name, _mean)(column)) for name, column in known.items() if column}
    result["moe/maxvio_worst"] = max(known["maxvio"])
    return result | {f"moe/maxvio/{layer}": row[0] for layer, row in zip(rows, values)}


def _load(counts: Tensor) -> Tensor:
    """[E] tokens -> MaxVio, experts without tokens, entropy of the load (1: all equal)."""
    load = counts.double()  # exact up to 2^53 tokens
    total = load.sum().clamp_min(1)
    maxvio = load.max() * load.numel() / total - 1
    entropy = torch.special.entr(load / total).sum() / math.log(max(load.numel(), 2))
    return torch.stack([maxvio, (load == 0).sum().double(), entropy])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """While the block lasts: what each MoE layer decided in its latest forward pass, by layer."""
    seen: dict[str, Routing] = {}

    def keep(layer: str) -> Callable:
        return lambda module, inputs, output: seen.__setitem__(layer, output[1])

    hooks = [moe.register_forward_hook(keep(layer)) for layer, (_, moe) in _moe_layers(model).items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def maxvio_floor(tokens: int, k: int, experts: int) -> float:
    """Expected MaxVio when each token takes k of `experts` at random: what sampling leaves of perfect balance.

    Loads are nearly normal with variance T p (1 - p), p = k/E, and share a fixed sum, so their expected largest is
    sqrt(E / (E-1)) times that of E independent ones. Within 3 % of a simulation from 20 tokens an expert on; a little
    low below. Tokens of real text come in runs of the same kind, so a real router's floor is higher.
    """
    if experts < 2 or k >= experts or tokens < 1:
        return 0.0
    share = k / experts
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    below = torch.special.ndtr(z) ** experts  # distribution of the largest of E normals; its mean, by parts:
    largest = torch.trapezoid(torch.heaviside(z, z.new_tensor(0.5)) - below, z)
    return float(largest) * math.sqrt((1 - share) / (tokens * share) * experts / (experts - 1))


# ------------------------------------------------------------------------------------------------------- health check


class HealthCheck:
    """Looks for silent faults. Each method returns messages of one line; a lasting fault is told once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.steps = 0
        self.idle_steps: Counts = {}  # steps since each expert's last token; with `ratios`, what a checkpoint keeps
        self._told: dict[str, set[int]] = {}
        self.ratios: deque[float] = deque(maxlen=20)
        self._ratio_told = False

    def first_loss(self, loss: float, vocab: int | None = None) -> list[str]:
        """Loss of step 1 of a fresh model, in nats: near ln V, since no target can be known yet.

        Expected: ln V + D std^2 / 2, because normed states give logits of variance D std^2. A tied head adds, at
        most, the logit std D of a token for itself. Ten per cent either way hold the noise of a small batch.
        """
        c = self.config
        uniform = math.log(vocab or c.vocab_size)
        expected = uniform + c.hidden_size * c.init_std**2 / 2
        if c.tie_word_embeddings:
            own = c.init_std * c.hidden_size - uniform
            expected += max(own, 0) + math.log1p(math.exp(-abs(own)))
        low, high = 0.9 * uniform, 1.1 * expected
        told = f"first loss {loss:.3f} is outside {low:.2f}..{high:.2f} (ln V = {uniform:.3f})"
        if not math.isfinite(loss):
            return [f"first loss is {loss}: the forward pass overflows; check initialisation and input ids"]
        if loss < low:
            return [f"{told}: the model sees its targets, or the divisor counts too many; check the shift by one"]
        if loss > high:
            return [f"{told}: weights start too large, or another loss is mixed in; check model.initializer_range"]
        return []

    def gradients(
        self,
        model: nn.Module,
        counts_by_layer: Counts,
        mtp: bool = True,
        grads: Grads | None = None,
        min_tokens: int = MIN_TOKENS,
    ) -> list[str]:
        """After the backward pass of a whole step, before the optimizer: the gradient of every parameter.

        model: unwrapped. counts_by_layer: tokens of each expert in that step, over all micro-steps and ranks. mtp:
        whether the MTP loss took part. grads: by parameter name, where an engine keeps them apart from `.grad`.
        min_tokens: fewer may all stand where no target is, so that a zero gradient is right.
        """
        wanted = [n for n, p in model.named_parameters() if p.requires_grad and (mtp or not n.startswith("mtp."))]
        have = dict(grads) if grads is not None else {n: p.grad for n, p in model.named_parameters()}
        layers = {k: at for k, at in _moe_layers(model).items() if k in counts_by_layer}
        experts = {f"{prefix}experts.{which}" for prefix, _ in layers.values() for which in ("w13", "w2")}
        told = [
            f"{name} has no gradient: it takes no part in the loss; check the forward pass, or freeze it"
            for name in wanted
            if have.get(name) is None
        ]
        left = {n: g for n in wanted if n not in experts and (g := have.get(n)) is not None}
        largest = [torch.linalg.vector_norm(g, ord=float("inf")).float() for g in left.values()]
        for name, size in zip(left, torch.stack(largest).tolist() if largest else [], strict=True):
            if not math.isfinite(size):
                told.append(f"{name} has a gradient that is not finite: look for overflow there, or lower optim.lr")
            elif size == 0 and not name.endswith("router.weight"):  # looked at more closely below
                told.append(f"{name} has a gradient of zeros: its output does not reach the loss; check its use")
        for layer, (prefix, moe) in layers.items():
            told += self._experts(prefix, moe, counts_by_layer[layer], have, min_tokens)
            told += self._router(prefix, moe, have)
        return told

    def _experts(self, prefix: str, moe: MoE, counts: Tensor, grads: Grads, min_tokens: int) -> list[str]:
        told = []
        for which in ("w13", "w2"):
            name = f"{prefix}experts.{which}"
            if (grad := grads.get(name)) is None:
                continue
            size = _largest(grad)  # not the norm: its squares underflow
            silent = (counts >= min_tokens) & (size == 0)
            wild, leaking = ~torch.isfinite(size), (counts == 0) & (size > 0)
            if bool(wild.any()):
                told.append(
                    f"{name} is not finite for experts {_ids(wild)}: look for overflow there, or lower optim.lr"
                )
            if bool(silent.any()):
                zero = any(bool((_largest(w) == 0)[silent].any()) for w in (moe.experts.w13, moe.experts.w2))
                cause = (
                    "their weights are zero, as after a meta device without initialisation; call init_weights"
                    if zero
                    else "their output does not reach the loss; check gates and the way back to token order"
                )
                told.append(f"{name}: experts {_ids(silent)} received tokens but no gradient: {cause}")
            if bool(leaking.any()):
                told.append(
                    f"{name}: experts {_ids(leaking)} received a gradient but no token: rows of other experts reach "
                    "them, or counts miss a micro-step or rank; check the sort by expert and its offsets"
                )
        return told

    def _router(self, prefix: str, moe: MoE, grads: Grads) -> list[str]:
        router, w2 = f"{prefix}router.weight", f"{prefix}experts.w2"
        mine, theirs = grads.get(router), grads.get(w2)
        if mine is None or theirs is None:
            return []
        value = float(_relative(moe.router.weight, mine, moe.experts.w2, theirs))
        return [_dead_router(router, value, "")] if value < DEAD_ROUTER else []

    def language_gradients(self, relative: dict[str, float]) -> list[str]:
        """Judges `router_language_gradients`."""
        return [
            _dead_router(f"{layer} router.weight", value, " from the language loss")
            for layer, value in relative.items()
            if value < DEAD_ROUTER
        ]

    @torch.no_grad()
    def observe(self, counts_by_layer: Counts) -> None:
        """Once an optimizer step, with that step's counts over all ranks; no transfer from the device."""
        self.steps += 1
        for layer, counts in counts_by_layer.items():
            waited = self.idle_steps.get(layer)
            waited = torch.zeros_like(counts) if waited is None else waited
            self.idle_steps[layer] = torch.where(counts > 0, 0, waited + 1)

    def idle(self, steps: int = IDLE_STEPS) -> list[str]:
        """Experts that have had no token for `steps` steps in a row; one transfer, so call it when logging."""
        if not self.idle_steps:
            return []
        told = []
        flat = (torch.cat(list(self.idle_steps.values())) >= steps).tolist()
        for layer, waited in self.idle_steps.items():
            mine, flat = flat[: waited.numel()], flat[waited.numel() :]
            now = {expert for expert, is_idle in enumerate(mine) if is_idle}
            new = sorted(now - self._told.get(layer, set()))
            self._told[layer] = now
            if new:
                told.append(
                    f"{layer}: experts {_some(new)} had no token for {steps} steps: the bias cannot lift them; "
                    "raise model.bias_update_speed or model.seq_aux_alpha, or take fewer experts"
                )
        return told

    def mtp_ratio(self, mtp_loss: float, main_loss: float, step: int | None = None) -> list[str]:
        """At each logged step: the mean of the last 20 ratios must lie in 0.95..1.5 from step 100 on.

        Predicting one token further is harder, never easier; much harder means a broken path. step: default, the number
        of `observe` calls.
        """
        if not (math.isfinite(mtp_loss) and math.isfinite(main_loss) and main_loss > 0):
            return []
        self.ratios.append(mtp_loss / main_loss)
        ratio = _mean(list(self.ratios))
        if (self.steps if step is None else step) < 100 or 0.95 <= ratio <= 1.5:
            self._ratio_told = False
            return []
        if self._ratio_told:
            return []
        self._ratio_told = True
        cause = (
            "MTP sees the token it predicts; check that depth k embeds t_{i+k} and predicts t_{i+k+1}"
            if ratio < 0.95
            else "MTP hardly learns; check its targets, its embedding input and model.mtp_weight"
        )
        return [f"mtp: loss is {ratio:.2f} of the main loss, expected 0.95..1.5: {cause}"]


def router_language_gradients(
    objective: nn.Module,
    tokens: Tensor,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
    limit: int = 32,
) -> dict[str, float]:
    """By layer, the router's gradient from the language loss alone, relative to its experts' (see `_relative`). A layer
    that no target reaches is left out.

    The balance losses are switched off for one pass over at most `limit` tokens of the row with most targets;
    `.grad` stays as it is. objective: an unwrapped `objectives.Pretraining`, called as the trainer calls it.
    """
    if mask is None:
        row, end = 0, min(limit + 1, tokens.shape[1])
    else:
        row = int(mask.sum(1).argmax())
        end = int(mask[row].nonzero().max()) + 1 if bool(mask[row].any()) else tokens.shape[1]
    window = slice(max(0, end - limit - 1), end)
    part = [None if x is None else x[row : row + 1, window] for x in (tokens, segment_ids, mask)]
    model: Any = objective.model
    found = {layer: moe for layer, (_, moe) in _moe_layers(model).items()}
    layers = {
        layer: moe for layer, moe in found.items() if isinstance(getattr(moe.router, "weight", None), nn.Parameter)
    }
    if not layers:
        return {}
    weights = ("seq_aux_alpha", "batch_aux_alpha")
    before = [(m.router, w, getattr(m.router, w)) for m in layers.values() for w in weights if hasattr(m.router, w)]
    training = objective.training
    try:
        objective.train()
        for router, weight, _ in before:
            setattr(router, weight, 0.0)
        with torch.enable_grad():
            out = objective(*part, divisor=float(part[0].shape[1] - 1), mtp_weight=1.0 if len(model.mtp) else 0.0)
        pairs = [w for moe in layers.values() for w in (moe.router.weight, moe.experts.w2)]
        reached = torch.autograd.grad(out.loss, pairs, allow_unused=True)
    finally:
        objective.train(training)
        for router, weight, alpha in before:
            setattr(router, weight, alpha)
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(pairs, reached, strict=True)]
    values = [_relative(*four) for four in zip(pairs[::2], grads[::2], pairs[1::2], grads[1::2], strict=True)]
    figures = dict(zip(layers, torch.stack(values).tolist(), strict=True))
    return {layer: value for layer, value in figures.items() if math.isfinite(value)}  # else: nothing reached experts


# ------------------------------------------------------------------------------------------------------------- helpers


def _moe_layers(model: nn.Module) -> dict[str, tuple[str, MoE]]:
    """Layer name (`layers.3`, `mtp.0`) -> (parameter prefix, its MoE)."""
    names = {id(router): layer for layer, router in routers(model).items()}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE) and id(module.router) in names:
            found[names[id(module.router)]] = (f"{name}." if name else "", module)
    return found


def _largest(x: Tensor) -> Tensor:
    """[E, A, B] -> [E] largest magnitude; NaN where there is one."""
    return torch.linalg.vector_norm(x.detach(), ord=float("inf"), dim=(1, 2))


def _relative(router: Tensor, router_grad: Tensor, w2: Tensor, w2_grad: Tensor) -> Tensor:
    """(|router| |its gradient|) / (|w2| |its gradient|): free of the scale of loss and weights; not finite where the
    experts' gradient is zero or not finite itself."""
    size = [torch.linalg.vector_norm(x.detach(), dtype=torch.float64) for x in (router, router_grad, w2, w2_grad)]
    experts = size[2] * size[3]
    return torch.where(torch.isfinite(experts), size[0] * size[1] / experts, float("nan")).float()


def _dead_router(name: str, value: float, source: str) -> str:
    return (
        f"{name} has next to no gradient{source} ({value:.1e} of its experts'): the gates are constant or detached; "
        "one expert a token with norm_topk_prob=true does that, so take two, or do not normalise"
    )


def _ids(chosen: Tensor) -> str:
    return _some(chosen.nonzero().flatten().tolist())


def _some(ids: list[int]) -> str:
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(str, ids[:5])) + more
