"""Our experts inside transformers' models mean what transformers' own loop over experts means, or refuse by name.

The oracle is `experts_implementation="eager"`. Every test draws fresh weights and tokens; a failing one prints its seed.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers asks the hub otherwise
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import importlib.util
import json
import pathlib
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moe import ops
from moe.config import UserError
from moe.interop import hf_experts

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

SHAPE = dict(
    vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=None, eos_token_id=None,
)  # fmt: skip
FAMILIES = {
    "Mixtral": dict(intermediate_size=12, num_local_experts=5),
    "Qwen3Moe": dict(intermediate_size=24, moe_intermediate_size=12, num_experts=5, norm_topk_prob=True),
    "Olmoe": dict(intermediate_size=12, num_experts=5),
    "DeepseekV3": dict(
        intermediate_size=24, moe_intermediate_size=12, n_routed_experts=6, n_shared_experts=1, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        head_dim=4, num_key_value_heads=2,
    ),
}  # fmt: skip


def make(family: str, **changes):
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES.get(family, {}), **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_experts_implementation(hf_experts.register())
    return model


def bare_experts(kind=None, act="silu"):
    """The experts of a layer alone, weights large enough to tell rows apart."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = SimpleNamespace(
        num_local_experts=6, moe_num_experts=6, hidden_size=10, intermediate_size=7, hidden_act=act,
        model_type="bare", _experts_implementation=hf_experts.register(),
    )  # fmt: skip
    experts = (kind or MixtralExperts)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return experts


def choices(n: int, k: int = 3, experts: int = 6, nobody: float = 0.3):
    """ids [n, k], distinct for each token, some of them `experts` (nobody's), and weights [n, k]."""
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(n)])
    return ids.masked_fill(torch.rand(n, k) < nobody, experts), torch.rand(n, k)


def outcome(module, x, ids, weights, implementation: str, seen):
    """{name: y, or a gradient of `seen` * y}."""
    module.config._experts_implementation = implementation
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad()
    y = module(x, ids, weights)
    (y * seen).sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **grads}


@pytest.fixture
def calls(monkeypatch):
    """One entry for each time our op answers: a comparison of eager with itself would agree as well."""
    made, real = [], ops.experts
    monkeypatch.setattr(ops, "experts", lambda *a: made.append(a[0].shape[0]) or real(*a))
    return made


# -------------------------------------------------------------------------------------------------------- whole models


def learn(model, tokens):
    model.zero_grad()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient_equal_eager(family, calls, agree):
    model, tokens = make(family).train(), torch.randint(0, 41, (2, random.randint(5, 11)))
    logits, grads = learn(model, tokens)
    assert calls == [tokens.numel()] * (1 if family == "DeepseekV3" else 2)  # one for each layer with experts
    model.set_experts_implementation("eager")
    expected, slow = learn(model, tokens)
    assert len(calls) == (1 if family == "DeepseekV3" else 2)
    agree(logits, expected, what="logits")
    assert grads.keys() == slow.keys() and {"model.layers.1.mlp.gate.weight"} <= grads.keys()
    for name, grad in grads.items():
        agree(grad, slow[name], what=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_draws_the_same_tokens(family, calls):
    model, prompt = make(family).eval(), torch.randint(0, 41, (2, 4))
    how = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    ours = model.generate(prompt, **how)
    assert {8, 2} <= set(calls)  # the prompt, then a token of each row
    model.set_experts_implementation("eager")
    assert ours.tolist() == model.generate(prompt, **how).tolist()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # the name that 5.20 knows too
def test_gradient_checkpointing_moves_no_gradient(calls, agree):
    model, tokens = make("Qwen3Moe").train(), torch.randint(0, 41, (2, 7))
    _, expected = learn(model, tokens)
    model.gradient_checkpointing_enable()
    calls.clear()
    for name, grad in learn(model, tokens)[1].items():
        agree(grad, expected[name], what=name)
    assert len(calls) == 4  # two layers, each forward once more in the backward pass


def test_a_checkpoint_keeps_nothing_of_ours(tmp_path):
    model, tokens = make("Qwen3Moe").eval(), torch.randint(0, 41, (1, 6))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in config if "implementation" in key]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._experts_implementation == "grouped_mm"  # transformers' default
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe")
    assert again.get_experts_implementation() == {"": "moe"}
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_block_compiles_into_one_graph(ops_path, agree):
    ops_path("torch")  # the reference loops over experts
    block, x = make("Qwen3Moe").model.layers[0].mlp, torch.randn(2, 5, 16, requires_grad=True)
    seen = torch.randn(2, 5, 16)
    runs = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        y = call(x)
        runs.append([y, *torch.autograd.grad((y * seen).sum(), [x, *block.parameters()])])
    for i, (plain, compiled) in enumerate(zip(*runs)):
        agree(compiled, plain, what=f"output {i}")


