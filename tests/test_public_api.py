"""The names that others build on work as the README writes them, and `import moe` costs no more than torch."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe

ROOT = Path(__file__).parents[1]

NAMES = [
    "MLA", "MTP", "Block", "Experts", "LatentCache", "MoE", "ModelConfig", "Router", "Routing", "Transformer",
    "from_hf", "generate", "load_config", "objectives", "ops", "to_hf", "update_balance",
]  # fmt: skip

HEAVY = [
    "omegaconf", "yaml", "safetensors", "tokenizers", "matplotlib", "deepspeed", "wandb", "datasets", "triton",
    "transformers", "rich",
]  # fmt: skip

FIELDS = """hidden_size num_hidden_layers num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim
v_head_dim intermediate_size moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group
routed_scaling_factor norm_topk_prob scoring_func first_k_dense_replace num_nextn_predict_layers vocab_size
max_position_embeddings rope_theta rope_scaling rms_norm_eps initializer_range tie_word_embeddings""".split()


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny():
    """V3's routing and shape whole, two layers of it."""
    return moe.Transformer(moe.ModelConfig.preset("tiny", num_hidden_layers=2, vocab_size=64))


# -------------------------------------------------------------------------------------------------------------- import


def test_moe_gives_these_names():
    assert sorted(moe.__all__) == sorted(NAMES)
    assert all(hasattr(moe, name) for name in NAMES)


def test_import_moe_loads_nothing_heavier_than_torch():
    heavy = python(f"import sys, moe, moe.kernels; print(*[m for m in {HEAVY} if m in sys.modules])")
    assert heavy.split() == []


