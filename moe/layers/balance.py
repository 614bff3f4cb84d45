"""How experts are kept equally busy: rules that move the router's bias, once for each optimizer step.

A rule is three plain functions, so that counts can be gathered over micro-batches and ranks before anything moves:

    init(n_experts, device) -> state        zeros
    observe(state, routing) -> state        adds sum-reducible statistics of one micro-batch
    update(state, bias, speed) -> bias      once a step, after the state was summed over ranks

Source: auxiliary-loss-free balancing, arXiv 2408.15664 algorithm 1; DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.
Not here: the sequence-wise loss and the batch-wise one of "aux" (section 4.5.3), which the router makes itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.layers.routing import Routing

State = dict[str, Tensor]


class Counting:
    """No rule: the load is counted for the log, and the bias stays where it is."""

    def init(self, n_experts: int, device: torch.device | str = "cpu") -> State:
        return {"counts": torch.zeros(n_experts, dtype=torch.int64, device=device)}

    def observe(self, state: State, routing: Routing) -> State:
        return {"counts": state["counts"] + routing.counts.detach()}

    def update(self, state: State, bias: Tensor, speed: float) -> Tensor:
        return bias


class LossFree(Counting):
    """V3's rule: b += speed * sign(mean load - load), from the load of the whole global batch."""

    def update(self, state: State, bias: Tensor, speed: float) -> Tensor:
        load = state["counts"].double()  # exact up to 2^53 tokens
        return bias + speed * torch.sign(load.mean() - load).to(bias.dtype)


BALANCERS: dict[str, Counting] = {"bias": LossFree(), "aux": Counting(), "none": Counting()}


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Every router that has a bias, by the layer name that Output.routings uses (`layers.3`, `mtp.0`)."""
    found = {}
    for name, module in model.named_modules():
        if name.split(".")[-1] == "router" and isinstance(getattr(module, "bias", None), Tensor):
            found[name.removesuffix("router").removesuffix("ffn.").removesuffix("block.").strip(".")] = module
    return found


def update_balance(
    model: nn.Module, routings: dict[str, Routing] | list[dict[str, Routing]], speed: float = 0.001, rule: str = "bias"
) -> None:
    """Move every router's bias after an optimizer step, for those who bring their own training loop.

    routings: `Output.routings` of the step, or a list of them, one for each micro-batch. One process; with several, sum
    the states over ranks yourself between observe and update.
    """
    many = routings if isinstance(routings, list) else [routings]
    balancer, found = BALANCERS[rule], routers(model)
    for record in many:
        if record and found and not record.keys() & found.keys():
            raise ValueError(
                f"update_balance: routings of {list(record)} fit no router of this model, which has {list(found)}; "
                "pass the model that made them, without its wrapper"
            )
    with torch.no_grad():
        for name, router in found.items():
            state = balancer.init(router.bias.shape[0], router.bias.device)
            for record in many:
                if name in record:
                    state = balancer.observe(state, record[name])
            router.bias.copy_(balancer.update(state, router.bias, speed))
