"""Steps of decoding by the native kernels: one call a step for the whole stack, for the stock model on a CPU.

    step = stepper(model, cache)        None where `why_not(model, cache)` has a reason; the PyTorch path answers then
    out = step(ids)                     B * T ids, T new tokens of each sequence -> logits, experts, the next ids

Attention is MLA's absorbed form with its factors left apart (W_UK, W_UV, W_O), so that every weight is read where it
lies: nothing is copied, and nothing can be out of date. T > 1 is for drafts: a token sees those before it.

Source: kernels/native/decode.cpp, where the numerics are told.
"""

from __future__ import annotations

from ctypes import POINTER, addressof, c_float, c_int64, cast
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from moe import ops
from moe.kernels.native.decode import Decode, DecodeLayer, decode_step
from moe.kernels.native.library import DTYPES, pointer, threads
from moe.layers.attention import MLA
from moe.layers.basics import RMSNorm, SwiGLU, autocast_dtype
from moe.layers.block import Block
from moe.layers.cache import LatentCache
from moe.layers.experts import Experts
from moe.layers.moe import MoE
from moe.layers.router import Router
from moe.model import Transformer

if TYPE_CHECKING:
    from moe.inference.decoding import Sampling

STOCK = {nn.Embedding, nn.Linear, nn.ModuleList, Block, MLA, RMSNorm, SwiGLU, MoE, Router, Experts, Transformer}


class Stepped(NamedTuple):
    """What a step of any path leaves. Tensors of the native one are written over by its next step."""

    logits: Tensor
    """[B * T, V] fp32."""
    hidden: Tensor
    """[B * T, D] states after the last norm, in the weights' dtype."""
    experts: dict[str, Tensor]
    """[B, T, K] choices by layer name; a copy, and empty unless asked for, where the step is native."""
    drawn: list[int] | None = None
    """[B * T] next ids, where the step drew them itself."""
    logprobs: list[float] = []
    """[B * T]: theirs; NaN where a logit is not finite."""


def why_not(model: Transformer, cache: LatentCache) -> str:
    """Why the native kernels cannot decode with this model as it is, or nothing."""
    weight = model.embed.weight
    if (path := ops.path_for(weight)) != "native":
        return f"the path is {path}"
    if type(cache) is not LatentCache or cache.latents[0].dtype != weight.dtype:
        return f"the cache is a {type(cache).__name__} of {cache.latents[0].dtype}"
    if model.training or autocast_dtype(weight):
        return "the model is in training mode" if model.training else "autocast is on"
    for name, module in model.named_modules():
        if name.partition(".")[0] == "mtp":  # no part in decoding
            continue
        if type(module) not in STOCK:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name} has hooks"
        for key, p in module.named_parameters(recurse=False):
            if (
                key == "bias"
                or p.dtype != weight.dtype
                or p.device.type != "cpu"
                or not p.is_contiguous()
                or not p.numel()
            ):
                return f"{name}.{key} is {p.dtype} on {p.device}, {tuple(p.shape)} with strides {p.stride()}"
    if len({m.eps for m in model.modules() if isinstance(m, RMSNorm)}) > 1:
        return "norms differ in their eps"
    blocks = _blocks(model)
    rules = {_rule(block.ffn) for block in blocks if isinstance(block.ffn, MoE)}
    if (
        [block.layer for block in blocks] != list(range(len(blocks)))
        or len(rules) > 1
        or len(set(map(_widths, blocks))) > 1
    ):
        return "layers differ in their shapes or routing, or stand in another order"
    return ""


def _blocks(model: Transformer) -> list[Block]:
    return [layer for layer in model.layers if isinstance(layer, Block)]


def _widths(block: Block) -> tuple:
    """h, q, c, nope, rope, v and scale."""
    a = block.attn
    return a.heads, a.q_lora_rank or 0, a.kv_lora_rank, a.nope, a.rope, a.v, a.scale


def _rule(ffn: MoE) -> tuple:
    """e, k, f, groups, kept, sigmoid, norm, scaling."""
    r = ffn.router
    width = ffn.experts.w2.shape[2]
    return r.n_experts, r.k, width, r.n_group, r.topk_group, r.scoring_func == "sigmoid", r.norm, r.scaling


def stepper(model: Transformer, cache: LatentCache, keep_experts: bool = False) -> Stepper | None:
    return None if why_not(model, cache) else Stepper(model, cache, keep_experts)


