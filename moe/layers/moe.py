"""DeepSeekMoE feed-forward: y = shared(x) + sum over chosen experts of gate * expert(x). No token is dropped.

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2, equation 12; DeepSeekMoE, arXiv 2401.06066.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe.config import ModelConfig, UserError, nearest
from moe.layers.basics import SwiGLU
from moe.layers.experts import Experts
from moe.layers.router import ROUTERS, Router
from moe.layers.routing import Routing


class MoE(nn.Module):
    """[..., D] -> ([..., D], Routing). Plain numbers in; `router` replaces the default one.

    Further keyword arguments go to the default Router: n_group, topk_group, scoring_func, norm_topk_prob,
    routed_scaling_factor, seq_aux_alpha.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        n_shared_experts: int = 1,
        router: nn.Module | None = None,
        **router_options,
    ) -> None:
        super().__init__()
        self.router = router or Router(hidden_size, n_routed_experts, num_experts_per_tok, **router_options)
        self.experts = Experts(hidden_size, moe_intermediate_size, n_routed_experts)
        self.shared = SwiGLU(hidden_size, n_shared_experts * moe_intermediate_size) if n_shared_experts else None

    @classmethod
    def from_config(cls, c: ModelConfig) -> MoE:
        if c.router not in ROUTERS:
            raise UserError(f"model.router={c.router!r} is not one of {list(ROUTERS)}{nearest(c.router, ROUTERS)}")
        return cls(
            c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts,
            router=ROUTERS[c.router](c),
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        replay: Tensor | None = None,
        keep_scores: bool = False,
    ) -> tuple[Tensor, Routing]:
        """mask [...]: padding is not routed. token_ids [...]: for routers that use them. replay [..., K]: recorded
        choices. For [B, T, D] the sequence-wise loss takes each row as a sequence."""
        routing = self.router(x, mask=mask, token_ids=token_ids, replay=replay, keep_scores=keep_scores)
        y = self.experts(x, routing.experts, routing.gates)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, routing
