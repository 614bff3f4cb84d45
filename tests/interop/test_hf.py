"""A DeepSeek-V3 folder means the same to us and to transformers, survives accidents, and is refused where it differs.

Every test draws fresh shapes, weights and tokens; a failing one prints the seed that made them.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers asks the hub otherwise
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import dataclasses
import json
import math
import random
import resource
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moe.config import ModelConfig, UserError
from moe.interop.hf import from_hf, to_hf
from moe.interop.hf_names import dequantise
from moe.model import Transformer

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4, beta_slow=1)
VARIANTS = {
    "full-rank queries": dict(q_lora_rank=None, n_group=1, topk_group=1, first_k_dense_replace=0),
    "4 groups": dict(n_group=4, topk_group=2, first_k_dense_replace=1),
    "8 groups of two": dict(n_group=8, topk_group=4, num_experts_per_tok=5, first_k_dense_replace=2),
    "yarn like V3": dict(rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
    "yarn like V2-Lite": dict(rope_scaling=dict(YARN, mscale=0.707, mscale_all_dim=0.707), q_lora_rank=None),
    "yarn, two mscales": dict(rope_scaling=dict(YARN, mscale=1.3, mscale_all_dim=0.6)),
    "yarn without mscale_all_dim": dict(rope_scaling=dict(YARN, mscale=0.707)),
    "yarn without mscale": dict(rope_scaling=dict(YARN, mscale_all_dim=0.8), n_group=4, topk_group=3),
    "yarn with neither": dict(rope_scaling={**YARN, "factor": 2}),
    "tied embeddings": dict(tie_word_embeddings=True),
    "no shared expert": dict(n_shared_experts=0),
    "one expert, gates not normalised": dict(num_experts_per_tok=1, norm_topk_prob=False, n_shared_experts=2),
    "every group open": dict(n_group=8, topk_group=8),
    "groups of one": dict(n_group=16, topk_group=16),
    "dense": dict(n_routed_experts=0, first_k_dense_replace=0),
    "dense but for MTP": dict(first_k_dense_replace=3),
    "other theta": dict(rope_theta=500.0, max_position_embeddings=64),
}  # fmt: skip


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def shape(rng, **changes) -> ModelConfig:
    """A small model with odd sizes."""
    values = dict(
        vocab_size=rng.randint(40, 60), hidden_size=rng.randint(17, 31), num_hidden_layers=3, first_k_dense_replace=1,
        intermediate_size=rng.randint(11, 23), num_attention_heads=rng.choice([1, 2, 3]),
        q_lora_rank=rng.randint(7, 13), kv_lora_rank=rng.randint(7, 13), qk_nope_head_dim=rng.randint(3, 9),
        qk_rope_head_dim=rng.choice([2, 6, 8]), v_head_dim=rng.randint(3, 9), max_position_embeddings=128,
        n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=rng.randint(5, 9),
        n_group=4, topk_group=2, routed_scaling_factor=rng.choice([1.0, 2.5]), num_nextn_predict_layers=0,
        initializer_range=0.12, bias_update_speed=[[0, 0.01], [0.5, 0.0]],
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})


def make(config: ModelConfig) -> Transformer:
    """Norms away from 1, router biases large and of both signs, weights small: rounding stays far below 1e-5."""
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("router.weight"):
                parameter.mul_(6)  # affinities all over (0, 1)
        for name, buffer in model.named_buffers():
            assert name.endswith("router.bias")
            buffer.uniform_(-3, 3)
    return model


@torch.no_grad()
def clear_tokens(model: Transformer, rng, rows: int = 2, time: int = 70) -> torch.Tensor:
    """Tokens [B, T] for which no choice of groups or experts hangs on the last bits: two programs may round apart."""
    for _ in range(50):
        tokens = torch.tensor([[rng.randrange(model.config.vocab_size) for _ in range(time)] for _ in range(rows)])
        gaps = []

        def look(router, args, record, gaps=gaps):
            x = args[0].reshape(-1, args[0].shape[-1])
            biased = torch.sigmoid(F.linear(x, router.weight)) + router.bias
            groups = biased.view(len(x), router.n_group, -1)
            if router.topk_group < router.n_group:
                ranked = groups.topk(2, -1).values.sum(-1).sort(-1, descending=True)
                gaps.append(ranked.values[:, router.topk_group - 1] - ranked.values[:, router.topk_group])
                groups = groups.gather(1, ranked.indices[:, : router.topk_group, None].expand(-1, -1, groups.shape[-1]))
            best = groups.flatten(1).sort(-1, descending=True).values
            if best.shape[1] > router.k:
                gaps.append(best[:, router.k - 1] - best[:, router.k])

        hooks = [m.register_forward_hook(look) for m in model.modules() if type(m).__name__ == "Router"]
        model(tokens)
        for hook in hooks:
            hook.remove()
        if not gaps or min(float(g.min()) for g in gaps) > 2e-6:
            return tokens
    raise AssertionError("no clear tokens found")


def theirs(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zero-element tensors, where there is no shared expert
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True, **options
        )
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"], info
    model.set_experts_implementation("eager")
    return model, info


def their_name(name: str) -> str:
    """Our parameter name -> transformers', written apart from the code under test."""
    for ours, them in {
        "embed.": "model.embed_tokens.", "head.": "lm_head.", "norm.": "model.norm.", "layers.": "model.layers.",
    }.items():  # fmt: skip
        if name.startswith(ours):
            name = them + name.removeprefix(ours)
            break
    for ours, them in {
        ".attn_norm.": ".input_layernorm.", ".ffn_norm.": ".post_attention_layernorm.", ".attn.q_a_norm.":
        ".self_attn.q_a_layernorm.", ".attn.kv_a_norm.": ".self_attn.kv_a_layernorm.", ".attn.kv_a.":
        ".self_attn.kv_a_proj_with_mqa.", ".attn.q.": ".self_attn.q_proj.", ".attn.q_a.": ".self_attn.q_a_proj.",
        ".attn.q_b.": ".self_attn.q_b_proj.", ".attn.kv_b.": ".self_attn.kv_b_proj.", ".attn.o.": ".self_attn.o_proj.",
        ".ffn.router.weight": ".mlp.gate.weight", ".ffn.experts.w13": ".mlp.experts.gate_up_proj",
        ".ffn.experts.w2": ".mlp.experts.down_proj", ".ffn.shared.": ".mlp.shared_experts.", ".ffn.": ".mlp.",
    }.items():  # fmt: skip
        name = name.replace(ours, them)
    return name


