"""One pre-norm Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)); dense or MoE.

Source: DeepSeek-V3 (arXiv 2412.19437) figure 2.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe.config import ModelConfig, UserError, nearest
from moe.layers.attention import ATTENTIONS
from moe.layers.basics import RMSNorm, SwiGLU
from moe.layers.cache import LatentCache
from moe.layers.moe import MoE
from moe.layers.routing import Routing


class Block(nn.Module):
    """[B, T, D] -> ([B, T, D], Routing or None for a dense feed-forward). `layer` is the block's index."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if config.attention not in ATTENTIONS:
            hint = nearest(config.attention, ATTENTIONS)
            raise UserError(f"model.attention={config.attention!r} is not one of {list(ATTENTIONS)}{hint}")
        self.layer = layer
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = ATTENTIONS[config.attention](config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = config.is_dense(layer)
        self.ffn: nn.Module = (
            SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE.from_config(config)
        )

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        replay: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """See MLA.forward and MoE.forward for the arguments."""
        x = x + self.attn(self.attn_norm(x), segment_ids=segment_ids, cache=cache, layer=self.layer, angles=angles)
        h = self.ffn_norm(x)
        if isinstance(self.ffn, SwiGLU):
            return x + self.ffn(h), None
        y, routing = self.ffn(h, mask=mask, token_ids=token_ids, replay=replay)
        return x + y, routing
