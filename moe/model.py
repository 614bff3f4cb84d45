"""The whole model: embedding, blocks, norm, head, MTP modules; one function sets every initial weight.

    tokens [B, T] int64 -> logits [B, T, V]

In training mode MTP depth k also gives logits for t_{i+k+1} at positions 0 .. T-k-1; in eval mode no MTP tensor is
computed or needed. Source: DeepSeek-V3, arXiv 2412.19437, section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe import ops
from moe.config import ModelConfig
from moe.layers.basics import RMSNorm, Rotary
from moe.layers.block import Block
from moe.layers.cache import LatentCache
from moe.layers.mtp import MTP
from moe.layers.routing import Routing

Routings = dict[str, Routing]
Replay = dict[str, Tensor] | None


class Output(NamedTuple):
    logits: Tensor
    """[B, T, V]"""
    routings: Routings
    """What each router decided, keyed `layers.3`, `mtp.0`; dense layers are absent."""
    mtp_logits: tuple[Tensor, ...] = ()
    """For depth k = 1..D, [B, T-k, V]: position i predicts t_{i+k+1}. Training only."""


class Transformer(nn.Module):
    """DeepSeek-V3-style language model from a ModelConfig.

    The vocabulary is never projected for MTP or training unless `forward` is called: objectives use `encode` and
    `look_ahead`, and compute the loss in chunks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTP(config, k) for k in range(config.num_nextn_predict_layers))
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.rotary = Rotary(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        self.activation_checkpointing = False
        self.head_widths = config.qk_head_dim, config.v_head_dim  # of keys and of values
        init_weights(self, config.init_std)

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        routings: Replay = None,
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        mtp: bool | None = None,
    ) -> Output:
        """tokens [B, T] int64 -> Output.

        segment_ids [B, T]: packed documents, which do not see each other and start at position 0. routings: recorded
        expert choices [B, T, K] by layer name, replayed instead of top-k. mask [B, T]: False is padding, not routed.
        cache: continue after its tokens and store these; the caller advances it. mtp: default only in training mode.
        """
        hidden, records = self.encode(tokens, segment_ids, routings, mask, cache)
        ahead = []
        if (self.training if mtp is None else mtp) and len(self.mtp) and cache is None:
            ahead, more = self.look_ahead(hidden, tokens, segment_ids, routings, mask)
            records |= more
        return Output(self.head(hidden), records, tuple(self.head(h) for h in ahead))

    def encode(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        routings: Replay = None,
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> tuple[Tensor, Routings]:
        """Everything before the head: -> (states after the final norm [B, T, D], routings of the main layers)."""
        angles = self.rotary(self._positions(tokens, segment_ids, cache))
        x = self.embed(tokens)
        segments = ops.documents(segment_ids, x, self.head_widths) if cache is None else segment_ids
        records: Routings = {}
        for i, block in enumerate(self.layers):
            replay = routings.get(f"layers.{i}") if routings else None
            x, routing = self._run(block, x, angles, segments, cache, mask, tokens, replay)
            if routing is not None:
                records[f"layers.{i}"] = routing
        return self.norm(x), records

    def look_ahead(
        self,
        hidden: Tensor,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        routings: Replay = None,
        mask: Tensor | None = None,
    ) -> tuple[list[Tensor], Routings]:
        """MTP states after each depth's own norm, ready for the head: depth k = 1..D gives [B, T-k, D].

        hidden: states after the final norm, from `encode` on the same tokens.
        """
        angles = self.rotary(self._positions(tokens, segment_ids, None))
        states: list[Tensor] = []
        records: Routings = {}
        for depth, module in enumerate(self.mtp):
            k = depth + 1
            time = max(tokens.shape[1] - k, 0)
            ids = None if segment_ids is None else segment_ids[:, :time]
            segments = ops.documents(ids, hidden[:, :time], self.head_widths)
            valid = None if mask is None else mask[:, :time] & mask[:, k:]  # the token looked at may be padding too
            cos, sin = (a[..., :time, :] for a in angles)
            replay = routings.get(f"mtp.{depth}") if routings else None
            hidden, routing = self._run(
                module,
                hidden[:, :time],
                self.embed(tokens[:, k:]),
                (cos, sin),
                segments,
                valid,
                tokens[:, :time],
                replay,
            )
            states.append(module.norm(hidden))
            if routing is not None:
                records[f"mtp.{depth}"] = routing
        return states, records

    def _run(self, module: nn.Module, *args):
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return module(*args)

    @staticmethod
    def _positions(tokens: Tensor, segment_ids: Tensor | None, cache: LatentCache | None) -> Tensor:
        time = tokens.shape[1]
        if cache is not None:
            return cache.positions(time)
        at = torch.arange(time, device=tokens.device)
        if segment_ids is None:
            return at
        starts = torch.zeros_like(segment_ids, dtype=torch.int64)
        starts[:, 1:] = torch.where(segment_ids[:, 1:] != segment_ids[:, :-1], at[1:], 0)
        return at - starts.cummax(1).values

    def num_parameters(self, active: bool = False, mtp: bool = False) -> int:
        """Parameters of the main model (V3: 671,026,404,352); with mtp=True those of the MTP modules too.

        active: those one token meets: K of E routed experts, the head but not the embedding table (V3: 36.6 B).
        """
        c, total = self.config, 0
        for name, p in self.named_parameters():
            if name.startswith("mtp.") and not mtp:
                continue
            if active and name == "embed.weight" and not c.tie_word_embeddings:
                continue
            routed, size = active and ".experts." in name, getattr(p, "ds_numel", p.numel())  # ZeRO-3: p is a shard
            total += size * c.num_experts_per_tok // c.n_routed_experts if routed else size
        return total


@torch.no_grad()
def init_weights(model: nn.Module, std: float) -> None:
    """Every matrix (embedding, head, experts, router) from N(0, std^2), norms 1, router biases 0 (V3 section 4.2)."""
    for p in model.parameters():
        if p.ndim >= 2:
            p.normal_(0.0, std)
        else:
            p.fill_(1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            buffer.zero_()
