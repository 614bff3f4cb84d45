"""config.json of a DeepSeek-V3 folder <-> ModelConfig.

Written so that transformers 5.23 and vLLM accept it: DeepSeek's own keys, the rotary ones in their first form
(`rope_theta`, `rope_scaling`), and `moe_training` with what DeepSeek's keys cannot say (schedules, names, weights of
losses), so that reading gives back an equal ModelConfig. Read in either rotary form; `rope_parameters` is the one
transformers 5 writes. What cannot be computed here is refused, never ignored.

YaRN without both mscale and mscale_all_dim means two things: DeepSeek's code (vLLM's and ours too) takes 1 and 0 for
what is missing, transformers then drops the other one as well. We write `attention_factor`, which only transformers
reads, where the two disagree, and read `rope_parameters` as transformers means it.

Not here: `aux_loss_alpha`, which released files carry as a left-over (V3 trained with 1e-4), is written but not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.config import ModelConfig, UserError, check_rope_scaling, nearest
from moe.layers.basics import Rotary

TRAINING = "moe_training"
NEEDED = [
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
]  # fmt: skip
NEEDED_WITH_EXPERTS = [
    "first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
]  # fmt: skip
OPTIONAL = ["rms_norm_eps", "tie_word_embeddings", "initializer_range", "num_nextn_predict_layers", "scoring_func"]
SAID = [*NEEDED, *NEEDED_WITH_EXPERTS, *OPTIONAL, "rope_theta", "rope_scaling"]
FEWER = {"q_lora_rank": None, "n_shared_experts": 0, "n_group": 1, "topk_group": 1}  # what null or 0 means there

FIXED: dict[str, tuple[list, str]] = {  # key: (the values we compute, what to do about others)
    "scoring_func": (["sigmoid"], "only sigmoid routers (DeepSeek-V3, not V2) can be loaded"),
    "topk_method": (["noaux_tc"], "only DeepSeek-V3's bias-steered choice (noaux_tc) can be loaded"),
    "hidden_act": (["silu"], "only SwiGLU feed-forwards can be loaded"),
    "attention_bias": ([False, None], "attention with biases cannot be loaded"),
    "moe_layer_freq": ([1], "only models with experts in every layer after the dense ones can be loaded"),
    "rope_interleave": ([True], "reorder the rotary rows of q_b_proj and kv_a_proj_with_mqa to pairs first"),
}


class Source(typing.NamedTuple):
    """What config.json told."""

    config: ModelConfig
    fp8_block: tuple[int, int] | None
    """Shape of a block with one scale; None: not quantised."""


# ------------------------------------------------------------------------------------------------------------- writing


def to_json(config: ModelConfig, dtype: str, ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of config.json. `ids`: bos, eos and pad of the tokenizer, or nothing (then null, never a guess)."""
    values = _said(config)
    training = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in SAID
    }  # always whole: a default may change between versions
    read = dataclasses.asdict(_read_said(values, "config.json", lambda message: None))
    training |= {k: getattr(config, k) for k in SAID if read[k] != getattr(config, k)}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **values,
        "topk_method": "noaux_tc",
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "pretraining_tp": 1,
        "rope_interleave": True,
        "aux_loss_alpha": config.seq_aux_alpha,
        "seq_aux": True,
        "use_cache": True,
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ids.get("eos"),
        # With pad = eos the embedding of eos would get no gradient in transformers.
        "pad_token_id": None if ids.get("pad") == ids.get("eos") else ids.get("pad"),
        "dtype": dtype,
        "torch_dtype": dtype,
        TRAINING: training,
    }


def check_writable(config: ModelConfig) -> None:
    """Refuse what the format has no words for."""
    for key, value, fits in (
        ("attention", config.attention, "mla"),
        ("router", config.router, "topk"),
        ("scoring_func", config.scoring_func, "sigmoid"),
    ):
        if value != fits and (key == "attention" or config.n_routed_experts):
            raise UserError(
                f"model.{key}={value} cannot be exported: the DeepSeek-V3 format only holds {key}={fits}; "
                "keep the run's own checkpoint instead (train.export=false)"
            )


