"""Which tensor of a DeepSeek-V3 folder is which part of our model: one table, read in both directions.

The folder keeps every expert and every gate and up matrix apart; we stack them. A `Piece` is one tensor of the folder
and the part of ours that it fills, so reading copies into `state[piece.key][piece.where]` and writing takes from there.

    model.layers.N.mlp.experts.E.up_proj.weight [F, D]      layers.N.ffn.experts.w13 [E, F:2F]
    model.layers.{num_hidden_layers + k}.*                  mtp.k.*; the released layout keeps MTP behind the last layer

No permutation anywhere: our rotary channels are interleaved and our MTP projection reads the embedding first, as the
released weights do. Source: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig

BLOCK = (128, 128)  # of weights that share one fp8 scale, where config.json is silent
READABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3")
ROTARY_TABLE = re.compile(r"(.+\.)?rotary_emb\.inv_freq")  # older exporters saved it; it follows from config.json


class Piece(NamedTuple):
    name: str
    """in the folder"""
    key: str
    """in Transformer.state_dict()"""
    where: tuple[int | slice, ...] = ()


def layout(config: ModelConfig) -> Iterator[Piece]:
    """Every tensor of the folder, MTP modules included, each part of our model exactly once."""
    yield Piece("model.embed_tokens.weight", "embed.weight")
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer, f"layers.{layer}")
    yield Piece("model.norm.weight", "norm.weight")
    if not config.tie_word_embeddings:
        yield Piece("lm_head.weight", "head.weight")
    for depth in range(config.num_nextn_predict_layers):
        there, here = _mtp_prefix(config, depth), f"mtp.{depth}"
        yield Piece(f"{there}.enorm.weight", f"{here}.embed_norm.weight")
        yield Piece(f"{there}.hnorm.weight", f"{here}.hidden_norm.weight")
        yield Piece(f"{there}.eh_proj.weight", f"{here}.proj.weight")
        yield from _block(config, config.num_hidden_layers + depth, f"{here}.block")
        yield Piece(f"{there}.shared_head.norm.weight", f"{here}.norm.weight")


def copies(config: ModelConfig) -> Iterator[Piece]:
    """Tensors of the main model that the released layout repeats under every MTP module."""
    head = "embed.weight" if config.tie_word_embeddings else "head.weight"
    for depth in range(config.num_nextn_predict_layers):
        there = _mtp_prefix(config, depth)
        yield Piece(f"{there}.embed_tokens.weight", "embed.weight")
        yield Piece(f"{there}.shared_head.head.weight", head)


def empties(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Tensors without a number in them: transformers builds, and misses, shared experts of width 0."""
    if config.n_shared_experts or not config.n_routed_experts:
        return {}
    found, d = {}, config.hidden_size
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        if not config.is_dense(layer):
            shared = f"model.layers.{layer}.mlp.shared_experts"
            found[f"{shared}.gate_proj.weight"] = found[f"{shared}.up_proj.weight"] = (0, d)
            found[f"{shared}.down_proj.weight"] = (d, 0)
    return found


def misfits(
    config: ModelConfig,
    state: dict[str, Tensor],
    stored: dict[str, tuple[tuple[int, ...], str]],
    block: tuple[int, int] | None,
) -> list[str]:
    """What keeps a folder from being this model, a phrase for each tensor. stored: name -> (shape, dtype)."""
    pieces = list(layout(config))
    shapes = {p.name: tuple(state[p.key][p.where].shape) for p in [*pieces, *copies(config)]} | empties(config)
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    needed = [p.name for p in pieces]
    found = []
    for name in [n for n in stored if n in shapes]:
        shape, dtype = shapes[name], stored[name][1]
        if dtype == "F8_E4M3" and len(shape) == 2:
            needed.append(f"{name}_scale_inv")
            shapes[needed[-1]] = tuple(-(-n // b) for n, b in zip(shape, block or BLOCK, strict=True))
        elif dtype not in READABLE:
            found.append(f"{name} has dtype {dtype}, not one of {', '.join(READABLE)}")
    found += [f"{name} is missing" for name in needed if name not in stored]
    for name, (shape, _) in stored.items():
        if name not in shapes and not ROTARY_TABLE.fullmatch(name):
            found.append(f"{name} is unexpected")
        elif name in shapes and shape != shapes[name]:
            found.append(f"{name} has shape {list(shape)} instead of {list(shapes[name])}")
    return found


def mtp_depth(config: ModelConfig, name: str) -> int | None:
    """k for a tensor of MTP module k, None for one of the main model."""
    match = re.match(r"model\.layers\.(\d{1,9})\.", name)
    depth = int(match[1]) - config.num_hidden_layers if match else -1
    return depth if depth >= 0 else None


def _mtp_prefix(config: ModelConfig, depth: int) -> str:
    return f"model.layers.{config.num_hidden_layers + depth}"


def _block(config: ModelConfig, layer: int, here: str) -> Iterator[Piece]:
    there = f"model.layers.{layer}"
    attention = {
        "q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj", "q": "q_proj", "kv_a": "kv_a_proj_with_mqa",
        "kv_a_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "o": "o_proj",
    }  # fmt: skip
    yield Piece(f"{there}.input_layernorm.weight", f"{here}.attn_norm.weight")
    for ours in ["q_a", "q_a_norm", "q_b"] if config.q_lora_rank else ["q"]:
        yield Piece(f"{there}.self_attn.{attention[ours]}.weight", f"{here}.attn.{ours}.weight")
    for ours in ["kv_a", "kv_a_norm", "kv_b", "o"]:
        yield Piece(f"{there}.self_attn.{attention[ours]}.weight", f"{here}.attn.{ours}.weight")
    yield Piece(f"{there}.post_attention_layernorm.weight", f"{here}.ffn_norm.weight")
    if config.is_dense(layer):
        yield from _swiglu(f"{there}.mlp", f"{here}.ffn", config.intermediate_size)
        return
    yield Piece(f"{there}.mlp.gate.weight", f"{here}.ffn.router.weight")
    yield Piece(f"{there}.mlp.gate.e_score_correction_bias", f"{here}.ffn.router.bias")
    width = config.moe_intermediate_size
    for e in range(config.n_routed_experts):
        expert = f"{there}.mlp.experts.{e}"
        yield Piece(f"{expert}.gate_proj.weight", f"{here}.ffn.experts.w13", (e, slice(0, width)))
        yield Piece(f"{expert}.up_proj.weight", f"{here}.ffn.experts.w13", (e, slice(width, 2 * width)))
        yield Piece(f"{expert}.down_proj.weight", f"{here}.ffn.experts.w2", (e,))
    if config.n_shared_experts:
        yield from _swiglu(f"{there}.mlp.shared_experts", f"{here}.ffn.shared", config.n_shared_experts * width)


def _swiglu(there: str, here: str, width: int) -> Iterator[Piece]:
    yield Piece(f"{there}.gate_proj.weight", f"{here}.w13.weight", (slice(0, width),))
    yield Piece(f"{there}.up_proj.weight", f"{here}.w13.weight", (slice(width, 2 * width),))
    yield Piece(f"{there}.down_proj.weight", f"{here}.w2.weight")


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """[O, I] float8 with one scale a block [ceil(O/b0), ceil(I/b1)] -> [O, I] fp32.

    The stored `weight_scale_inv` is the multiplier, whatever its name says. The last block of a row or column may be
    smaller than the others.
    """
    rows, columns = weight.shape
    scale = scale.to(torch.float32).repeat_interleave(block[0], 0)[:rows]
    return weight.to(torch.float32) * scale.repeat_interleave(block[1], 1)[:, :columns]