def test_the_example_of_the_documentation_learns(tmp_path, monkeypatch, capsys):
    page = pathlib.Path(__file__).parents[2] / "docs/huggingface.md"
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL).group(1), {})
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert 5.9 < losses[0] < 6.7 and losses[-1] < losses[0] - 1
    assert (tmp_path / "runs/qwen3-moe/config.json").is_file()


# ------------------------------------------------------------------------------------------------------ one layer alone


@pytest.mark.parametrize("n", [2, 19])
def test_an_id_of_e_is_nobodys_as_in_eager(n, agree):
    module, x, seen = bare_experts(), torch.randn(n, 10), torch.randn(n, 10)
    ids, weights = choices(n)
    ids[0], ids[1, 0] = 6, 2  # a token without any expert, and one that has some
    ours, slow = (outcome(module, x, ids, weights, name, seen) for name in ("moe", "eager"))
    for name in slow:
        agree(ours[name], slow[name], what=name)
    for name in ("y", "x", "weights"):
        assert not ours[name][0].any(), name
    with torch.no_grad():  # decoding takes another way
        module.config._experts_implementation = "moe"
        agree(module(x, ids, weights), slow["y"])


def test_ranks_with_a_share_of_the_experts_add_up_to_the_whole(agree):
    """As transformers' all_reduce calls them: foreign choices are id E / ranks with weight zero."""
    x, seen, (ids, weights) = torch.randn(13, 10), torch.randn(13, 10), choices(13, nobody=0)
    whole = bare_experts()
    expected = outcome(whole, x, ids, weights, "eager", seen)
    shares = []
    for rank in range(2):
        share, mine = bare_experts(), slice(3 * rank, 3 * rank + 3)
        share.gate_up_proj = torch.nn.Parameter(whole.gate_up_proj.detach()[mine])
        share.down_proj = torch.nn.Parameter(whole.down_proj.detach()[mine])
        share.num_experts, share._is_expert_parallel = 3, True
        foreign = ids // 3 != rank
        local = outcome(share, x, torch.where(foreign, 3, ids % 3), weights.masked_fill(foreign, 0), "moe", seen)
        agree(local["gate_up_proj"], expected["gate_up_proj"][mine], what=f"gate_up_proj of rank {rank}")
        agree(local["down_proj"], expected["down_proj"][mine], what=f"down_proj of rank {rank}")
        assert not local["weights"][foreign].any()
        shares.append(local)
    for name in ("y", "x", "weights"):
        agree(shares[0][name] + shares[1][name], expected[name], what=name)


def test_transposed_weights_are_read_as_they_lie(agree):
    from transformers.models.aria.modeling_aria import AriaExperts

    module, x, seen, (ids, weights) = bare_experts(AriaExperts), torch.randn(9, 10), torch.randn(9, 10), choices(9)
    assert module.gate_up_proj.shape == (6, 10, 14)
    ours, slow = (outcome(module, x, ids, weights, name, seen) for name in ("moe", "eager"))
    for name in slow:
        agree(ours[name], slow[name], what=name)


def test_our_layout_is_handed_over_without_a_copy(monkeypatch):
    module, (ids, weights) = bare_experts(), choices(4)
    handed = []
    monkeypatch.setattr(ops, "experts", lambda x, w13, w2, *rest: handed.extend((w13, w2)) or x)
    module(torch.randn(4, 10), ids, weights)
    assert handed[0] is module.gate_up_proj and handed[1] is module.down_proj


def test_shapes_alone_run_on_the_meta_device(ops_path):
    ops_path("torch")  # the other paths read values
    with torch.device("meta"):
        model = make("Qwen3Moe")
        assert model(torch.zeros(2, 9, dtype=torch.int64)).logits.shape == (2, 9, 41)


