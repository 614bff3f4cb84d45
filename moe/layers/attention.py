"""Multi-head latent attention: keys and values grow out of one small latent, and only that latent is cached.

    c_q  = norm(W_DQ x)                    [B, T, Q]       queries: q = W_UQ c_q, per head nope then rope channels
    c_kv = norm(W_DKV x)                   [B, T, C]       k_nope, v = W_UKV c_kv, per head nope then value channels
    k_rope = rotate(W_KR x)                [B, T, R]       one rotary key for all heads, not normalised
    o = softmax([q_nope; q_rope] . [k_nope; k_rope] * scale) v,   scale = (nope + rope)^-1/2, YaRN's m^2 on top

Two forms, equal in exact arithmetic. Expanded (training, prefill): keys and values are made for every head. Absorbed
(decoding): W_UK moves to the query and W_UV to the output, so that attention runs over the cached latents themselves.

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.1, equations 1-11; the latent norms are told in section 4.2; absorbed
form: DeepSeek-V2 (arXiv 2405.04434) appendix C.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe import ops
from moe.config import ModelConfig, UserError
from moe.layers.basics import RMSNorm, Rotary, rotate
from moe.layers.cache import LatentCache


class MLA(nn.Module):
    """[B, T, D] -> [B, T, D], causal. Plain numbers in; `from_config` adapts a ModelConfig.

    `q_lora_rank=None` gives full-rank queries without a norm (V2-Lite). `rope_scaling`: see basics.Rotary.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope_theta: float = 10000.0,
        rope_scaling: dict | None = None,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if qk_rope_head_dim % 2:
            raise UserError(f"qk_rope_head_dim={qk_rope_head_dim} must be even: rotary positions turn pairs")
        self.heads, self.nope, self.rope, self.v = num_attention_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.kv_lora_rank = kv_lora_rank
        query = num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank:
            self.q_a = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(q_lora_rank, rms_norm_eps)
            self.q_b = nn.Linear(q_lora_rank, query, bias=False)
        else:
            self.q = nn.Linear(hidden_size, query, bias=False)
        self.kv_a = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_norm = RMSNorm(kv_lora_rank, rms_norm_eps)
        self.kv_b = nn.Linear(kv_lora_rank, num_attention_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias=False)
        self.rotary = Rotary(qk_rope_head_dim, rope_theta, rope_scaling)
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * self.rotary.softmax_factor

    @classmethod
    def from_config(cls, c: ModelConfig) -> MLA:
        return cls(
            c.hidden_size, c.num_attention_heads, c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim,
            c.qk_rope_head_dim, c.v_head_dim, c.rope_theta, c.rope_scaling, c.rms_norm_eps,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        layer: int = 0,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        positions [B, T] or [T] (default: 0, 1, ...; after what the cache holds). segment_ids [B, T]: documents packed
        in a row do not see each other. cache: earlier tokens are read from, and these written to, its `layer`; the
        caller advances it. angles: `self.rotary(positions)` made once for all layers.
        """
        batch, time, _ = x.shape
        if angles is None:
            if positions is None:
                positions = cache.positions(time) if cache is not None else torch.arange(time, device=x.device)
            angles = self.rotary(positions)
        cos, sin = (a if a.ndim == 3 else a.unsqueeze(0) for a in angles)

        q = self.q_b(self.q_a_norm(self.q_a(x))) if hasattr(self, "q_a") else self.q(x)
        q_nope, q_rope = q.view(batch, time, self.heads, self.nope + self.rope).split([self.nope, self.rope], -1)
        q_rope = rotate(q_rope, cos, sin)
        c_kv, k_rope = self.kv_a(x).split([self.kv_lora_rank, self.rope], -1)
        c_kv = self.kv_a_norm(c_kv)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin)

        if cache is None:
            return self._expanded(q_nope, q_rope, c_kv, k_rope, segment_ids)
        first = cache.longest == 0
        seen = cache.write(layer, c_kv, k_rope.squeeze(2))
        if first:  # nothing before: the prompt attends to itself
            return self._expanded(q_nope, q_rope, c_kv, k_rope, segment_ids)
        return self._absorbed(q_nope, q_rope, *seen, cache.positions(time))

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, segment_ids: Tensor | None
    ) -> Tensor:
        batch, time = c_kv.shape[:2]
        k_nope, v = self.kv_b(c_kv).view(batch, time, self.heads, self.nope + self.v).split([self.nope, self.v], -1)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.heads, -1)), -1)
        o = ops.attention(q, k, v, self.scale, segment_ids)
        return self.o(o.reshape(batch, time, self.heads * self.v))

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, positions: Tensor) -> Tensor:
        """Queries [B, T, H, .] at `positions` [B, T] over cached latents [B, S, C] and rotary keys [B, S, R]."""
        batch, time = positions.shape
        c_kv, k_rope = c_kv.to(q_nope.dtype), k_rope.to(q_nope.dtype)
        w_uk, w_uv = self.kv_b.weight.view(self.heads, -1, self.kv_lora_rank).split([self.nope, self.v], 1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
        query = torch.cat((q_latent, q_rope), -1).view(batch, time * self.heads, -1)
        s = torch.bmm(query, torch.cat((c_kv, k_rope), -1).transpose(1, 2)).mul_(self.scale)
        s = s.view(batch, time, self.heads, -1)
        later = torch.arange(s.shape[-1], device=s.device) > positions.unsqueeze(-1)
        p = s.masked_fill(later.unsqueeze(2), float("-inf")).softmax(-1)
        z = torch.bmm(p.view(batch, time * self.heads, -1), c_kv).view(batch, time, self.heads, -1)
        o = torch.einsum("bthc,hvc->bthv", z, w_uv)
        return self.o(o.reshape(batch, time, -1))


ATTENTIONS = {"mla": MLA.from_config}