def compare_gradients(model, them, tokens):
    for m, logits in ((model, model(tokens, mtp=False).logits), (them, them(tokens).logits)):
        m.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {n: p.grad for n, p in them.named_parameters()}
    seen = 0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            continue
        name = their_name(name)
        if name.endswith("w13.weight"):
            want = torch.cat([grads[name.replace("w13", part)] for part in ("gate_proj", "up_proj")])
            seen += 2
        else:
            want = grads[name.replace(".w2.", ".down_proj.")]
            seen += 1
        scale = float(want.abs().max())
        torch.testing.assert_close(
            parameter.grad, want, rtol=2e-4, atol=2e-5 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert seen == len([g for g in grads.values() if g.numel()])


# ------------------------------------------------------------------------------------------- parity with transformers


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_our_logits_and_gradients(variant, rng, tmp_path):
    config = shape(rng, **VARIANTS[variant])
    model = make(config)
    to_hf(model, tmp_path / "out")
    them, info = theirs(tmp_path / "out")
    assert not info["unexpected_keys"]
    tokens = clear_tokens(model, rng)
    torch.testing.assert_close(model(tokens).logits, them(tokens).logits, rtol=1e-5, atol=1e-5)
    compare_gradients(model, them, tokens)

    back = from_hf(tmp_path / "out")
    assert back.config == config
    assert [n for n, _ in back.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (name, ours), (other, read) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, read), name
    assert torch.equal(back(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "groups of one"])  # which transformers cannot run
def test_a_model_saved_by_transformers_computes_the_same_here(variant, rng, tmp_path):
    config = shape(rng, **VARIANTS[variant])
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling:
        rope |= {k: v for k, v in config.rope_scaling.items() if k != "type"} | {"rope_type": "yarn"}
    same = [
        "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "q_lora_rank",
        "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "n_group",
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "topk_group",
        "norm_topk_prob", "routed_scaling_factor", "tie_word_embeddings", "initializer_range",
    ]  # fmt: skip
    dense = config.first_k_dense_replace if config.n_routed_experts else config.num_hidden_layers
    spec = transformers.DeepseekV3Config(
        **{k: getattr(config, k) for k in same}, num_key_value_heads=config.num_attention_heads, rope_parameters=rope,
        first_k_dense_replace=dense, num_nextn_predict_layers=0, attn_implementation="eager",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zero-element tensors, where there is no shared expert
        them = transformers.DeepseekV3ForCausalLM(spec)
    with torch.no_grad():
        for name, tensor in them.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-3, 3)
    them.set_experts_implementation("eager")
    them.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_hf(tmp_path / "theirs")
    assert model.config.num_nextn_predict_layers == 0
    tokens = clear_tokens(model, rng)
    torch.testing.assert_close(model(tokens).logits, them(tokens).logits, rtol=1e-5, atol=1e-5)


def test_grouped_experts_and_sdpa_in_transformers_agree_too(rng, tmp_path):
    even = dict(hidden_size=24, moe_intermediate_size=8)  # its grouped matrix product wants rows of 16 bytes
    model = make(shape(rng, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0), **even))
    to_hf(model, tmp_path / "out")
    them = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    them.set_experts_implementation("grouped_mm")
    tokens = clear_tokens(model, rng)
    torch.testing.assert_close(model(tokens).logits, them(tokens).logits, rtol=1e-5, atol=1e-5)


