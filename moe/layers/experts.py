"""All routed experts of a layer as two stacked tensors: one parameter each, so no engine sees an expert missing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe import ops
from moe.layers.basics import autocast_dtype


class Experts(nn.Module):
    """E SwiGLU experts. w13 [E, 2F, D]: gate rows, then up rows; w2 [E, D, F].

    Every weight takes part in every step: an expert without tokens gets a zero gradient, not none.
    """

    def __init__(self, hidden_size: int, moe_intermediate_size: int, n_routed_experts: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(n_routed_experts, 2 * moe_intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(n_routed_experts, hidden_size, moe_intermediate_size))
        self.recompute_z = False  # the first product again in the backward pass, instead of 2FK numbers a token
        nn.init.normal_(self.w13, std=hidden_size**-0.5)
        nn.init.normal_(self.w2, std=moe_intermediate_size**-0.5)

    def forward(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """x [..., D], experts and gates [..., K] -> [..., D]. Ids outside [0, E) are no expert."""
        k = experts.shape[-1]
        ids, gates = experts.reshape(-1, k), gates.reshape(-1, k)
        dtype = autocast_dtype(x)  # it reaches no custom op: cast as it would
        tokens, w13, w2 = (t if dtype is None else t.to(dtype) for t in (x.reshape(-1, x.shape[-1]), self.w13, self.w2))
        return ops.experts(tokens, w13, w2, ids, gates, self.recompute_z).view(x.shape)