class Stepper:
    """Holds what a step needs; see the module. The caller advances the cache, and may shrink its batch between steps."""

    def __init__(self, model: Transformer, cache: LatentCache, keep_experts: bool = False) -> None:
        self.model, self.cache, self.keep_experts = model, cache, keep_experts
        self.angles, blocks = model.rotary(torch.arange(cache.capacity)), _blocks(model)
        self.layers = (DecodeLayer * len(blocks))(*map(_layer, blocks))
        self.routed = [i for i, block in enumerate(blocks) if isinstance(block.ffn, MoE)]
        head, dtype = model.head.weight, DTYPES[model.embed.weight.dtype]
        self.args = a = Decode(
            layers=len(blocks), capacity=cache.capacity, d=head.shape[1], vocab=head.shape[0], dtype=dtype,
            threads=threads(), eps=model.norm.eps, layer=cast(self.layers, POINTER(DecodeLayer)),
            cos=pointer(self.angles[0]), sin=pointer(self.angles[1]), embed=pointer(model.embed.weight),
            last_norm=pointer(model.norm.weight), head=pointer(head),
        )  # fmt: skip
        a.h, a.q, a.c, a.nope, a.rope, a.v, a.scale = _widths(blocks[0])
        if self.routed:
            a.e, a.k, a.f, a.groups, a.kept, a.sigmoid, a.norm, a.scaling = _rule(blocks[self.routed[0]].ffn)
        self.latents: list[Tensor] | None = None  # those that the layers point to
        self.rows = 0

    def __call__(self, ids: list[int], sampling: Sampling | None = None, number: int = 0) -> Stepped:
        """B * T ids, sequence by sequence. Raises ValueError for unknown ids, and where the cache has no room
        for T more tokens.

        sampling: how the next ids are drawn, with each stream's numbers from `number` on; by default the best are. With
        top_p < 1 drawing is left to the caller.
        """
        a, cache = self.args, self.cache
        batch = len(cache.lengths)
        a.b, a.t = batch, len(ids) // batch
        if cache.longest + a.t > cache.capacity:
            raise ValueError(
                f"cache of {cache.capacity} tokens cannot hold {cache.longest + a.t}; make it with a larger capacity"
            )
        if min(ids) < 0 or max(ids) >= a.vocab:
            raise ValueError(f"an id is outside [0, {a.vocab})")
        if self.rows != len(ids):
            self._make_room(len(ids))
        if self.latents is not cache.latents:
            self.latents = cache.latents
            for layer, latents in zip(self.layers, cache.latents):
                layer.latents = pointer(latents)
        self.ids[:] = ids  # type: ignore[assignment]
        a.lengths, a.temperature = pointer(cache.lengths), 0.0
        if sampling is not None and sampling.temperature > 0:
            a.temperature, a.keys, a.number = sampling.temperature, pointer(sampling.keys), number
        decode_step(a)
        experts: dict[str, Tensor] = {}
        if self.keep_experts:
            chosen = self.experts.to(torch.int16, copy=True).view(len(self.routed), batch, a.t, a.k)
            experts = {f"layers.{i}": ids for i, ids in zip(self.routed, chosen)}
        if sampling is not None and sampling.top_p < 1:
            return Stepped(self.logits, self.hidden, experts)
        return Stepped(self.logits, self.hidden, experts, self.drawn[:], self.logprobs[:])

    def _make_room(self, rows: int) -> None:
        a, weight = self.args, self.model.embed.weight
        self.rows, self.ids = rows, (c_int64 * rows)()
        self.drawn, self.logprobs = (c_int64 * rows)(), (c_float * rows)()
        self.logits, self.hidden = torch.empty(rows, a.vocab), weight.new_empty(rows, a.d)
        self.experts = torch.empty(len(self.routed), rows, a.k, dtype=torch.int64)
        for i, chosen in zip(self.routed, self.experts):
            self.layers[i].chosen = pointer(chosen)
        a.tokens, a.drawn, a.logprob = addressof(self.ids), addressof(self.drawn), addressof(self.logprobs)
        a.logits, a.hidden = pointer(self.logits), pointer(self.hidden)


def _layer(block: Block) -> DecodeLayer:
    attn, ffn = block.attn, block.ffn
    layer = DecodeLayer(
        attn_norm=pointer(block.attn_norm.weight), kv_a=pointer(attn.kv_a.weight), o=pointer(attn.o.weight),
        kv_a_norm=pointer(attn.kv_a_norm.weight), kv_b=pointer(attn.kv_b.weight), ffn_norm=pointer(block.ffn_norm.weight),
    )  # fmt: skip
    if attn.q_lora_rank:
        layer.q_a, layer.q_a_norm = pointer(attn.q_a.weight), pointer(attn.q_a_norm.weight)
        layer.q_b = pointer(attn.q_b.weight)
    else:
        layer.q_b = pointer(attn.q.weight)
    dense = ffn
    if isinstance(ffn, MoE):
        layer.router, layer.bias = pointer(ffn.router.weight), pointer(ffn.router.bias)
        layer.w13, layer.w2 = pointer(ffn.experts.w13), pointer(ffn.experts.w2)
        dense = ffn.shared
    if dense is not None:
        layer.up, layer.down, layer.g = pointer(dense.w13.weight), pointer(dense.w2.weight), dense.w2.weight.shape[1]
    return layer
