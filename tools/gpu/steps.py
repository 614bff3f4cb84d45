"""End to end: the MoE layer as a module, whole training steps beside the floor of the whole step, and what more experts cost.

Steps are those of `recipes/pretrain.py`: the engine in bf16 with fp32 masters, the objective, clipping, AdamW, the balance
rule, on random ids in whole rows. MFU counts model FLOPs (moe.analysis.planner) against the data sheet.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from calls import answered_by
from floors import GROUPS, SIZES, TINY, Card, Shape, kernels, product, step, step_seconds
from machine import Clock, Machine, first_line, graphed, seconds

from moe.analysis import planner
from moe.analysis.ceiling import peak_flops
from moe.config import ModelConfig


class Plan(NamedTuple):
    name: str
    config: ModelConfig
    seq_len: int
    rows: int
    """Of one optimizer step."""
    note: str = ""


def speedrun() -> ModelConfig:
    """The shape of nmoe's speedrun. MLA stands where it has plain attention of 12 heads of 64, with `small`'s widths a
    head and its latents in proportion; the vocabulary is its own, since the published speed includes that head."""
    return ModelConfig(
        name="speedrun", vocab_size=50304, hidden_size=768, num_hidden_layers=12, first_k_dense_replace=0,
        num_attention_heads=12, q_lora_rank=384, kv_lora_rank=192, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=7, moe_intermediate_size=384, n_group=1, topk_group=1,
        num_nextn_predict_layers=0,
    )  # fmt: skip


def plans(tiny: bool) -> list[Plan]:
    if tiny:
        few = dict(hidden_size=32, num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=2, vocab_size=64,
                   kv_lora_rank=16, q_lora_rank=16, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16)  # fmt: skip
        return [
            Plan(f"tiny, {e} experts", ModelConfig.preset("tiny", **few, n_routed_experts=e), 16, 1) for e in (8, 16)
        ]
    small = ModelConfig.preset("small")
    return [
        Plan("small", small, 1024, 64, "65,536 tokens a step, MTP included"),
        Plan("speedrun", speedrun(), 2048, 32, "65,536 tokens a step: nmoe's 524,288 over 8 GPUs"),
        *(Plan(f"small, {e} experts", dataclasses.replace(small, n_routed_experts=e), 1024, 64) for e in (64, 1024)),
    ]


def run(machine: Machine, clock: Clock, tiny: bool, sizes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": [], "steps": [], "failures": []}
    for name, s in ({"tiny": TINY} if tiny else {n: SIZES[n] for n in sizes}).items():
        if clock.has(3, f"moe.MoE at {name}"):
            attempt(found, clock, "layers", f"moe.MoE at {name}", partial(layer, machine, name, s))
    for plan in plans(tiny):
        if clock.has(1 if tiny else 15, f"training step of {plan.name}"):
            attempt(found, clock, "steps", f"step of {plan.name}", partial(trained, machine, plan, compiled=False))
    for plan in plans(tiny)[:2] if machine.is_gpu else []:
        if clock.has(90, f"training step of {plan.name} under train.compile"):
            attempt(
                found, clock, "steps", f"compiled step of {plan.name}", partial(trained, machine, plan, compiled=True)
            )
    return found


def attempt(found: dict[str, Any], clock: Clock, where: str, what: str, make: Callable[[], dict[str, Any]]) -> None:
    try:
        made = make()
        found[where].append(made)
        if not math.isfinite(made.get("loss", 0.0)):
            found["failures"].append(f"{what}: the loss is {made['loss']}")
    except torch.OutOfMemoryError:
        clock.cut.append(f"{what}: does not fit into memory")
    except Exception as raised:
        found["failures"].append(f"{what}: {first_line(raised)}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------- the module


def layer(machine: Machine, name: str, s: Shape) -> dict[str, Any]:
    """Forward and backward of moe.MoE in training mode: router and its backward pass, experts, a shared expert."""
    from moe.layers.moe import MoE

    groups = dict(n_group=8, topk_group=4) if s.experts % 8 == 0 and s.experts > 16 else {}
    with torch.device(machine.device):
        torch.manual_seed(0)
        module = MoE(s.width, s.hidden, s.experts, s.choices, 1, routed_scaling_factor=2.5, **groups).bfloat16().train()
        x, dy = torch.randn(2, s.tokens, s.width).bfloat16().unbind()
    given = [x.requires_grad_(), *module.parameters()]

    def call() -> tuple[torch.Tensor, ...]:
        with answered_by("triton"):
            return torch.autograd.grad(module(x)[0], given, dy)

    found: dict[str, Any] = {"size": name, "seconds": seconds([call], machine.device)}
    best = found["seconds"]
    if machine.is_gpu and best < 3e-3:
        found["graph"] = graphed([call], machine.device)
        best = min(best, found["graph"])
    found["floor"] = layer_floor(s, machine.card)
    return found | {"over floor": best / found["floor"]}


def layer_floor(s: Shape, card: Card) -> float:
    work = kernels(s)
    shared = [product(s.tokens, s.width, 2 * s.hidden), product(s.tokens, s.hidden, s.width)]
    router = product(s.tokens, s.width, s.experts)
    routed = sum(card.seconds(work[part]) for part in GROUPS["layer"] if part != "router")
    return routed + sum(t.count * card.seconds(t.work) for t in [*shared, router])


# ------------------------------------------------------------------------------------------------------------- the step


def passes(plan: Plan, memory: float | None) -> int:
    """As few as memory allows: half, a quarter of the rows at a time, and so on."""
    count = 1
    while memory and count < plan.rows and needed(plan, count) > 0.9 * memory:
        count *= 2
    return count


def needed(plan: Plan, count: int) -> int:
    return planner.memory(plan.config, plan.seq_len, plan.rows // count, "bf16", path="triton").total


def trained(machine: Machine, plan: Plan, compiled: bool) -> dict[str, Any]:
    """`training`, in twice and four times the passes where memory says that the estimate was short."""
    for more in (1, 2, 4):
        try:
            return training(machine, plan, compiled, more)
        except torch.OutOfMemoryError:
            pass
        gc.collect()
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(plan.name)


def training(machine: Machine, plan: Plan, compiled: bool, more: int = 1) -> dict[str, Any]:
    """Seconds of an optimizer step and of its parts, beside its floor."""
    c, device = plan.config, machine.device
    memory = torch.cuda.mem_get_info(device)[0] if machine.is_gpu else None
    count = min(plan.rows, more * passes(plan, memory))
    begun = time.perf_counter()
    step_once, engine = built(machine, plan, count, compiled)
    loss = step_once()
    took = [first := time.perf_counter() - begun]
    if machine.is_gpu:
        for _ in range(2):
            step_once()
        torch.cuda.reset_peak_memory_stats(device)
        took = [_timed(step_once, device) for _ in range(5)]
    of_step = statistics.median(took)
    parts = step_seconds(step(c, plan.rows, plan.seq_len, count), machine.card)
    tokens, peak = plan.rows * plan.seq_len, peak_flops(device, torch.bfloat16) if machine.is_gpu else None
    found = {
        "name": plan.name, "note": plan.note, "compiled": compiled, "experts": c.n_routed_experts, "passes": count,
        "seq_len": plan.seq_len, "tokens": tokens, "seconds": of_step, "spread": [min(took), max(took)], "first": first,
        "tokens/s": tokens / of_step, "floor": sum(parts.values()), "floors": parts, "loss": loss,
        "over floor": of_step / sum(parts.values()), "optimizer": _optimizer_seconds(engine, device),
        "attention": engine.attention, "parameters": dataclasses.asdict(planner.parameters(c)),
    }  # fmt: skip
    if peak:
        flops = planner.mfu_flops(c, plan.seq_len)
        found |= {
            "MFU": flops * tokens / of_step / peak.flops,
            "MFU against": f"{peak.flops / 1e12:.0f} TFLOP/s, {peak.source}",
        }
        found["peak memory"] = torch.cuda.max_memory_allocated(device)
    return found


def built(machine: Machine, plan: Plan, count: int, compiled: bool) -> tuple[Callable[[], float], Any]:
    """-> one optimizer step in `count` passes, and the engine that takes it."""
    from moe.config import OptimConfig, TrainConfig
    from moe.layers.balance import routers
    from moe.model import Transformer
    from moe.objectives import Pretraining, count_targets
    from moe.parallel import Ranks
    from moe.train.engine import Engine

    torch.manual_seed(0)
    with torch.device(machine.device):
        objective = Pretraining(Transformer(plan.config)).train()
    train = TrainConfig(precision="bf16", ops="triton", compile=compiled)
    engine = Engine(objective, OptimConfig(lr=1e-4), train, Ranks(0, 1, machine.device))
    moving = routers(objective.model)
    vocabulary, each = plan.config.vocab_size, plan.rows // count
    weight = (
        plan.config.mtp_weight if isinstance(plan.config.mtp_weight, (int, float)) else plan.config.mtp_weight[0][1]
    )

    def step_once() -> float:
        random = torch.rand(plan.rows, plan.seq_len + 1, device=machine.device)
        tokens = (vocabulary**random - 1).long().clamp(0, vocabulary - 1)  # Zipf: few ids are frequent
        divisor = float(count_targets(tokens))
        total, states = torch.zeros((), device=machine.device), {}
        for i in range(count):
            losses = engine.forward_backward(
                tokens[i * each : (i + 1) * each], None, None, divisor, i * each, plan.rows, weight
            )
            total += losses.loss.detach()
            for name, state in losses.balance.items():
                before = states.get(name)
                states[name] = state if before is None else {k: v + before[k] for k, v in state.items()}
        engine.step(1e-4, engine.reduce())
        for name, state in states.items():
            moving[name].bias.copy_(objective.balancer.update(state, moving[name].bias, 1e-3))
        return float(total)

    return step_once, engine


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _optimizer_seconds(engine: Any, device: torch.device) -> float:
    """Clipping's norm, AdamW and the copy to bf16, on the gradients' zeros."""
    return min(_timed(lambda: engine.step(0.0, engine.reduce()), device) for _ in range(2))
