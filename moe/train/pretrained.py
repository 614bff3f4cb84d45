"""A trained model by the folder it lies in: a run folder of ours, or a Hugging Face folder.

    run folder      config.yaml, tokenizer.json, checkpoints/ (the newest whole one is taken)
    Hugging Face    config.json, *.safetensors, tokenizer.json (interop/hf.py)

Nothing is unpickled. Not here: writing either of them.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moe.config import ModelConfig, UserError
from moe.data.tokenizer import Tokenizer
from moe.interop import hf_config
from moe.interop.hf import from_hf
from moe.model import Transformer
from moe.train import checkpoint
from moe.train.run_folder import saved_config

SHAPE = [  # what a checkpoint fixes; the rest of the model section steers training and may change
    "vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace", "intermediate_size", "attention",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "router",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
    "scoring_func", "norm_topk_prob", "routed_scaling_factor", "tie_word_embeddings", "rope_theta", "rope_scaling",
]  # fmt: skip


class Pretrained(NamedTuple):
    model: Transformer
    """In eval mode, without MTP."""
    tokenizer: Tokenizer
    name: str


def load_model(path: str | Path) -> Pretrained:
    """Model and tokenizer of a folder, for inference. Raises UserError that names the file and the way out."""
    path = Path(path)
    config = dataclasses.replace(ModelConfig(**model_values(path)), num_nextn_predict_layers=0)
    if _is_run(path):
        model = Transformer(config)
        start_from(model, path)
    else:
        model = from_hf(path, mtp=False)
    return Pretrained(model.eval(), load_tokenizer(path), config.name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    path = Path(path)
    for file in (path / "tokenizer.json", path / "export" / "tokenizer.json"):
        if file.exists():
            return Tokenizer.load(file)
    raise UserError(f"{path} has no tokenizer.json; copy the one its model was trained with into the folder")


def model_values(path: str | Path) -> dict[str, Any]:
    """The model section of a folder, as plain values."""
    path = Path(path)
    if _is_run(path):
        try:
            values = {k: v for k, v in saved_config(path)["model"].items() if k != "preset"}
            return dataclasses.asdict(ModelConfig(**values))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}/config.yaml is damaged ({' '.join(str(error).split())}); restore it") from None
    if (path / "config.json").exists():
        return dataclasses.asdict(hf_config.read(path / "config.json", warnings.warn).config)
    what = "has neither config.yaml (a run folder) nor config.json (a Hugging Face folder)"
    raise UserError(f"{path} {what if path.is_dir() else 'does not exist'}; name the folder of a finished run")


def start_from(model: Transformer, path: str | Path) -> None:
    """Copy weights and router biases of a folder into `model`, whose MTP modules may be fewer, or fresh."""
    path = Path(path)
    have = ModelConfig(**model_values(path))
    for name in SHAPE:
        mine, theirs = getattr(model.config, name), getattr(have, name)
        if mine != theirs:
            raise UserError(
                f"model.{name}={mine}, but the model in {path} has {theirs}; leave model.{name} out, or start from "
                "another run.init"
            )
    weights = _weights(path)
    own = model.state_dict()
    for name in own.keys() - weights.keys():
        if not name.startswith("mtp."):
            raise UserError(f"{path} lacks the tensor {name} of its own config; restore the folder")
    model.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)


def _weights(path: Path) -> dict[str, Tensor]:
    if not _is_run(path):
        return from_hf(path).state_dict()
    found = checkpoint.load_latest(path / "checkpoints")
    if found is None:
        raise UserError(f"{path} has no checkpoint yet; let the run reach train.save_every, or name another folder")
    return found.tensors("model")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists()
