"""How each row of the table is computed by this project's kernels: one call on a problem, its results in a fixed order.

Single kernels are called as the chain calls them, whole rows through `moe.ops`, as a model does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import Problem
from torch import Tensor

Outputs = tuple[Any, ...]
Call = Callable[[Problem], Outputs]


@contextlib.contextmanager
def answered_by(path: str) -> Iterator[None]:
    """The path of moe.ops; the environment wins over any choice, and costs nothing to ask."""
    before = os.environ.get("MOE_OPS")
    os.environ["MOE_OPS"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOE_OPS"]
        else:
            os.environ["MOE_OPS"] = before


def groups(p: Problem) -> tuple[int, int]:
    """Groups of experts and how many a token may use, as V3 has them."""
    return (8, 4) if p.shape.experts % 8 == 0 and p.shape.experts // 2 >= 4 * p.shape.choices else (1, 1)


def route(p: Problem) -> Outputs:
    from moe.kernels.order import sort_by_expert
    from moe.kernels.route import route

    ids, gates, hist = route(p.logits, p.bias, p.shape.choices, *groups(p), "sigmoid", True, 2.5)
    return ids, gates, *sort_by_expert(ids, p.shape.experts, hist)


def up_swiglu(p: Problem) -> Outputs:
    from moe.kernels.up_swiglu import up_swiglu

    return up_swiglu(p.x, p.w13, p.gates, p.ends, p.order)


def down(p: Problem) -> Outputs:
    from moe.kernels.gmm import gmm

    return (gmm(p.h, p.w2, p.ends, transpose=True),)


def combine(p: Problem) -> Outputs:
    from moe.kernels.combine import combine

    return (combine(p.rows, p.inv),)


def bwd_act(p: Problem) -> Outputs:
    from moe.kernels.bwd_act import bwd_act

    return bwd_act(p.dy, p.w2, p.z, p.gates, p.ends, p.order)


def dx(p: Problem) -> Outputs:
    from moe.kernels.gmm import gmm

    return (gmm(p.dz, p.w13, p.ends, transpose=False),)


def dw2(p: Problem) -> Outputs:
    from moe.kernels.dw import dw

    return (dw(p.dy, p.h, p.ends, p.order, gather="a", top_k=p.shape.choices),)


def dw13(p: Problem) -> Outputs:
    from moe.kernels.dw import dw

    return (dw(p.dz, p.x, p.ends, p.order, gather="b", top_k=p.shape.choices),)


def leaves(p: Problem) -> list[Tensor]:
    """What has a gradient, in the order of the results."""
    return [t.detach().requires_grad_() for t in (p.x, p.w13, p.w2, p.gates)]


def forward(p: Problem) -> Outputs:
    from moe import ops

    with torch.no_grad():
        return (ops.experts(p.x, p.w13, p.w2, p.ids, p.gates),)


def forward_backward(p: Problem) -> Outputs:
    from moe import ops

    x, w13, w2, gates = given = leaves(p)
    y = ops.experts(x, w13, w2, p.ids, gates)
    return y, *torch.autograd.grad(y, given, p.dy)


def layer(p: Problem) -> Outputs:
    """The router's product, choice and sort, then the experts forward and backward."""
    from moe import ops

    with torch.no_grad():
        logits = torch.nn.functional.linear(p.x.float(), p.w_router)
        ids, gates, _ = ops.route(logits, p.bias, p.shape.choices, *groups(p), "sigmoid", True, 2.5)
    x, w13, w2, _ = given = leaves(p)
    given[3] = gates.requires_grad_()
    y = ops.experts(x, w13, w2, ids, gates)
    return y, *torch.autograd.grad(y, given, p.dy)


OURS: dict[str, Call] = {
    "route": route, "up_swiglu": up_swiglu, "down": down, "combine": combine, "bwd_act": bwd_act, "dw2": dw2, "dx": dx,
    "dw13": dw13, "forward": forward, "forward+backward": forward_backward, "layer": layer,
}  # fmt: skip
KERNELS = ("up_swiglu", "down", "combine", "bwd_act", "dw2", "dx", "dw13")
"""Rows that are one kernel with an oracle of its own."""
