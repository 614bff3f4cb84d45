"""Turns an objective into optimizer steps: precision, gradient accumulation, all-reduce, clipping, AdamW.

    fp32   the parameters are the masters
    bf16   a bf16 working copy computes; fp32 masters, fp32 gradient sums, fp32 moments

Gradients of the micro-batches and ranks are summed, never averaged: the objective divides by the targets of the global
batch, so the loss is token-weighted whatever the layout. A step whose gradient norm is not finite changes nothing.
Not here: DeepSpeed (ZeRO), later behind this same door.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe import ops
from moe.config import OptimConfig, TrainConfig
from moe.objectives import Losses
from moe.parallel import Ranks
from moe.train.optim import adamw, learning_rate


class Engine:
    """`forward_backward` for each micro-batch, then one `step`."""

    def __init__(self, objective: nn.Module, optim: OptimConfig, train: TrainConfig, ranks: Ranks) -> None:
        ops.select(train.ops)
        learning_rate(optim, 1, train.steps)  # an unknown schedule is told before anything is built
        objective.model.activation_checkpointing = train.activation_checkpointing
        self.objective, self.ranks, self.clip = objective.to(ranks.device), ranks, optim.grad_clip
        self.dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.named = dict(objective.named_parameters())
        self.parameters: list[Tensor] = list(self.named.values())
        self.masters = self.parameters
        if train.precision == "bf16":
            self.masters = [p.detach().float().clone() for p in self.parameters]
            objective.to(torch.bfloat16)  # router biases stay fp32 (Router._apply)
            self.parameters = list(objective.parameters())
        self.optimizer = adamw(self.masters, optim)
        self.forward = torch.compile(objective) if train.compile else objective

    @property
    def mixed(self) -> bool:
        return self.masters is not self.parameters

    def forward_backward(self, *batch: Any) -> Losses:
        """One micro-batch through the objective; its gradients join those of the step."""
        losses = self.forward(*batch)
        losses.loss.backward()
        if self.mixed:  # sums in fp32: bf16 would drop small contributions
            for master, p in zip(self.masters, self.parameters, strict=True):
                if p.grad is None:
                    continue
                if master.grad is None:
                    master.grad = p.grad.float()
                else:
                    master.grad += p.grad
                p.grad = None
        return losses

    def gradients(self) -> dict[str, Tensor | None]:
        """This step's summed gradients by parameter name, before clipping."""
        return {n.removeprefix("model."): m.grad for n, m in zip(self.named, self.masters, strict=True)}

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sum the gradients over ranks -> their global norm, the same on every rank."""
        for p in self.masters:
            if p.grad is None:  # a parameter that no micro-batch used still takes part in every collective
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self.masters]
        self.ranks.all_reduce(grads)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).double())

    @torch.no_grad()
    def step(self, lr: float, norm: float) -> bool:
        """Clip to the configured norm and update; -> False (and no change) when the norm is not finite."""
        finite = norm == norm and norm != float("inf")
        if finite:
            if self.clip and norm > self.clip:
                torch._foreach_mul_([p.grad for p in self.masters], self.clip / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.mixed:
                torch._foreach_copy_(self.parameters, self.masters)
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, flat: model/..., optim/... tensors on the engine's device."""
        tensors = {f"model/{k}": v for k, v in self.objective.model.state_dict().items()}
        for name, master in zip(self.named, self.masters, strict=True):
            if self.mixed:
                tensors[f"optim/{name}/master"] = master
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"optim/{name}/{key}"] = value
        return tensors

    @torch.no_grad()
    def load(self, model: dict[str, Tensor], optim: dict[str, Tensor]) -> None:
        """Inverse of `state`, from its two halves with the prefixes taken off; exact."""
        self.objective.model.load_state_dict(model)
        for name, master in zip(self.named, self.masters, strict=True):
            own = {k.removeprefix(f"{name}/"): v for k, v in optim.items() if k.startswith(f"{name}/")}
            if self.mixed:
                master.copy_(own.pop("master"))
            if own:  # AdamW keeps its step counter on the CPU
                self.optimizer.state[master] = {k: v if k == "step" else v.to(master.device) for k, v in own.items()}