def test_an_export_saved_again_by_transformers_keeps_our_knobs(rng, tmp_path):
    config = shape(rng, rope_scaling=dict(YARN, mscale=0.707), seq_aux_alpha=0.5, name="mine", initializer_range=None)
    model = make(config)
    to_hf(model, tmp_path / "one")
    theirs(tmp_path / "one")[0].save_pretrained(tmp_path / "two")
    again = from_hf(tmp_path / "two")
    tokens = clear_tokens(model, rng)
    assert (again.config.name, again.config.seq_aux_alpha, again.config.initializer_range) == ("mine", 0.5, None)
    torch.testing.assert_close(model(tokens).logits, again(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factor", "overall"), [(1.0, 0.5), (1.25, 0.5), (1.0, None)])
def test_attention_factor_of_transformers_is_understood(factor, overall, rng, tmp_path):
    model = make(shape(rng, rope_scaling=dict(YARN)))
    folder = to_hf(model, tmp_path / "out")
    edit(folder, rope_scaling=dict(YARN, attention_factor=factor, mscale_all_dim=overall))
    them, read = theirs(folder)[0], from_hf(folder)
    tokens = clear_tokens(read, rng)
    torch.testing.assert_close(read(tokens).logits, them(tokens).logits, rtol=1e-5, atol=1e-5)


def test_ambiguous_yarn_is_read_as_deepseek_means_it_and_told(rng, tmp_path):
    model = make(shape(rng, rope_scaling=dict(YARN, mscale=0.707)))
    folder = to_hf(model, tmp_path / "out")
    edit(folder, rope_scaling=dict(YARN, mscale=0.707))  # without the attention_factor that we write
    with pytest.warns(UserWarning, match="both mscale and mscale_all_dim"):
        read = from_hf(folder)
    assert read.config == model.config


def test_another_epsilon_is_told_since_transformers_ignores_it_in_the_latents(rng, tmp_path):
    model = make(shape(rng, rms_norm_eps=1e-3))
    with pytest.warns(UserWarning, match="rms_norm_eps=0.001"):
        to_hf(model, tmp_path / "out")
    them = theirs(tmp_path / "out")[0]
    tokens = clear_tokens(model, rng)
    assert from_hf(tmp_path / "out").config.rms_norm_eps == 1e-3
    for block in model.layers:  # what transformers computes: the reason for the warning
        block.attn.kv_a_norm.eps = block.attn.q_a_norm.eps = 1e-6
    torch.testing.assert_close(model(tokens).logits, them(tokens).logits, rtol=1e-5, atol=1e-5)


def test_bf16_weights_travel_unchanged_and_router_biases_stay_fp32(rng, tmp_path):
    model = make(shape(rng, num_nextn_predict_layers=1)).to(torch.bfloat16)
    to_hf(model, tmp_path / "out")
    read = from_hf(tmp_path / "out")
    for (name, ours), other in zip(model.state_dict().items(), read.state_dict().values(), strict=True):
        assert ours.dtype == other.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16)
        assert torch.equal(ours, other)
    assert from_hf(tmp_path / "out", dtype=torch.float32).embed.weight.dtype == torch.float32
    assert theirs(tmp_path / "out")[0].dtype == torch.bfloat16
    to_hf(model, tmp_path / "wide", dtype=torch.float32)
    assert from_hf(tmp_path / "wide").embed.weight.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------- MTP

CHAINED_AFTER_NORM = False  # what a deeper MTP module reads: the block's output before its norm (moe/layers/mtp.py)


class Official:
    """DeepSeek-V3 in float64 from the tensors of an exported folder, by their official names, one expert at a time."""

    def __init__(self, folder):
        self.t = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.c = json.loads((folder / "config.json").read_text())

    def norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"]).sqrt() * self.t[f"{name}.weight"]

    def mlp(self, x, name):
        gate, up, down = (self.t[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def turn(self, x):
        """[T, H, R], pairs (0, 1), (2, 3), ... as complex numbers."""
        angle = torch.arange(len(x)).double()[:, None] * self.c["rope_theta"] ** (
            -torch.arange(0, x.shape[-1], 2).double() / x.shape[-1]
        )
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)[:, None]
        return torch.view_as_real(z).flatten(-2)

    def attention(self, x, name):
        c, t, time = self.c, self.t, len(x)
        nope, rope, heads = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["num_attention_heads"]
        q = self.norm(x @ t[f"{name}.q_a_proj.weight"].T, f"{name}.q_a_layernorm") @ t[f"{name}.q_b_proj.weight"].T
        q = q.view(time, heads, nope + rope)
        both = x @ t[f"{name}.kv_a_proj_with_mqa.weight"].T
        latent, k_rope = both[:, : c["kv_lora_rank"]], both[:, c["kv_lora_rank"] :]
        kv = self.norm(latent, f"{name}.kv_a_layernorm") @ t[f"{name}.kv_b_proj.weight"].T
        kv = kv.view(time, heads, nope + c["v_head_dim"])
        q = torch.cat([q[..., :nope], self.turn(q[..., nope:])], -1)
        k = torch.cat([kv[..., :nope], self.turn(k_rope[:, None]).expand(-1, heads, -1)], -1)
        score = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(nope + rope)
        score = score.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", score, kv[..., nope:]).flatten(1) @ t[f"{name}.o_proj.weight"].T

    def experts(self, x, name):
        c = self.c
        s = torch.sigmoid(x @ self.t[f"{name}.gate.weight"].T)
        rows = []
        for token, affinity in zip(x, s, strict=True):
            biased = affinity + self.t[f"{name}.gate.e_score_correction_bias"]
            groups = biased.view(c["n_group"], -1)
            best = groups.sort(-1, descending=True).values[:, :2].sum(-1).topk(c["topk_group"]).indices.tolist()
            size = groups.shape[1]
            inside = [e for e in range(len(biased)) if e // size in best]
            chosen = sorted(inside, key=lambda e, b=biased: -float(b[e]))[: c["num_experts_per_tok"]]
            total = sum(float(affinity[e]) for e in chosen) if c["norm_topk_prob"] else 1.0
            y = self.mlp(token, f"{name}.shared_experts")
            for e in chosen:
                y = y + affinity[e] / total * c["routed_scaling_factor"] * self.mlp(token, f"{name}.experts.{e}")
            rows.append(y)
        return torch.stack(rows)

    def block(self, x, layer):
        name = f"model.layers.{layer}"
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
        h = self.norm(x, f"{name}.post_attention_layernorm")
        return x + (self.mlp if layer < self.c["first_k_dense_replace"] else self.experts)(h, f"{name}.mlp")

    def __call__(self, tokens):
        """tokens [T] -> logits [T, V], and those of each MTP module."""
        layers, time = self.c["num_hidden_layers"], len(tokens)
        x = self.t["model.embed_tokens.weight"][tokens]
        for layer in range(layers):
            x = self.block(x, layer)
        x = self.norm(x, "model.norm")
        logits, ahead = x @ self.t["lm_head.weight"].T, []
        for k in range(1, self.c["num_nextn_predict_layers"] + 1):
            name = f"model.layers.{layers + k - 1}"
            embedded = self.t[f"{name}.embed_tokens.weight"][tokens[k:]]
            both = torch.cat([self.norm(embedded, f"{name}.enorm"), self.norm(x[: time - k], f"{name}.hnorm")], -1)
            x = self.block(both @ self.t[f"{name}.eh_proj.weight"].T, layers + k - 1)
            state = self.norm(x, f"{name}.shared_head.norm")
            ahead.append(state @ self.t[f"{name}.shared_head.head.weight"].T)
            x = state if CHAINED_AFTER_NORM else x
        return logits, ahead


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_equals_the_released_layout_computed_by_hand(depth, rng, tmp_path):
    model = make(shape(rng, num_nextn_predict_layers=depth))
    folder = to_hf(model, tmp_path / "out")
    tokens = clear_tokens(model, rng, rows=1, time=24)
    out = model.train()(tokens)
    logits, ahead = Official(folder)(tokens[0])
    torch.testing.assert_close(out.logits[0].double(), logits, rtol=1e-5, atol=2e-5)
    assert len(ahead) == len(out.mtp_logits) == depth
    for ours, theirs in zip(out.mtp_logits, ahead, strict=True):
        torch.testing.assert_close(ours[0].double(), theirs, rtol=1e-5, atol=2e-5)
    assert from_hf(folder).config == model.config


@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_loads_an_export_with_mtp_and_its_own_mtp_agrees(depth, rng, tmp_path):
    model = make(shape(rng, num_nextn_predict_layers=depth))
    folder = to_hf(model, tmp_path / "out")
    them, info = theirs(folder)
    assert all(int(k.split(".")[2]) >= 3 for k in info["unexpected_keys"])
    tokens = clear_tokens(model, rng, rows=1, time=20)
    found = them(tokens, output_hidden_states=True)
    torch.testing.assert_close(model(tokens).logits, found.logits, rtol=1e-5, atol=1e-5)

    from transformers.modeling_layers import MtpModel

    them._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{3 + k}\..*" for k in range(depth)]  # its way to know
    drafts, state = MtpModel.from_pretrained(them), found.hidden_states[-1]
    for k in range(1, depth + 1 if CHAINED_AFTER_NORM else 2):  # deeper modules of transformers read a normed state
        places = torch.arange(20 - k)[None]
        state = drafts.forward_layer(k - 1, state[:, : 20 - k], places, None, input_ids=tokens[:, k:])
        ours = model.train()(tokens).mtp_logits[k - 1]
        torch.testing.assert_close(ours, them.lm_head(state), rtol=1e-5, atol=1e-5)


def test_mtp_can_be_left_out_on_either_side(rng, tmp_path):
    model = make(shape(rng, num_nextn_predict_layers=2))
    with_, without = to_hf(model, tmp_path / "with"), to_hf(model, tmp_path / "without", mtp=False)
    names = set(load_file(without / "model.safetensors"))
    assert names == {
        n for n in load_file(with_ / "model.safetensors") if not n.startswith(("model.layers.3", "model.layers.4"))
    }
    tokens = clear_tokens(model, rng)
    for read in (from_hf(with_, mtp=False), from_hf(without)):
        assert read.config == dataclasses.replace(model.config, num_nextn_predict_layers=0) and not len(read.mtp)
        assert torch.equal(read(tokens).logits, model(tokens).logits)

    sharded = to_hf(model, tmp_path / "shards", max_shard_bytes=3000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    main = {file for name, file in index.items() if not name.startswith(("model.layers.3", "model.layers.4"))}
    for file in set(index.values()) - main:
        (sharded / file).unlink()  # mtp=False does not even open them
    assert torch.equal(from_hf(sharded, mtp=False)(tokens).logits, model(tokens).logits)


def test_missing_mtp_weights_cost_a_warning(rng, tmp_path):
    model = make(shape(rng, num_nextn_predict_layers=2))
    for depth, start in ((0, "model.layers.3."), (1, "model.layers.4.")):
        folder = to_hf(model, tmp_path / f"{depth}")
        tensors = load_file(folder / "model.safetensors")
        keep = {n: t for n, t in tensors.items() if n < start or not n.startswith("model.layers.")}
        save_file(keep, folder / "model.safetensors")
        with pytest.warns(UserWarning, match=f"has weights for {depth} of num_nextn_predict_layers=2"):
            read = from_hf(folder)
        assert read.config.num_nextn_predict_layers == len(read.mtp) == depth
    tokens = clear_tokens(model, rng)
    assert torch.equal(read.train()(tokens).mtp_logits[0], model.train()(tokens).mtp_logits[0])


def test_an_mtp_head_of_its_own_is_told(rng, tmp_path):
    folder = to_hf(make(shape(rng, num_nextn_predict_layers=1)), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.shared_head.head.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="shared_head.head.weight differs"):
        from_hf(folder)


# ------------------------------------------------------------------------------------------------------------ writing


def edit(folder, **changes):
    """Edit config.json; `...` deletes a key."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def test_config_json_says_what_transformers_and_vllm_read(rng, tmp_path):
    config = shape(
        rng, num_nextn_predict_layers=1, initializer_range=None, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0)
    )
    values = json.loads((to_hf(Transformer(config), tmp_path / "out") / "config.json").read_text())
    wanted = dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", topk_method="noaux_tc", ep_size=1,
        scoring_func="sigmoid", num_key_value_heads=config.num_attention_heads, hidden_act="silu", moe_layer_freq=1,
        attention_bias=False, rope_interleave=True, seq_aux=True, aux_loss_alpha=config.seq_aux_alpha,
        initializer_range=config.init_std, num_nextn_predict_layers=1, dtype="float32", torch_dtype="float32",
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, rope_theta=10000.0, norm_topk_prob=True,
        rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0), first_k_dense_replace=1,
    )  # fmt: skip
    assert {k: values[k] for k in wanted} == wanted
    for key in ("q_lora_rank", "kv_lora_rank", "n_routed_experts", "n_group", "topk_group", "v_head_dim", "vocab_size"):
        assert values[key] == getattr(config, key)


def test_every_knob_returns(rng, tmp_path):
    config = shape(
        rng, name="x", seq_aux_alpha=0.3, mtp_weight=[[0, 0.3], [0.5, 0.1]], bias_update_speed=0.5, balance="none",
        init="paper", initializer_range=None, rope_scaling={"rope_type": "default"}, num_nextn_predict_layers=1,
    )  # fmt: skip
    folder = to_hf(Transformer(config), tmp_path / "out")
    assert from_hf(folder).config == config
    dense = shape(rng, n_routed_experts=0, first_k_dense_replace=1, num_nextn_predict_layers=2, n_group=8)
    assert from_hf(to_hf(Transformer(dense), tmp_path / "dense")).config == dense
    edit(folder, rope_theta=77.0, num_experts_per_tok=2, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0))
    edited = from_hf(folder).config  # an edit of config.json counts
    assert (edited.rope_theta, edited.num_experts_per_tok, edited.rope_scaling["factor"]) == (77.0, 2, 4.0)
    assert edited.seq_aux_alpha == 0.3


def test_shards_hold_the_same_and_transformers_reads_them(rng, tmp_path):
    model = make(shape(rng, num_nextn_predict_layers=1))
    whole, parts = to_hf(model, tmp_path / "whole"), to_hf(model, tmp_path / "parts", max_shard_bytes=5000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    tensors = load_file(whole / "model.safetensors")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(parts / file)[name], tensors[name])
    tokens = clear_tokens(model, rng)
    assert torch.equal(from_hf(parts)(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(theirs(parts)[0](tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_reading_draws_no_random_number(rng, tmp_path):
    folder = to_hf(make(shape(rng)), tmp_path / "out")
    before = torch.get_rng_state()
    from_hf(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_a_failing_disk_leaves_the_earlier_export(rng, tmp_path):
    model = make(shape(rng))
    folder = to_hf(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written: .*stays as it was") as caught:
            to_hf(make(shape(rng)), folder)
        with pytest.raises(UserError):
            to_hf(model, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interruption_at_any_file_leaves_a_whole_export(rng, tmp_path, monkeypatch):
    import safetensors.torch

    old, new = make(shape(rng)), make(shape(rng))
    folder, real, writes = to_hf(old, tmp_path / "out"), safetensors.torch.save_file, []

    def failing(*args, **kwargs):
        writes.append(1)
        if len(writes) == 3:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        to_hf(new, folder, max_shard_bytes=5000)
    assert from_hf(folder).config == old.config and [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".out.tmp-1-1").mkdir()  # what a killed process leaves
    to_hf(new, folder, max_shard_bytes=5000)
    assert from_hf(folder).config == new.config and [p.name for p in tmp_path.iterdir()] == ["out"]
    to_hf(old, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_earlier_export_returns_when_the_new_one_cannot_take_its_place(rng, tmp_path, monkeypatch):
    old, real = make(shape(rng)), os.rename
    folder = to_hf(old, tmp_path / "out")

    def rename(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match="Input/output error"):
        to_hf(make(shape(rng)), folder)
    assert from_hf(folder).config == old.config and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_other_peoples_files_are_never_replaced(rng, tmp_path):
    model = make(shape(rng))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("three years")
    with pytest.raises(UserError, match="thesis.tex"):
        to_hf(model, tmp_path / "home")
    with pytest.raises(UserError, match="is a file"):
        to_hf(model, tmp_path / "home" / "thesis.tex")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "three years"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    to_hf(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()


def test_what_the_format_cannot_hold_is_refused(rng, tmp_path):
    for config, word in (
        (shape(rng, scoring_func="softmax"), "model.scoring_func=softmax"),
        (ModelConfig.preset("v2-lite-16b", num_hidden_layers=1, vocab_size=9, hidden_size=8), "scoring_func"),
    ):
        with torch.device("meta"), pytest.raises(UserError, match=word) as caught:
            to_hf(Transformer(config), tmp_path / "out")
        assert "\n" not in str(caught.value)
    model = make(shape(rng))
    model.config = dataclasses.replace(model.config, attention="other")
    with pytest.raises(UserError, match="model.attention=other"):
        to_hf(model, tmp_path / "out")
    model = make(shape(rng))
    model.layers[1].ffn.router.temperature = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="no name for layers.1.ffn.router.temperature"):
        to_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "def f(x):\n    return x + 12345",
    "你好 café 🙂",
    "   spaces\tand\r\n\r\nlines  ",
    "<think>yes</think><｜User｜>",
    "",
]


def test_the_tokenizer_encodes_and_decodes_the_same_in_transformers(rng, tmp_path):
    from moe.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(TEXTS * 3, 400)
    model = make(shape(rng, vocab_size=400))
    folder = to_hf(model, tmp_path / "out", tokenizer=tokenizer)
    them = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text, allow_special=True)
        assert them(text)["input_ids"] == ids
        assert them.decode(ids) == tokenizer.decode(ids) == text
    assert (them.bos_token_id, them.eos_token_id, them.pad_token_id) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert Tokenizer.load(folder).text == tokenizer.text

    loaded = theirs(folder)[0]
    for place in (loaded.config, loaded.generation_config):
        assert (place.bos_token_id, place.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    with torch.no_grad():
        loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    to_hf(model, tmp_path / "again", tokenizer=folder / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_any_tokenizers_library_file_is_taken(kind, rng, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    native = Tokenizer(getattr(models, kind)())
    native.pre_tokenizer, native.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = {
        "BPE": lambda: trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False),
        "Unigram": lambda: trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    }[kind]()  # fmt: skip
    native.train_from_iterator(["a bc abc cab ba acab bacca"] * 9, trainer)
    native.save(str(tmp_path / "mine.json"))
    size = native.get_vocab_size()
    folder = to_hf(make(shape(rng, vocab_size=size)), tmp_path / "out", tokenizer=str(tmp_path / "mine.json"))
    them = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("abc ba", "cab abc a"):
        assert them(text)["input_ids"] == native.encode(text).ids
        assert them.decode(native.encode(text).ids) == text
    assert (them.bos_token, them.eos_token, them.pad_token) == ("<s>", "</s>", "</s>")
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None  # eos keeps its gradient
    with pytest.raises(UserError, match=f"model.vocab_size={size - 1}"):
        to_hf(make(shape(rng, vocab_size=size - 1)), tmp_path / "small", tokenizer=str(tmp_path / "mine.json"))
    assert not (tmp_path / "small").exists()


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_run_folder_is_taken_for_its_export(rng, tmp_path):
    model = make(shape(rng))
    to_hf(model, tmp_path / "runs" / "x" / "export")
    assert from_hf(tmp_path / "runs" / "x").config == from_hf(str(tmp_path / "runs" / "x" / "export")).config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="llama"), "model_type='llama'"),
        (dict(scoring_func="softmax"), "scoring_func='softmax'"),
        (dict(topk_method="greedy"), "topk_method='greedy'"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(rope_interleave=False), "rope_interleave=False"),
        (dict(moe_layer_freq=2), "moe_layer_freq=2"),
        (dict(num_key_value_heads=77), "num_key_value_heads=77"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type='linear'"),
        (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "rope_scaling.original_max_position_embeddings"),
        (dict(rope_scaling=dict(YARN, beta_quick=3)), "rope_scaling.beta_quick"),
        (dict(rope_scaling=dict(YARN, factor="40")), "rope_scaling.factor='40'"),
        (dict(rope_scaling=dict(YARN, truncate=False)), "rope_scaling.truncate=False"),
        (dict(rope_parameters={"full": {"rope_type": "default"}}, rope_scaling=None), "rope_parameters="),
        (dict(quantization_config={"quant_method": "gptq"}), "quant_method='gptq'"),
        (dict(quantization_config={"quant_method": "fp8"}), "quant_method='fp8'"),
        (dict(hidden_size="big"), "hidden_size='big' must be an integer"),
        (dict(hidden_size=None), "hidden_size=None must be an integer"),
        (dict(num_attention_heads=2.5, num_key_value_heads=2.5), "num_attention_heads=2.5"),
        (dict(norm_topk_prob=1), "norm_topk_prob=1 must be true or false"),
        (dict(kv_lora_rank=...), "lacks kv_lora_rank"),
        (dict(topk_group=...), "lacks topk_group"),
        (dict(n_group=5), "n_group=5"),
        (dict(qk_rope_head_dim=3), "qk_rope_head_dim=3"),
        (dict(moe_training={"seq_aux_alfa": 1}), "did you mean 'seq_aux_alpha'"),
        (dict(moe_training={"seq_aux_alpha": "x"}), "moe_training.seq_aux_alpha='x'"),
        (dict(moe_training=[1]), "moe_training=[1]"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_key_and_file(changes, words, rng, tmp_path):
    folder = to_hf(make(shape(rng)), tmp_path / "out")
    edit(folder, **changes)
    with pytest.raises(UserError) as caught:
        from_hf(folder)
    message = str(caught.value)
    assert words in message and "config.json" in message and "\n" not in message and len(message) < 500, message


def test_null_means_none_where_files_say_so(rng, tmp_path):
    config = shape(rng, q_lora_rank=None, n_shared_experts=0, n_group=1, topk_group=1)
    folder = to_hf(make(config), tmp_path / "out")
    edit(
        folder,
        n_shared_experts=None,
        n_group=None,
        topk_group=None,
        rope_scaling={"type": "default"},
        quantization_config=None,
    )
    assert from_hf(folder).config == config
    edit(
        folder,
        q_lora_rank=0,
        rope_scaling=...,
        rope_theta=...,
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},
    )
    assert from_hf(folder).config == dataclasses.replace(config, rope_theta=123.0)


def test_damaged_folders_are_named(rng, tmp_path):
    good = to_hf(make(shape(rng)), tmp_path / "good", max_shard_bytes=6000)
    shard = "model-00002-of-"

    def broken(how):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        how(folder)
        with pytest.raises(UserError) as caught:
            from_hf(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def second(folder):
        return next(folder.glob(f"{shard}*"))

    assert "config.json does not exist" in broken(lambda f: (f / "config.json").unlink())
    assert "config.json is not valid JSON" in broken(lambda f: (f / "config.json").write_text('{"a": '))
    assert "config.json must hold one JSON object" in broken(lambda f: (f / "config.json").write_text("[]"))
    assert shard in (text := broken(lambda f: os.truncate(second(f), 3000))) and "cut short" in text
    assert shard in (text := broken(lambda f: os.truncate(second(f), 4))) and "cut short" in text
    assert shard in (text := broken(lambda f: second(f).unlink())) and "is missing" in text
    index = "model.safetensors.index.json"
    assert f"{index} is damaged" in broken(lambda f: (f / index).write_text("{}"))
    assert "'../x.safetensors'" in broken(lambda f: (f / index).write_text('{"weight_map": {"a": "../x.safetensors"}}'))
    assert "repeats" in broken(lambda f: shutil.copy(next(f.glob("model-00001*")), second(f)))
    assert "promises" in broken(lambda f: save_file({"model.other": torch.ones(1)}, second(f)))
    assert "has no model.safetensors" in broken(lambda f: [p.unlink() for p in f.glob("model*")])

    def pickles(folder):
        for p in folder.glob("model*"):
            p.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")

    assert "pytorch_model.bin" in (text := broken(pickles)) and "never opened" in text
    with pytest.raises(UserError, match="does not exist"):
        from_hf("deepseek-ai/DeepSeek-V3")

    (good / index).unlink()  # shards alone are enough
    from_hf(good)


def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_error(rng, tmp_path):
    folder = to_hf(make(shape(rng, hidden_size=24)), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")

    def error(**changes):
        new = {
            k: v
            for k, v in {**tensors, **{k.replace("/", "."): v for k, v in changes.items()}}.items()
            if v is not None
        }
        save_file(new, folder / "model.safetensors")
        with pytest.raises(UserError) as caught:
            from_hf(folder)
        assert "\n" not in str(caught.value) and "config.json" in str(caught.value)
        return str(caught.value)

    text = error(**{"model/norm/weight": None, "model/odd": torch.ones(2), "lm_head/weight": torch.ones(3, 24)})
    assert "3 tensors" in text and "model.norm.weight is missing" in text and "model.odd is unexpected" in text
    assert "lm_head.weight has shape [3, 24] instead of" in text
    assert "1 tensor:" in error(**{"model/layers/2/mlp/experts/7/up_proj/weight": None})
    assert "model.layers.7.enorm.weight is unexpected" in error(**{"model/layers/7/enorm/weight": torch.ones(24)})
    assert "dtype I32" in error(**{"model/norm/weight": torch.ones(24, dtype=torch.int32)})
    many = {f"model/layers/2/mlp/experts/{e}/up_proj/weight": None for e in range(9)}
    text = error(**many)
    assert "9 tensors" in text and text.count("is missing") == 3
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    from_hf(folder)


def test_tied_files_may_repeat_the_head(rng, tmp_path):
    model = make(shape(rng, tie_word_embeddings=True, num_nextn_predict_layers=1))
    folder = to_hf(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    read = from_hf(folder)
    assert read.head.weight is read.embed.weight and torch.equal(read.embed.weight, model.embed.weight)


def test_odd_router_biases_load_as_they_are(rng, tmp_path):
    model = make(shape(rng))
    odd = torch.tensor([math.inf, -math.inf, math.nan, -0.0] + [1e30] * 12)
    model.layers[1].ffn.router.bias.copy_(odd)
    read = from_hf(to_hf(model, tmp_path / "out"))
    assert torch.equal(read.layers[1].ffn.router.bias.view(torch.int32), odd.view(torch.int32))


# ---------------------------------------------------------------------------------------------------------------- fp8


@pytest.mark.parametrize("size", [(1, 1), (128, 128), (129, 127), (300, 5), (257, 384)])
def test_blocks_are_multiplied_by_their_scale(size, rng):
    rows, columns = size
    weight = torch.randn(size).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    wide = dequantise(weight, scale, (128, 128))
    assert wide.dtype == torch.float32 and wide.shape == size
    for _ in range(50):
        i, j = rng.randrange(rows), rng.randrange(columns)
        assert float(wide[i, j]) == float(weight[i, j].float() * scale[i // 128, j // 128])


def quantise(tensors, block):
    """DeepSeek's way: every projection in e4m3, one scale a block, amax / 448."""
    done = {}
    for name, w in tensors.items():
        if "_proj.weight" not in name or name.endswith("eh_proj.weight"):
            done[name] = w
            continue
        low, scale = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty([-(-n // block) for n in w.shape])
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scale[i, j] = w[at].abs().max() / 448
                low[at] = (w[at] / scale[i, j]).to(torch.float8_e4m3fn)
        done[name], done[f"{name}_scale_inv"] = low, scale
    return done


@pytest.mark.parametrize("block", [128, 7])
def test_a_block_fp8_folder_loads_within_its_precision(block, rng, tmp_path):
    config = shape(rng, hidden_size=150, moe_intermediate_size=131, num_hidden_layers=2, num_nextn_predict_layers=1)
    model = make(config)
    folder = to_hf(model, tmp_path / "out")
    save_file(quantise(load_file(folder / "model.safetensors"), block), folder / "model.safetensors")
    how = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    edit(folder, quantization_config=how)
    read = from_hf(folder)
    assert read.config == config
    for (name, ours), other in zip(model.state_dict().items(), read.state_dict().values(), strict=True):
        assert other.dtype == torch.float32
        if "_norm" in name or "router" in name or name.startswith(("embed", "head")):
            assert torch.equal(ours, other), name
        else:  # 3 bits of mantissa, and the smallest step of a block
            error = (ours - other).abs()
            assert bool((error <= ours.abs() / 16 + ours.abs().max() / 448 / 512).all()), name
    assert from_hf(folder, dtype=torch.bfloat16).layers[0].attn.o.weight.dtype == torch.bfloat16

    broken = load_file(folder / "model.safetensors")
    del broken["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    broken["model.layers.0.self_attn.kv_b_proj.weight_scale_inv"] = torch.ones(1, 9)
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        from_hf(folder)
    assert "o_proj.weight_scale_inv is missing" in str(caught.value) and "kv_b_proj.weight_scale_inv has" in str(
        caught.value
    )
