"""Configuration: what every error says, who wins, how files inherit, and that a resolved configuration is stable."""

import dataclasses

import pytest
import yaml

from moe.config import (
    PRESETS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
    UserError,
    describe,
    differences,
    fingerprint,
    load,
    nearest,
    resolve,
    to_dict,
    value_at,
)


def write(folder, name, text):
    (folder / name).write_text(text)
    return f"config={folder / name}"


# --------------------------------------------------------------------------------------------------- what errors say


@pytest.mark.parametrize(
    "argument, words",
    [
        ("train.stps=3", ["train.stps", "did you mean 'train.steps'"]),
        ("model.hiden_size=3", ["model.hiden_size", "did you mean 'model.hidden_size'"]),
        ("steps=3", ["steps", "did you mean 'train.steps'"]),
        ("modl.hidden_size=3", ["modl", "did you mean 'model'"]),
        ("train=3", ["train=3", "whole section", "train.steps=..."]),
        ("train.steps.x=3", ["train.steps"]),
        ("train.steps", ["'train.steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("train.steps=", ["train.steps=", "no value"]),
        ("train.steps=many", ["train.steps=many", "an integer"]),
        ("train.steps=2.5", ["train.steps=2.5", "an integer"]),
        ("train.steps=true", ["train.steps=True", "an integer"]),
        ("train.steps=[1]", ["train.steps=[1]", "an integer"]),
        ("train.steps=null", ["train.steps=None", "an integer"]),
        ("train.steps={", ["train.steps={", "cannot be read"]),
        ("train.steps=0", ["train.steps=0", ">= 1"]),
        ("optim.lr=fast", ["optim.lr=fast", "a number"]),
        ("optim.lr=0", ["optim.lr=0", "> 0"]),
        ("optim.lr=nan", ["optim.lr=nan", "finite"]),
        ("optim.lr=.inf", ["optim.lr=inf", "finite"]),
        ("optim.beta1=1", ["optim.beta1=1", "< 1"]),
        ("data.fraction=1.5", ["data.fraction=1.5", "<= 1"]),
        ("train.compile=perhaps", ["train.compile=perhaps", "true or false"]),
        ("train.ops=trch", ["train.ops='trch'", "'auto', 'reference', 'torch'", "did you mean 'torch'"]),
        ("train.precision=fp16", ["train.precision='fp16'", "bf16"]),
        ("model.scoring_func=sigmod", ["model.scoring_func='sigmod'", "did you mean 'sigmoid'"]),
        ("model.preset=tinny", ["model.preset='tinny'", "v3-671b", "did you mean 'tiny'"]),
        ("model.dense_twin=maybe", ["model.dense_twin='maybe'", "true or false"]),
        ("model.qk_rope_head_dim=5", ["model.qk_rope_head_dim=5", "even", "try 6"]),
        ("model.first_k_dense_replace=9", ["model.first_k_dense_replace=9", "num_hidden_layers=3"]),
        ("model.num_experts_per_tok=1", ["model.num_experts_per_tok=1", "norm_topk_prob", "no gradient"]),
        ("model.n_group=7", ["model.n_group=7", "n_routed_experts=256", "try one of"]),
        ("model.topk_group=9", ["model.topk_group=9", "n_group=8"]),
        ("model.num_experts_per_tok=200", ["model.num_experts_per_tok=200", "topk_group=4"]),
        ("model.mtp_weight=-0.1", ["model.mtp_weight=-0.1", "schedule"]),
        ("model.mtp_weight=[[0.5,1],[0.2,1]]", ["model.mtp_weight", "rising"]),
        ("model.mtp_weight=[[0,1],[2,1]]", ["model.mtp_weight", "[[progress, value], ...]"]),
        ("model.bias_update_speed=soon", ["model.bias_update_speed=soon", "schedule"]),
        ("model.rope_scaling={type: linear, factor: 2}", ["model.rope_scaling.type='linear'", "yarn"]),
        ("model.rope_scaling={type: yarn, factor: 2}", ["model.rope_scaling.original_max_position_embeddings=None"]),
        ("train.batch_tokens=1000", ["train.batch_tokens=1000", "data.seq_len=256", "try 1024"]),
        ("parallel.expert_parallel_size=3", ["parallel.expert_parallel_size=3", "set it to 1", "train.zero_stage=3"]),
        ("log.wandb=of", ["log.wandb='of'", "offline"]),
        ("init=runs/x", ["run.init means nothing to this recipe; leave it out"]),
        ("config=nowhere.yaml", ["nowhere.yaml", "does not exist"]),
    ],
)
def test_an_error_is_one_line_with_key_value_rule_and_way_out(argument, words):
    with pytest.raises(UserError) as error:
        load(PretrainConfig, [argument])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and isinstance(error.value, ValueError)


def test_a_knob_of_another_section_is_found():
    with pytest.raises(UserError, match="optim.n_group is not a knob; did you mean 'model.n_group'"):
        load(PretrainConfig, ["optim.n_group=2"])


@pytest.mark.parametrize("value", ["nan", "1e400"])
def test_an_integer_that_is_no_number_is_refused_by_name(value):
    with pytest.raises(ValueError) as error:
        load(PretrainConfig, [f"train.steps={value}"])
    assert "train.steps" in str(error.value)


@pytest.mark.parametrize("where", ["points", "file"])
def test_scientific_notation_is_a_number_in_a_schedule_too(tmp_path, where):
    if where == "points":
        c = load(PretrainConfig, ["model.bias_update_speed=[[0,1e-2],[1,0]]"])
        assert value_at(c.model.bias_update_speed, 0.5) == pytest.approx(0.005)
    else:
        c = load(PretrainConfig, [write(tmp_path, "x.yaml", "model:\n  bias_update_speed: 1e-3\n")])
        assert value_at(c.model.bias_update_speed, 0.5) == 0.001


def test_a_row_must_fit_the_positions():
    with pytest.raises(UserError, match="data.seq_len=8192 exceeds model.max_position_embeddings=4096"):
        load(PretrainConfig, ["data.seq_len=8192", "train.batch_tokens=8192"])


def test_a_row_must_hold_a_target_for_every_depth():
    with pytest.raises(UserError, match="data.seq_len=4 leaves no target for model.num_nextn_predict_layers=3"):
        load(PretrainConfig, ["data.seq_len=4", "model.num_nextn_predict_layers=3"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("train:\n  steps: [1\n", ["x.yaml", "not valid YAML", "line"]),
        ("train:\n  steps: 1\n  seed: 2\n  steps: 3\n", ["x.yaml", "line 4", "'steps' stands twice"]),
        ("- 1\n- 2\n", ["x.yaml", "sections"]),
        ("train: 5\n", ["train=5", "whole section"]),
        ("train:\n  stesp: 5\n", ["train.stesp", "did you mean 'train.steps'"]),
        ("trian:\n  steps: 5\n", ["trian", "did you mean 'train'"]),
        ("train:\n  steps: many\n", ["train.steps=many", "an integer"]),
        ("base: gone.yaml\n", ["gone.yaml", "does not exist"]),
        ("model:\n  preset: huge\n", ["model.preset='huge'"]),
    ],
)
def test_an_error_in_a_file_names_file_or_key(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load(PretrainConfig, [write(tmp_path, "x.yaml", text)])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_python_callers_get_the_same_refusals():
    with pytest.raises(UserError, match="model.hidden_size=0 must be >= 1"):
        ModelConfig(hidden_size=0)
    with pytest.raises(UserError, match="model.preset='v3' is not one of"):
        ModelConfig.preset("v3")
    with pytest.raises(UserError, match="model.hiddn_size is not a knob; did you mean 'hidden_size'"):
        ModelConfig.preset("tiny", hiddn_size=3)
    assert nearest("zzz", ["a"]) == ""


# -------------------------------------------------------------------------------------------------- who wins, and how


def test_order_of_authority_is_default_preset_parents_file_command_line(tmp_path):
    write(tmp_path, "grand.yaml", "model: {kv_lora_rank: 11, num_hidden_layers: 11, hidden_size: 11}\ntrain.steps: 9\n")
    write(tmp_path, "parent.yaml", "base: grand.yaml\nmodel: {kv_lora_rank: 12, num_hidden_layers: 12}\n")
    file = write(tmp_path, "x.yaml", "base: parent.yaml\nmodel:\n  preset: small\n  kv_lora_rank: 13\n")
    c = load(PretrainConfig, [file, "model.qk_nope_head_dim=14", "model.n_shared_experts=2"])
    assert (c.model.hidden_size, c.model.num_hidden_layers, c.model.kv_lora_rank) == (11, 12, 13)
    assert (c.model.qk_nope_head_dim, c.model.n_shared_experts, c.train.steps) == (14, 2, 9)
    assert c.model.vocab_size == PRESETS["small"]["vocab_size"] and c.model.name == "small"
    assert c.model.num_attention_heads == 8  # preset over dataclass
    assert c.model.n_group == ModelConfig().n_group  # dataclass where nobody speaks
    assert load(PretrainConfig, [file, "model.kv_lora_rank=15"]).model.kv_lora_rank == 15
    assert load(PretrainConfig, [file, "model.preset=tiny"]).model.vocab_size == 4096


def test_the_last_of_two_equal_keys_wins_and_a_config_replaces_the_default_file(tmp_path):
    assert load(PretrainConfig, ["train.steps=5", "train.steps=6"]).train.steps == 6
    default = write(tmp_path, "default.yaml", "train.steps: 7\noptim.lr: 0.5\n").removeprefix("config=")
    other = write(tmp_path, "other.yaml", "train.steps: 8\n")
    assert load(PretrainConfig, [], default).optim.lr == 0.5
    c = load(PretrainConfig, [other], default)
    assert c.train.steps == 8 and c.optim.lr == OptimConfig().lr


def test_parents_are_found_beside_their_child_and_cycles_are_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base.yaml", "train.steps: 3\n")
    assert load(PretrainConfig, [write(tmp_path / "sub", "x.yaml", "base: ../base.yaml\n")]).train.steps == 3
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    with pytest.raises(UserError, match="its own ancestor"):
        load(PretrainConfig, [write(tmp_path, "b.yaml", "base: a.yaml\n")])
    with pytest.raises(UserError, match="its own ancestor"):
        load(PretrainConfig, [write(tmp_path, "self.yaml", "base: self.yaml\n")])


def test_nested_and_dotted_keys_are_the_same(tmp_path):
    a = load(PretrainConfig, [write(tmp_path, "a.yaml", "train:\n  steps: 5\n  seed: 6\n")])
    b = load(PretrainConfig, [write(tmp_path, "b.yaml", "train.steps: 5\ntrain.seed: 6\n")])
    assert a == b == load(PretrainConfig, ["train.steps=5", "--train.seed=6"])
    assert load(PretrainConfig, [write(tmp_path, "empty.yaml", "")]) == load(PretrainConfig, [])


def test_values_are_read_by_the_type_of_their_knob():
    c = load(PretrainConfig, ["train.steps=1e3", "optim.lr=1e-3", "train.compile=true", "optim.weight_decay=0"])
    assert c.train.steps == 1000 and type(c.train.steps) is int
    assert c.optim.lr == 0.001 and c.train.compile is True and c.optim.weight_decay == 0.0
    c = load(PretrainConfig, ["run.dir=123", "model.name=1e3", "data.path=true", "data.text_column=null"])
    assert (c.run.dir, c.model.name, c.data.path, c.data.text_column) == ("123", "1e3", "true", "null")
    c = load(PretrainConfig, ["data.path=null", "model.q_lora_rank=null", "model.mtp_weight=1e-1"])
    assert c.data.path is None and c.model.q_lora_rank is None and c.model.mtp_weight == 0.1
    c = load(PretrainConfig, ["data.path=a=b.txt", "model.mtp_weight=[[0,1],[1,0.5]]"])
    assert c.data.path == "a=b.txt" and c.model.mtp_weight == [[0, 1], [1, 0.5]]
    yarn = "{type: yarn, factor: 40, original_max_position_embeddings: 4096}"
    assert load(PretrainConfig, [f"model.rope_scaling={yarn}"]).model.rope_scaling == yaml.safe_load(yarn)


def test_scientific_notation_means_the_same_in_a_file(tmp_path):
    c = load(PretrainConfig, [write(tmp_path, "x.yaml", "optim.lr: 1e-3\ntrain.steps: 20\n")])
    assert c.optim.lr == 0.001 and type(c.optim.lr) is float


def test_launcher_arguments_and_dry_run_are_understood():
    c = load(PretrainConfig, ["--local_rank=1", "--dry-run"])
    assert c.run.dry_run is True and load(PretrainConfig, ["dry-run"]).run.dry_run is True


# ------------------------------------------------------------------------------------------------- stays what it is


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("twin", [False, True])
def test_a_resolved_configuration_resolves_to_itself(preset, twin):
    c = resolve(PretrainConfig, {"model": {"preset": preset, "dense_twin": twin}})
    assert resolve(PretrainConfig, to_dict(c)) == c
    assert resolve(PretrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(c)))) == c
    if not twin:
        assert c.model == ModelConfig.preset(preset)


def test_presets_are_not_shared_between_configurations():
    a, b = (resolve(PretrainConfig, {"model": {"preset": "v3-671b"}}) for _ in range(2))
    a.model.rope_scaling["factor"] = 1
    a.model.mtp_weight.append(0)
    assert b.model.rope_scaling["factor"] == 40 and PRESETS["v3-671b"]["rope_scaling"]["factor"] == 40
    raw = {"model": {"preset": "small"}, "train": {"steps": 3}}
    resolve(PretrainConfig, raw)
    assert raw == {"model": {"preset": "small"}, "train": {"steps": 3}}


def test_fingerprint_knows_what_changes_numbers():
    base = load(PretrainConfig, [])
    same = load(PretrainConfig, ["run.dir=elsewhere", "log.every=3", "log.wandb=disabled"])
    assert fingerprint(base) == fingerprint(same) and len(fingerprint(base)) == 8
    for change in ("train.seed=1", "model.routed_scaling_factor=1", "optim.lr=0.1", "data.fraction=0.5"):
        assert fingerprint(load(PretrainConfig, [change])) != fingerprint(base), change


def test_differences_name_each_leaf():
    a, b = (to_dict(load(PretrainConfig, x)) for x in ([], ["train.steps=5", "data.path=x"]))
    assert differences(a, b) == ["data.path: None -> x", "train.steps: 300 -> 5"] and differences(a, a) == []


def test_help_mentions_every_knob_and_its_meaning(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        load(PretrainConfig, ["train.steps=3", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for section in dataclasses.fields(PretrainConfig):
        for f in dataclasses.fields(section.default_factory):
            if f"{section.name}.{f.name}" in PretrainConfig.unused:
                continue
            assert f"{section.name}.{f.name}=" in text and f.metadata["meaning"] in text, f.name
    assert "model.preset=tiny" in text and "model.dense_twin=false" in text and "config=FILE" in text
    default = write(tmp_path, "d.yaml", "train.steps: 77\n").removeprefix("config=")
    assert "train.steps=77" in describe(PretrainConfig, default)


def test_every_default_is_inside_its_own_range_and_has_a_meaning():
    for section in (ModelConfig, DataConfig, OptimConfig, TrainConfig):
        for f in dataclasses.fields(section()):
            assert len(f.metadata["meaning"]) > 5, f.name


# ---------------------------------------------------------------------------------------------------- the dense twin


def feed_forward_flops(c):
    """Multiply-adds of all feed-forwards of a token, MTP blocks and routers included."""
    total = 0
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        if c.is_dense(layer):
            total += 3 * c.hidden_size * c.intermediate_size
        else:
            active = c.num_experts_per_tok + c.n_shared_experts
            total += 3 * c.hidden_size * c.moe_intermediate_size * active + c.hidden_size * c.n_routed_experts
    return total


@pytest.mark.parametrize("preset", PRESETS)
def test_dense_twin_has_equal_flops_depth_and_attention(preset):
    c = ModelConfig.preset(preset)
    twin = c.dense_twin()
    blocks = c.num_hidden_layers + c.num_nextn_predict_layers
    assert abs(feed_forward_flops(twin) - feed_forward_flops(c)) <= 3 * c.hidden_size * 4 * blocks  # multiples of 8
    assert all(twin.is_dense(i) for i in range(blocks)) and twin.intermediate_size % 8 == 0
    changed = {f.name for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(twin, f.name)}
    assert changed <= {"name", "intermediate_size", "n_routed_experts", "first_k_dense_replace"}
    assert twin.dense_twin() == twin


def test_dense_twin_is_asked_for_by_a_key_and_has_no_router():
    import torch

    from moe import Transformer

    c = load(PretrainConfig, ["model.dense_twin=true", "model.num_hidden_layers=2", "model.hidden_size=32"])
    model = Transformer(c.model)
    assert c.model.name == "tiny-dense" and not any("router" in n for n, _ in model.named_modules())
    out = model(torch.randint(0, 4096, (1, 5)))
    assert out.routings == {} and len(out.mtp_logits) == 1
    assert model.num_parameters() > model.num_parameters(active=True)  # the embedding table


def test_rows_of_a_step():
    assert load(PretrainConfig, ["train.batch_tokens=4096", "data.seq_len=128"]).rows == 32
