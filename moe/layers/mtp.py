"""Multi-token prediction: depth k looks one token further ahead, along one causal chain.

    h'_i = proj [ embed_norm(Emb(t_{i+k})) ; hidden_norm(h^{k-1}_i) ]     [B, T, D]
    h^k  = block(h')                                                       its own attention, router, experts
    P(t_{i+k+1}) = head(norm(h^k_i))                                       embedding and head are the main model's

The embedding comes first, as the released weights want it (the paper's equation 21 prints the hidden state first). The
first depth reads the main model's state after its final norm, as transformers and Megatron-LM do. Deeper ones read the
block's output h^{k-1} before `norm`, as equation 21 is written; transformers recycles it after `norm`. DeepSeek tells
neither, and releases depth 1 only, where all agree.

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.2, equations 21-25.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.layers.basics import RMSNorm
from moe.layers.block import Block
from moe.layers.routing import Routing


class MTP(nn.Module):
    """One depth. `depth` counts from 0; its block is layer num_hidden_layers + depth."""

    def __init__(self, config: ModelConfig, depth: int = 0) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.embed_norm = RMSNorm(d, eps)
        self.hidden_norm = RMSNorm(d, eps)
        self.proj = nn.Linear(2 * d, d, bias=False)
        self.block = Block(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(d, eps)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        angles: tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        replay: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """hidden [B, T, D] of the depth before, embedded [B, T, D] = Emb(t_{i+k}) -> block output [B, T, D] before
        `norm`, and the block's Routing."""
        x = self.proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), -1))
        return self.block(x, angles, segment_ids, mask=mask, token_ids=token_ids, replay=replay)