def test_a_model_builder_needs_torch_alone():
    """Import, forward, backward and generation with every other package out of reach."""
    python(f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None
import torch, moe
config = moe.ModelConfig.preset("tiny", num_hidden_layers=2, vocab_size=64)
model = moe.Transformer(config)
out = model(torch.randint(64, (1, 8)))
out.logits.square().mean().backward()
moe.update_balance(model, out.routings)
moe.generate(model, [[1, 2]], max_new_tokens=2)
""")


# --------------------------------------------------------------------------------------------- signatures, as published


def test_a_preset_takes_changes_and_has_the_published_field_names():
    config = moe.ModelConfig.preset("tiny", num_hidden_layers=2)
    assert config.num_hidden_layers == 2 and moe.ModelConfig(hidden_size=48).hidden_size == 48
    assert [name for name in FIELDS if not hasattr(config, name)] == []


def test_tiny_is_a_whole_deepseek_v3():
    config = moe.ModelConfig.preset("tiny")
    shape = (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok, config.n_group)
    assert shape == (256, 1, 8, 8)
    assert (config.topk_group, config.first_k_dense_replace, config.num_nextn_predict_layers) == (4, 1, 1)
    assert config.attention == "mla" and config.scoring_func == "sigmoid" and config.norm_topk_prob


@pytest.mark.parametrize("name", ["tiny", "small", "v2-lite-16b", "v2-236b", "v3-671b"])
def test_every_preset_is_a_valid_shape(name):
    assert moe.ModelConfig.preset(name).name == name


def test_transformer_returns_logits_and_routings_by_layer(tiny):
    tokens = torch.randint(64, (2, 12))
    out = tiny(tokens)
    assert out.logits.shape == (2, 12, 64)
    assert set(out.routings) == {"layers.1", "mtp.0"}  # the first layer is dense
    assert tiny.num_parameters() > tiny.num_parameters(active=True) > 0
    assert tiny.num_parameters(active=False) == tiny.num_parameters()
    assert any("mtp" in name for name, _ in tiny.named_parameters())


def test_transformer_takes_packed_documents_and_recorded_choices(tiny):
    tokens, segments = torch.randint(64, (2, 6)), torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    out = tiny(tokens, segment_ids=segments, routings=None)
    again = tiny(tokens, segment_ids=segments, routings={name: r.experts for name, r in out.routings.items()})
    torch.testing.assert_close(again.logits, out.logits)


def test_moe_layer_takes_plain_numbers():
    layer = moe.MoE(hidden_size=64, moe_intermediate_size=32, n_routed_experts=16, num_experts_per_tok=4)
    x = torch.randn(2, 5, 64)
    y, routing = layer(x)
    assert y.shape == x.shape
    assert isinstance(routing, moe.Routing) and isinstance(routing, tuple)
    assert routing.experts.shape == (2, 5, 4) and routing.experts.dtype == torch.int64
    assert routing.gates.shape == (2, 5, 4)
    assert routing.counts.shape == (16,) and routing.counts.sum() == 2 * 5 * 4
    assert isinstance(routing.losses, dict) and routing.scores is None


def test_moe_layer_takes_padding_token_ids_and_recorded_choices():
    layer = moe.MoE(hidden_size=8, moe_intermediate_size=4, n_routed_experts=6, num_experts_per_tok=2)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[True, True, False]] * 2)
    y, routing = layer(x, mask=mask, token_ids=torch.zeros(2, 3, dtype=torch.int64), replay=None)
    assert routing.counts.sum() == 4 * 2
    again, _ = layer(x, mask=mask, replay=routing.experts)
    torch.testing.assert_close(again, y)


def test_mla_takes_plain_numbers():
    layer = moe.MLA(
        hidden_size=64, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    x = torch.randn(2, 7, 64)
    y = layer(x)
    assert y.shape == x.shape
    x[:, 4:] = 0
    torch.testing.assert_close(layer(x)[:, :4], y[:, :4])  # causal


def test_experts_op_differentiates_and_ignores_ids_out_of_range():
    shapes = dict(x=(5, 8), w13=(3, 12, 8), w2=(3, 8, 6), gates=(5, 2))
    inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    chosen = torch.tensor([[0, 2], [2, 0], [0, -1], [3, -1], [2, 0]])  # expert 1 has no token, token 3 no expert
    y = moe.ops.experts(inputs["x"], inputs["w13"], inputs["w2"], chosen, inputs["gates"])
    assert y.shape == (5, 8) and not y[3].any()
    y.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs.values())
    assert not inputs["w13"].grad[1].any() and not inputs["gates"].grad[3].any()


def test_generate_continues_ragged_prompts(tiny):
    out = moe.generate(tiny, [[1, 2, 3], [4]], max_new_tokens=4, temperature=0.0, seed=0, speculative=False)
    assert [len(tokens) for tokens in out.tokens] == [len(lp) for lp in out.logprobs] == [4, 4]
    assert all(isinstance(token, int) and 0 <= token < 64 for tokens in out.tokens for token in tokens)


def test_update_balance_moves_the_bias_of_every_router(tiny):
    out = tiny(torch.randint(64, (2, 12)))
    before = {name: buffer.clone() for name, buffer in tiny.named_buffers() if name.endswith("router.bias")}
    moe.update_balance(tiny, out.routings)
    after = dict(tiny.named_buffers())
    assert len(before) == 2 and all((after[name] != bias).any() for name, bias in before.items())


def test_router_bias_stays_fp32_when_the_model_does_not():
    model = moe.Transformer(moe.ModelConfig.preset("tiny", num_hidden_layers=2, vocab_size=64)).to(torch.bfloat16)
    assert {b.dtype for name, b in model.named_buffers() if name.endswith("router.bias")} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_go_to_a_hugging_face_folder_and_back(tiny, tmp_path):
    moe.to_hf(tiny, tmp_path, tokenizer=None, mtp=True)
    back = moe.from_hf(tmp_path)
    tokens = torch.randint(64, (1, 9))
    torch.testing.assert_close(back.eval()(tokens).logits, tiny.eval()(tokens).logits)


def test_load_config_resolves_preset_and_overrides():
    from moe.config import PretrainConfig

    config = moe.load_config(PretrainConfig, ["model.preset=small", "model.num_hidden_layers=3", "train.steps=1e3"])
    assert (config.model.name, config.model.num_hidden_layers, config.train.steps) == ("small", 3, 1000)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("MoE", "hidden_size moe_intermediate_size n_routed_experts num_experts_per_tok"),
        (
            "MLA",
            "hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim",
        ),
        ("generate", "model prompts max_new_tokens temperature seed speculative"),
        ("from_hf", "path"),
        ("to_hf", "model path tokenizer mtp"),
        ("update_balance", "model routings"),
    ],
)
def test_published_parameters_keep_their_names_and_order(name, parameters):
    assert list(inspect.signature(getattr(moe, name)).parameters)[: len(parameters.split())] == parameters.split()


@pytest.mark.parametrize("ours", ["Transformer", "Block", "MoE", "Router", "Experts", "MLA", "MTP"])
def test_layers_are_plain_torch_modules(ours):
    assert issubclass(getattr(moe, ours), torch.nn.Module)
