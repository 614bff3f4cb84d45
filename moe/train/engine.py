"""Turns an objective into optimizer steps: precision, gradient accumulation, all-reduce, clipping, AdamW.

    fp32   the parameters are the masters
    bf16   a bf16 working copy computes; fp32 masters, fp32 gradient sums, fp32 moments
    fp8    the same, and products inside the blocks take E4M3 operands (layers/precision.py)

    losses = engine.forward_backward(*batch)    for each micro-batch: any objective whose result has `.loss`
    norm = engine.reduce()                      of the whole gradient, before clipping; the same on every rank
    applied = engine.step(lr, norm)             clips and updates; nothing at all where the norm is not finite

Gradients of the micro-batches and ranks are summed, never averaged: the objective divides by the targets of the global
batch, so the loss is token-weighted whatever the layout. `state` is one flat format for every engine, ZeRO stage and
number of ranks, so that a checkpoint of any is resumed by any other.

Not here: ZeRO (zero.py, the same methods over DeepSpeed; one process never needs it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe import ops
from moe.config import OptimConfig, TrainConfig
from moe.layers.experts import Experts
from moe.layers.precision import use_fp8
from moe.parallel import Ranks
from moe.train.optim import adamw, learning_rate, one_pass


def build(objective: nn.Module, optim: OptimConfig, train: TrainConfig, ranks: Ranks) -> Engine:
    """The engine that train.zero_stage asks for; a single process has nobody to share its state with."""
    if ranks.world == 1 or train.zero_stage == 0:
        return Engine(objective, optim, train, ranks)
    from moe.train.zero import Zero

    return Zero(objective, optim, train, ranks)


class Engine:
    """`forward_backward` for each micro-batch, then one `reduce` and one `step`."""

    def __init__(self, objective: nn.Module, optim: OptimConfig, train: TrainConfig, ranks: Ranks) -> None:
        ops.select(train.ops)
        learning_rate(optim, 1, train.steps)  # an unknown schedule is told before anything is built
        objective.model.activation_checkpointing = train.activation_checkpointing
        for module in objective.modules():
            if isinstance(module, Experts):
                module.recompute_z = train.recompute_z
        self.objective, self.ranks, self.clip = objective.to(ranks.device), ranks, optim.grad_clip
        if train.precision == "fp8":
            use_fp8(objective.model, train.fp8_scales)
        self.dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16
        widths = objective.model.head_widths
        self.attention = ops.select_attention(train.attention, ranks.device, self.dtype, widths, train.compile)
        self.named: dict[str, nn.Parameter] = dict(objective.named_parameters())
        self._build(optim, train)

    def _build(self, optim: OptimConfig, train: TrainConfig) -> None:
        self.parameters: list[Tensor] = list(self.named.values())
        self.masters = self.parameters
        if self.mixed:
            self.masters = [p.detach().float().clone() for p in self.parameters]
            self.objective.to(torch.bfloat16)  # router biases stay fp32 (Router._apply)
            self.parameters = list(self.objective.parameters())
        self.optimizer = adamw(self.masters, optim)
        self.one_pass = ops.path_for(self.masters[0]) == "native"
        self.forward = torch.compile(self.objective) if train.compile else self.objective

    @property
    def mixed(self) -> bool:
        return self.dtype != torch.float32

    def forward_backward(self, *batch: Any) -> Any:
        """One micro-batch through the objective; its gradients join those of the step. -> what the objective gave."""
        self._add_up()
        losses = self.forward(*batch)
        losses.loss.backward()
        return losses

    def _add_up(self) -> None:
        """The working copy's gradients join the sums in fp32: bf16 would drop small contributions."""
        if self.mixed:
            for master, p in zip(self.masters, self.parameters, strict=True):
                if p.grad is None:
                    continue
                if master.grad is None:
                    master.grad = p.grad.float()
                else:
                    master.grad += p.grad
                p.grad = None

    def _gradients(self) -> list[Tensor]:
        """Of this step, between `reduce` and `step`: the sums, or what a single pass of a single rank left."""
        return [p.grad if m.grad is None else m.grad for m, p in zip(self.masters, self.parameters, strict=True)]

    def gradients(self) -> dict[str, Tensor | None]:
        """This step's summed gradients by parameter name, between `reduce` and `step`; all ranks call it together."""
        return {n.removeprefix("model."): g for n, g in zip(self.named, self._gradients(), strict=True)}

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sum the gradients over ranks -> their global norm, the same on every rank."""
        summed = any(master.grad is not None for master in self.masters)
        if summed or self.ranks.world > 1 or not self.one_pass:  # else the optimizer takes them as they are
            self._add_up()
        for master, p in zip(self.masters, self.parameters, strict=True):
            if master.grad is None and p.grad is None:  # what no micro-batch used still takes part in every collective
                master.grad = torch.zeros_like(master)
        grads = self._gradients()
        self.ranks.all_reduce(grads)
        if self.one_pass:
            return torch.tensor(math.fsum(map(ops.square_sum, grads)), dtype=torch.float64).sqrt()
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).double())

    @torch.no_grad()
    def step(self, lr: float, norm: float | Tensor) -> bool:
        """Clip to the configured norm and update; -> False (and no change) when the norm is not finite."""
        norm = float(norm)
        finite = math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._update(self.clip / norm if self.clip and norm > self.clip else 1.0)
        self._drop_gradients()
        return finite

    def _update(self, scale: float) -> None:
        if self.one_pass:
            copies = self.parameters if self.mixed else None
            return one_pass(self.optimizer, self.masters, self._gradients(), copies, scale)
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.masters], scale)
        self.optimizer.step()
        if self.mixed:
            torch._foreach_copy_(self.parameters, self.masters)

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, flat, on rank 0 (others: {}); all ranks call it together.

        model/<name>; optim/<name>/step, exp_avg, exp_avg_sq once a step was taken; optim/<name>/master under bf16.
        """
        if not self.ranks.first:
            return {}
        tensors = {f"model/{k}": v for k, v in self.objective.model.state_dict().items()}
        for name, master in zip(self.named, self.masters, strict=True):
            if self.mixed:
                tensors[f"optim/{name}/master"] = master
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optim/{name}/{key}"] = value
        return tensors

    @torch.no_grad()
    def load(self, model: dict[str, Tensor], optim: dict[str, Tensor]) -> None:
        """Inverse of `state`, from its two halves with the prefixes taken off, on every rank; exact."""
        self.objective.model.load_state_dict(model)
        self.optimizer.state.clear()
        for master, own in zip(self.masters, by_parameter(self.named, optim).values(), strict=True):
            if self.mixed:
                master.copy_(own.pop("master"))
            if own:
                self.optimizer.state[master] = {k: v.to(master.device, copy=True) for k, v in own.items()}

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The model with its whole weights on every rank, to read: generation, evaluation, export. All ranks enter
        and leave together; in between each may do as it likes."""
        yield self.objective.model


def by_parameter(names: Any, optim: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"a.w/step": t, ...} -> {"a.w": {"step": t, ...}, ...} for every name, empty where nothing was saved."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in optim.items():
        name, _, what = key.rpartition("/")
        found[name][what] = value
    return found