def _said(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek's keys."""
    values = {k: getattr(config, k) for k in [*NEEDED, *NEEDED_WITH_EXPERTS, *OPTIONAL]}
    values |= {"initializer_range": config.init_std, "rope_theta": config.rope_theta, "scoring_func": "sigmoid"}
    values["rope_scaling"] = _write_rope(config)
    if config.n_routed_experts == 0:  # as if the dense prefix never ended
        values["first_k_dense_replace"] = config.num_hidden_layers + config.num_nextn_predict_layers
    elif config.topk_group == config.n_group and config.n_routed_experts // config.n_group < 2:
        values["n_group"] = values["topk_group"] = 1  # same choice; transformers wants two experts a group at least
    return values


def _write_rope(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None or _kind(scaling) == "default":
        return None
    dropped = ("type", "rope_type", "rope_theta")
    written = {"type": "yarn"} | {k: v for k, v in scaling.items() if v is not None and k not in dropped}
    ours = Rotary(config.qk_rope_head_dim, config.rope_theta, scaling).magnitude
    if not math.isclose(ours, _magnitude_in_transformers(written), rel_tol=1e-12):
        written["attention_factor"] = ours
    return written


# ------------------------------------------------------------------------------------------------------------- reading


def read(file: Path, warn: Callable[[str], Any]) -> Source:
    """Parse and check a config.json."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; name a folder with config.json and safetensors files") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not valid JSON ({reason}); download or export it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold one JSON object; download or export it again")
    if values.get("model_type") != "deepseek_v3":
        raise UserError(
            f"{file}: model_type={values.get('model_type')!r} is not supported; only deepseek_v3 can be loaded"
        )
    for key, (fits, remedy) in FIXED.items():
        if key in values and values[key] not in fits:
            raise UserError(f"{file}: {key}={values[key]!r} is not supported; {remedy}")
    heads = values.get("num_key_value_heads")
    if heads not in (None, values.get("num_attention_heads")):
        raise UserError(f"{file}: num_key_value_heads={heads!r} must equal num_attention_heads; correct or delete it")
    try:
        config = _read_said(values, file, warn)
        config = _restore(config, values, file)
    except UserError as error:
        text = str(error)
        raise UserError(text if str(file) in text else f"{file}: {text}") from None
    return Source(config, _fp8_block(values, file))


def _read_said(values: dict[str, Any], file: Path | str, warn: Callable[[str], Any]) -> ModelConfig:
    """From DeepSeek's keys alone; training-only knobs stay at their defaults."""
    values = dict(values)
    if "num_mtp_layers" in values:  # transformers' other name
        values.setdefault("num_nextn_predict_layers", values["num_mtp_layers"])
    dense = not values.get("n_routed_experts", 1)
    told: dict[str, Any] = {"n_routed_experts": 0} if dense else {}
    for key in NEEDED if dense else [*NEEDED, *NEEDED_WITH_EXPERTS]:
        if key not in values:
            raise UserError(f"{file} lacks {key}; add it, or download or export the folder again")
    for key in [*NEEDED, *NEEDED_WITH_EXPERTS, *OPTIONAL]:
        value = values.get(key)
        if not value and key in FEWER:
            value = FEWER[key]
        if key in told or key not in values or (value is None and (dense or key in OPTIONAL) and key not in NEEDED):
            continue
        told[key] = typed(f"{file}: {key}", key, value)
    if "first_k_dense_replace" in told:
        told["first_k_dense_replace"] = min(told["first_k_dense_replace"], told["num_hidden_layers"])
    told["rope_theta"], told["rope_scaling"] = _read_rope(values, file, warn)
    return ModelConfig(**{"num_nextn_predict_layers": 0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **told})


def _restore(config: ModelConfig, values: dict[str, Any], file: Path) -> ModelConfig:
    """Add what only we know. A shape key that was edited in config.json since counts as edited."""
    training = values.get(TRAINING, {})
    if not isinstance(training, dict):
        raise UserError(f"{file}: {TRAINING}={training!r} must be an object; delete it to load with default knobs")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    for key in training:
        if key not in names:
            raise UserError(f"{file}: {TRAINING}.{key} is not a knob{nearest(key, names)}; delete it to go on")
    checked = {k: typed(f"{file}: {TRAINING}.{k}", k, v) for k, v in training.items()}
    free = {k: v for k, v in checked.items() if k not in SAID}
    shape = {k: v for k, v in checked.items() if k in SAID}
    now = _said(dataclasses.replace(config, **checked))
    shape = {k: v for k, v in shape.items() if now[k] == values.get(k)}
    return dataclasses.replace(config, **free, **shape)


def _read_rope(values: dict[str, Any], file: Path | str, warn: Callable[[str], Any]) -> tuple[float, dict | None]:
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    scaling = values.get(key) or {}
    if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
        raise UserError(f"{file}: {key}={scaling!r} is not supported; use one object with type yarn, or null")
    theta = scaling.get("rope_theta", values.get("rope_theta", ModelConfig.rope_theta))
    theta = typed(f"{file}: rope_theta", "rope_theta", theta)
    if _kind(scaling) == "default":
        return theta, None
    told = {k: v for k, v in scaling.items() if v is not None and k not in ("type", "rope_type", "rope_theta")}
    told = {"type": _kind(scaling), **told}
    for name, neutral in (("truncate", True), ("partial_rotary_factor", 1)):
        if told.pop(name, neutral) != neutral:
            raise UserError(f"{file}: {key}.{name}={scaling[name]!r} is not supported; only {json.dumps(neutral)} is")
    for name, value in told.items():
        if name != "type" and not (type(value) in (int, float) and math.isfinite(value)):
            raise UserError(f"{file}: {key}.{name}={value!r} must be a number")
    wanted = _magnitude_in_transformers(told) if told["type"] == "yarn" and "factor" in told else 1.0
    explicit = told.pop("attention_factor", None) is not None
    check_rope_scaling(told, f"{file}: {key}")
    ours = Rotary(2, theta, told).magnitude
    if math.isclose(ours, wanted, rel_tol=1e-9):
        return theta, told
    if key == "rope_scaling" and not explicit:
        warn(
            f"{file}: rope_scaling needs both mscale and mscale_all_dim, or DeepSeek's code (followed here) and "
            "transformers compute different models; write both"
        )
        return theta, told
    growth = 0.1 * math.log(told["factor"])  # the mscale that gives the wanted magnitude
    overall = float(told.get("mscale_all_dim") or 0)
    told["mscale"] = (wanted * (growth * overall + 1.0) - 1.0) / growth if growth else 1.0
    told["mscale"] = told["mscale"] or 1e-30  # 0 would read as "not given"
    if not math.isclose(Rotary(2, theta, told).magnitude, wanted, rel_tol=1e-9):
        raise UserError(f"{file}: {key}.attention_factor={wanted} is not supported with this factor; delete it")
    return theta, told


def _magnitude_in_transformers(scaling: dict[str, Any]) -> float:
    """What transformers multiplies cos and sin by (modeling_rope_utils._compute_yarn_parameters)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    growth = 0.1 * math.log(max(float(scaling["factor"]), 1.0))
    one, two = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return (growth * one + 1.0) / (growth * two + 1.0) if one and two else growth + 1.0


def _kind(scaling: dict[str, Any]) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _fp8_block(values: dict[str, Any], file: Path) -> tuple[int, int] | None:
    how = values.get("quantization_config")
    if how is None:
        return None
    block = how.get("weight_block_size") if isinstance(how, dict) else None
    known = isinstance(how, dict) and how.get("quant_method") == "fp8" and how.get("fmt", "e4m3") == "e4m3"
    if not known or not isinstance(block, list) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        method = how.get("quant_method") if isinstance(how, dict) else how
        raise UserError(
            f"{file}: quantization_config with quant_method={method!r} is not supported, only DeepSeek's block fp8 is "
            "(quant_method fp8, fmt e4m3, weight_block_size [128, 128]); download the unquantised weights"
        )
    return block[0], block[1]


def typed(shown: str, key: str, value: Any) -> Any:
    """`value` if it has the type of the knob `key` of ModelConfig; integers become floats where those are due."""
    hint = typing.get_type_hints(ModelConfig)[key]
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(k) or k for k in union]
    if typing.Any in kinds or type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "an object"}
    what = " or ".join(names.get(k, "null") for k in kinds)
    raise UserError(f"{shown}={value!r} must be {what}")
