"""Multi-head latent attention: keys and values grow out of one small latent, and only that latent is cached.

    c_q  = norm(W_DQ x)                    [B, T, Q]       queries: q = W_UQ c_q, per head nope then rope channels
    c_kv = norm(W_DKV x)                   [B, T, C]       k_nope, v = W_UKV c_kv, per head nope then value channels
    k_rope = rotate(W_KR x)                [B, T, R]       one rotary key for all heads, not normalised
    o = softmax([q_nope; q_rope] . [k_nope; k_rope] * scale) v,   scale = (nope + rope)^-1/2, YaRN's m^2 on top

Two forms, equal in exact arithmetic. Expanded (training, prefill): keys and values are made for every head. Absorbed
(decoding): W_UK moves to the query and W_UV to the output, so that attention runs over the cached latents themselves;
`MLA.absorb` multiplies these products out once for each cache, and no gradient reaches the weights through them.

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.1, equations 1-11; the latent norms are told in section 4.2; absorbed
form: DeepSeek-V2 (arXiv 2405.04434) appendix C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.config import ModelConfig, UserError
from moe.layers.basics import RMSNorm, Rotary, rotate
from moe.layers.cache import LatentCache


class Absorbed(NamedTuple):
    """What decoding multiplies by, one matrix for each place where a token's row is; see `MLA.absorb`."""

    down: Tensor
    """[Q + C + R, D]: W_DQ, W_DKV, W_KR. Without a query latent Q is absent."""
    query: Tensor
    """[H (C + R), Q or D]: each head's scale * W_UK^T W_UQ, then scale * W_QR."""
    out: Tensor
    """[D, H C]: each head's W_O W_UV."""


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
        self._down_widths = [*([q_lora_rank] if q_lora_rank else []), kv_lora_rank, qk_rope_head_dim]
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
        segment_ids: Tensor | ops.Documents | None = None,
        cache: LatentCache | None = None,
        layer: int = 0,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        positions [B, T] or [T] (default: 0, 1, ...; after what the cache holds). segment_ids [B, T], or
        ops.documents of them, made once for all layers: documents packed in a row do not see each other. cache: earlier
        tokens are read from, and these written to, its `layer`; the caller advances it. angles:
        `self.rotary(positions)`, made once too.
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

    def _query(self, x: Tensor) -> Tensor:
        """[..., D] -> nope and rope channels [..., H, nope + R] of each head, not rotated yet."""
        q = self.q_b(self.q_a_norm(self.q_a(x))) if self.q_lora_rank else self.q(x)
        return q.view(*x.shape[:-1], self.heads, self.nope + self.rope)

    def _latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> c_kv [..., C] and the shared rotary key [..., 1, R], not rotated yet."""
        c_kv, k_rope = self.kv_a(x).split_with_sizes([self.kv_lora_rank, self.rope], -1)
        return self.kv_a_norm(c_kv), k_rope.unsqueeze(-2)

    def _expanded(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        segment_ids: Tensor | ops.Documents | None,
        cache: LatentCache | None,
        layer: int,
    ) -> Tensor:
        """Tokens attend to themselves alone; an empty cache keeps their latents."""
        batch, time, _ = x.shape
        q, (c_kv, k_rope) = self._query(x), self._latent(x)
        kv = self.kv_b(c_kv).view(batch, time, self.heads, self.nope + self.v)
        if cache is not None:
            cache.write(layer, c_kv, rotate(k_rope, cos, sin).squeeze(2))
        if ops.path_for(q) == "native":
            assert not isinstance(segment_ids, ops.Documents)  # nothing is prepared for CPUs
            o = ops.latent_attention(q, kv, k_rope.squeeze(2), cos, sin, self.scale, segment_ids)
        else:
            (q_nope, q_rope), (k_nope, v) = q.split([self.nope, self.rope], -1), kv.split([self.nope, self.v], -1)
            q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
            k = torch.cat((k_nope, rotate(k_rope, cos, sin).expand(-1, -1, self.heads, -1)), -1)
            o = ops.attention(q, k, v, self.scale, segment_ids)
        return self.o(o.reshape(batch, time, self.heads * self.v))

    @torch.no_grad()
    def absorb(self) -> Absorbed:
        """Today's weights multiplied out, in fp32 or wider, then in their own dtype.

            score = scale * ([W_UQ c_q] . [W_UK c_kv] + [W_QR c_q]_t . k_rope)      of one head; [.]_t: rotated
                  = [scale * W_UK^T W_UQ c_q] . c_kv + [scale * W_QR c_q]_t . k_rope
            W_O v = (W_O W_UV) z,   z = softmax(score) c_kv

        The scale is in the query matrix, so scores are ready for the softmax.
        """
        up = self.q_b if self.q_lora_rank else self.q
        dtype, wide = up.weight.dtype, torch.promote_types(up.weight.dtype, torch.float32)
        w_q = up.weight.to(wide).view(self.heads, self.nope + self.rope, -1) * self.scale
        w_kv = self.kv_b.weight.to(wide).view(self.heads, self.nope + self.v, self.kv_lora_rank)
        w_uk, w_uv = w_kv.split_with_sizes([self.nope, self.v], 1)
        query = torch.cat((w_uk.mT @ w_q[:, : self.nope], w_q[:, self.nope :]), 1).flatten(0, 1)
        w_o = self.o.weight.to(wide).view(-1, self.heads, self.v).transpose(0, 1)
        out = (w_o @ w_uv).transpose(0, 1).flatten(1)
        down = torch.cat([*([self.q_a.weight] if self.q_lora_rank else []), self.kv_a.weight])
        return Absorbed(*(ops.for_few_rows(w.to(dtype)) for w in (down, query, out)))

    def _absorbed(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache, layer: int) -> Tensor:
        """Tokens attend to what the cache holds, and to themselves.

        One token's time goes into calls, not into arithmetic: rows [B * T, .] stay flat, and the queries of all heads
        stand beside the token's own key, so that one product rotates them all.
        """
        batch, time, _ = x.shape
        x, heads, width = x.flatten(0, 1), self.heads, self.kv_lora_rank + self.rope
        if layer not in cache.absorbed:
            cache.absorbed[layer] = self.absorb()
        down, query, out = cache.absorbed[layer]

        *c_q, c_kv, k_rope = F.linear(x, down).split_with_sizes(self._down_widths, 1)
        q = F.linear(self.q_a_norm(c_q[0]) if c_q else x, query)
        rows = torch.cat((q, self.kv_a_norm(c_kv), k_rope), 1).view(batch, time, heads + 1, width)
        rope = rows[..., self.kv_lora_rank :]
        rope.copy_(_turned(rope, cos, sin, cache))
        q, key = rows.split_with_sizes([heads, 1], 2)
        cache.append(layer, key.squeeze(2))

        # a single bf16 row: oneDNN's set-up costs more than the conversion (decoding.py), and without it fp32 is faster
        dtype = torch.float32 if _on_onednn(x) and len(x) == 1 else x.dtype
        latents = cache.seen(layer, time).to(dtype)
        s = _scores(q.reshape(batch, time * heads, width).to(dtype), latents)
        later = cache.later(time)
        if later is not None:
            s.view(batch, time, heads, -1).add_(later.unsqueeze(2))
        z = torch.bmm(s.softmax(-1), latents[..., : self.kv_lora_rank])
        return F.linear(z.view(batch * time, -1).to(x.dtype), out).view(batch, time, -1)


def _turned(rope: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache) -> Tensor:
    """`rotate`, as one product with the rotated unit vectors, which the first layer of a step makes for all."""
    if cache.turn is None or cache.turn[0] is not cos:
        wide = torch.promote_types(rope.dtype, torch.float32)
        one = torch.eye(rope.shape[-1], dtype=wide, device=rope.device)
        turn = rotate(one.view(1, 1, *one.shape), cos, sin)
        cache.turn = cos, turn[0, 0] if turn.numel() == one.numel() else turn
    turn = cache.turn[1]
    return rope.to(turn.dtype) @ turn


def _on_onednn(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, M, W], [B, S, W] -> contiguous [B, M, S]."""
    if _on_onednn(query):  # it copies its right operand, so the many keys stand left: 2-3 times faster (measured)
        return torch.bmm(keys, query.mT).mT.contiguous()
    return torch.bmm(query, keys.mT)


ATTENTIONS = {"mla": MLA.from_config}
