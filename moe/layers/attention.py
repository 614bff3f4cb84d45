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
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
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
        if angles is None:
            if positions is None:
                time = x.shape[1]
                positions = cache.positions(time) if cache is not None else torch.arange(time, device=x.device)
            angles = self.rotary(positions)
        cos, sin = (a if a.ndim == 3 else a.unsqueeze(0) for a in angles)
        if cache is not None and cache.longest:
            return self._absorbed(x, cos, sin, cache, layer)
        return self._expanded(x, cos, sin, segment_ids, cache, layer)

    def _query(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> nope and rope channels [..., H, .] of each head, not rotated yet."""
        q = self.q_b(self.q_a_norm(self.q_a(x))) if self.q_lora_rank else self.q(x)
        return q.view(*x.shape[:-1], self.heads, self.nope + self.rope).split_with_sizes([self.nope, self.rope], -1)

    def _latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> c_kv [..., C] and the shared rotary key [..., 1, R], not rotated yet."""
        c_kv, k_rope = self.kv_a(x).split_with_sizes([self.kv_lora_rank, self.rope], -1)
        return self.kv_a_norm(c_kv), k_rope.unsqueeze(-2)

    def _expanded(
        self, x: Tensor, cos: Tensor, sin: Tensor, segment_ids: Tensor | None, cache: LatentCache | None, layer: int
    ) -> Tensor:
        """Tokens attend to themselves alone; an empty cache keeps their latents."""
        batch, time, _ = x.shape
        (q_nope, q_rope), (c_kv, k_rope) = self._query(x), self._latent(x)
        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)
        if cache is not None:
            cache.write(layer, c_kv, k_rope.squeeze(2))
        k_nope, v = self.kv_b(c_kv).view(batch, time, self.heads, self.nope + self.v).split([self.nope, self.v], -1)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.heads, -1)), -1)
        o = ops.attention(q, k, v, self.scale, segment_ids)
        return self.o(o.reshape(batch, time, self.heads * self.v))

    def _absorbed(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache, layer: int) -> Tensor:
        """Tokens attend to what the cache holds, and to themselves.

        One token's time goes into calls, not into arithmetic: rows stay flat, queries and key are rotated together.
        """
        batch, time, _ = x.shape
        x = x.flatten(0, 1)
        (q_nope, q_rope), (c_kv, k_rope) = self._query(x), self._latent(x)
        rotated = rotate(torch.cat((q_rope, k_rope), 1).unflatten(0, (batch, time)), cos, sin)
        q_rope, k_rope = rotated.split_with_sizes([self.heads, 1], 2)
        cache.write(layer, c_kv.view(batch, time, -1), k_rope.squeeze(2))
        # a single bf16 row: oneDNN's set-up costs more than the conversion (decoding.py), and without it fp32 is faster
        dtype = torch.float32 if _on_onednn(x) and len(x) == 1 else x.dtype
        latents = cache.seen(layer, time).to(dtype)

        w_uk, w_uv = self.kv_b.weight.view(self.heads, -1, self.kv_lora_rank).split_with_sizes([self.nope, self.v], 1)
        query = torch.cat((_by_head(q_nope, w_uk).view(batch, time, self.heads, -1), q_rope), -1).flatten(1, 2)
        s = _scores(query.to(dtype), latents).mul_(self.scale)
        later = cache.later(time)
        if later is not None:
            s.view(batch, time, self.heads, -1).add_(later.unsqueeze(2))
        z = torch.bmm(s.softmax(-1), latents[..., : self.kv_lora_rank])
        o = _by_head(z.view(batch * time, self.heads, -1).to(x.dtype), w_uv.mT)
        return self.o(o.flatten(1)).view(batch, time, -1)


def _on_onednn(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """[N, H, n] times each head's [H, n, m] -> [N, H, m]."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, M, W], [B, S, W] -> contiguous [B, M, S]."""
    if _on_onednn(query):  # it copies its right operand, so the many keys stand left: 2-3 times faster (measured)
        return torch.bmm(keys, query.mT).mT.contiguous()
    return torch.bmm(query, keys.mT)


ATTENTIONS = {"mla": MLA.from_config}