@pytest.mark.parametrize("how", ["bf16", "fp16", "bf16 after fp32 norms", "autocast"])
def test_lower_precision_stays_near_fp32_and_in_its_dtype(how, agree):
    module, seen, (ids, weights) = bare_experts(), torch.randn(23, 10), choices(23)
    narrow = torch.float16 if how == "fp16" else torch.bfloat16
    x = torch.randn(23, 10).to(narrow).float()
    for p in module.parameters():
        p.data = p.data.to(narrow).float()
    expected = outcome(module, x, ids, weights, "eager", seen)
    if how != "autocast":
        module.to(narrow)
    hidden = x.to(narrow) if how in ("bf16", "fp16") else x
    with torch.autocast("cpu", narrow, enabled=how == "autocast"):
        ours = outcome(module, hidden, ids, weights, "moe", seen)
    dtypes = {name: value.dtype for name, value in ours.items()}
    weight = torch.float32 if how == "autocast" else narrow
    assert dtypes == {
        "y": hidden.dtype, "x": hidden.dtype, "weights": torch.float32, "gate_up_proj": weight, "down_proj": weight
    }  # fmt: skip
    assert not torch.equal(ours["y"].float(), expected["y"])  # it was computed in the narrow type
    for name, value in expected.items():
        agree(ours[name], value, tolerance=2e-2, what=name)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_gpt_oss_is_refused_in_one_line_and_has_a_way_out():
    model = make("GptOss", intermediate_size=12, num_local_experts=4, layer_types=["full_attention"] * 2)
    tokens = torch.randint(0, 41, (1, 5))
    with pytest.raises(
        UserError, match=r"^GptOssExperts \(gpt_oss\): its experts have biases.*grouped_mm.*eager"
    ) as told:
        model(tokens)
    assert "\n" not in str(told.value)
    model.set_experts_implementation("eager")
    model(tokens)


def clamped(self, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate.clamp(max=7)) * up


@pytest.mark.parametrize(
    "reason, change",
    {
        "GELU": lambda e: setattr(e, "act_fn", torch.nn.GELU()),
        "no gate": lambda e: setattr(e, "has_gate", False),
        "interleaved": lambda e: setattr(e, "is_concatenated", False),
        "norm follows": lambda e: setattr(e, "has_post_expert_norm", True),
        "one of its own": lambda e: setattr(e, "__class__", type("Own", (type(e),), {"_apply_gate": clamped})),
        "float8_e4m3fn": lambda e: e.to(torch.float8_e4m3fn),
    }.items(),
)
def test_experts_that_mean_something_else_are_refused(reason, change):
    module, (ids, weights) = bare_experts(), choices(3)
    assert hf_experts.refusal(module) is None
    change(module)
    with pytest.raises(UserError, match=rf"(Mixtral|Own).*\(bare\): .*{reason}.*grouped_mm.*eager"):
        module(torch.randn(3, 10), ids, weights)


@pytest.mark.parametrize("act", ["silu", "swish", F.silu])
def test_every_spelling_of_silu_is_taken(act):
    module = bare_experts(act=act if isinstance(act, str) else "silu")
    if not isinstance(act, str):
        del module.act_fn
        module.act_fn = act
    assert hf_experts.refusal(module) is None


# --------------------------------------------------------------------------------------------------------- registration


def test_registering_again_or_by_another_name_is_harmless(calls):
    assert (hf_experts.register(), hf_experts.register(), hf_experts.register("finegrain")) == (
        "moe",
        "moe",
        "finegrain",
    )
    model = make("Mixtral")
    for name in ("finegrain", "moe"):
        model.set_experts_implementation(name)
        model(torch.randint(0, 41, (1, 3)))
    assert calls == [3] * 4


def test_fp8_experts_find_our_refusal_and_no_unknown_name():
    """transformers keeps a second table for models it quantises."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    assert ALL_FP8_EXPERTS_FUNCTIONS[hf_experts.register()] is hf_experts.experts_forward


@pytest.mark.parametrize("name", ["", "eager", "grouped_mm", "deepgemm_megamoe"])
def test_a_name_of_others_is_not_taken_over(name):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = dict(ALL_EXPERTS_FUNCTIONS)
    with pytest.raises(UserError, match=f"name='{name}'"):
        hf_experts.register(name)
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


def test_importing_needs_no_transformers_and_registering_says_so(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("without_transformers", hf_experts.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match="pip install"):
        module.register()
