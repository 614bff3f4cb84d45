"""Every knob of the framework, and how one run's configuration is put together.

A section is a dataclass; a field owns its default, its type, its range and its meaning. Order of authority, weakest
first: dataclass default, `model.preset`, parents of the YAML file (`base:`), the file, `key=value` on the command line.

Field names of `ModelConfig` are the ones DeepSeek publishes in `config.json`. This module imports torch-free and loads
omegaconf only inside `load()`, so that a model builder needs neither.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any


class UserError(ValueError):
    """Something the user can mend: the message names the key or file, the value, the rule and a way out, in one line."""


def knob(default: Any, meaning: str, *, choices: list | None = None, ge=None, gt=None, le=None, lt=None) -> Any:
    """A dataclass field that knows its meaning and its range; `factory` defaults for mutable values."""
    metadata = dict(meaning=meaning, choices=choices, ge=ge, gt=gt, le=le, lt=lt)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def value_at(schedule: float | list, progress: float) -> float:
    """Value of a schedule at `progress` in [0, 1] of the run.

    A schedule is a number, or points `[[progress, value], ...]` joined by straight lines; two points at one progress
    make a step, the later one counting from there on.
    """
    if isinstance(schedule, (int, float)):
        return float(schedule)
    value = float(schedule[0][1])
    for (p0, v0), (p1, v1) in zip(schedule, schedule[1:]):
        if progress >= p1:
            value = float(v1)
        elif progress >= p0:
            return float(v0 + (v1 - v0) * (progress - p0) / (p1 - p0))
    return value


def _check_schedule(name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return
    try:
        points = [(float(p), float(v)) for p, v in value]
        ordered = all(a[0] <= b[0] for a, b in zip(points, points[1:]))
        fits = all(0 <= p <= 1 and v >= 0 and math.isfinite(v) for p, v in points)
        if points and ordered and fits:
            return
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"{name}={value} is not a schedule; write one number >= 0, or points [[progress, value], ...] with progress "
        "rising from 0 to 1, such as [[0, 0.3], [0.67, 0.3], [0.67, 0.1]]"
    )


class Section:
    """Base of every section: checks ranges and choices of its fields, naming the dotted key."""

    section = ""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, m = getattr(self, f.name), f.metadata
            key = f"{self.section}.{f.name}" if self.section else f.name
            if value is None or not m:
                continue
            if m.get("choices") and value not in m["choices"]:
                raise UserError(f"{key}={value!r} is not one of {m['choices']}{nearest(str(value), m['choices'])}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} must be a finite number")
            for rule, sign, ok in (
                ("ge", ">=", lambda v, r: v >= r),
                ("gt", ">", lambda v, r: v > r),
                ("le", "<=", lambda v, r: v <= r),
                ("lt", "<", lambda v, r: v < r),
            ):
                if m.get(rule) is not None and not ok(value, m[rule]):
                    raise UserError(f"{key}={value} must be {sign} {m[rule]}")


def nearest(word: str, options: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no option is close."""
    close = difflib.get_close_matches(word, [str(o) for o in options], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# ------------------------------------------------------------------------------------------------------------- model


@dataclass
class ModelConfig(Section):
    """Shape of a DeepSeek-V3-style Transformer. Defaults are the `tiny` preset."""

    section = "model"

    name: str = knob("custom", "name shown in headers and run folders; a preset sets it")
    vocab_size: int = knob(4096, "rows of the embedding and of the output head", ge=2)
    hidden_size: int = knob(128, "width D of the residual stream", ge=1)
    num_hidden_layers: int = knob(3, "blocks, MTP modules not counted", ge=1)
    first_k_dense_replace: int = knob(1, "leading blocks with a dense feed-forward instead of experts", ge=0)
    intermediate_size: int = knob(352, "width of the dense feed-forward", ge=1)

    attention: str = knob("mla", "entry of the ATTENTIONS table")
    num_attention_heads: int = knob(4, "heads H", ge=1)
    q_lora_rank: int | None = knob(64, "width of the query latent; null: full-rank queries", ge=1)
    kv_lora_rank: int = knob(32, "width C of the key-value latent, the part that is cached", ge=1)
    qk_nope_head_dim: int = knob(32, "width of a head's key part without position", ge=1)
    qk_rope_head_dim: int = knob(16, "width R of the rotary key, shared by all heads; even", ge=2)
    v_head_dim: int = knob(32, "width of a head's value", ge=1)
    max_position_embeddings: int = knob(4096, "longest position the rotary tables are meant for", ge=1)
    rope_theta: float = knob(10000.0, "base of the rotary frequencies", gt=0)
    rope_scaling: dict[str, Any] | None = knob(
        None, "YaRN as in DeepSeek's config.json: {type: yarn, factor, original_max_position_embeddings, ...}"
    )
    rms_norm_eps: float = knob(1e-6, "epsilon of every RMSNorm", gt=0)

    router: str = knob("topk", "entry of the ROUTERS table")
    n_routed_experts: int = knob(256, "routed experts E a layer; 0: every layer is dense", ge=0)
    n_shared_experts: int = knob(1, "shared experts, computed for every token as one wide expert", ge=0)
    num_experts_per_tok: int = knob(8, "routed experts K a token goes to", ge=1)
    moe_intermediate_size: int = knob(32, "width F of one expert", ge=1)
    n_group: int = knob(8, "expert groups for group-limited routing", ge=1)
    topk_group: int = knob(4, "groups a token may use", ge=1)
    scoring_func: str = knob("sigmoid", "affinity of a token to an expert", choices=["sigmoid", "softmax"])
    norm_topk_prob: bool = knob(True, "gates of the chosen experts sum to one before scaling")
    routed_scaling_factor: float = knob(2.5, "factor on the gates after normalisation", gt=0)

    balance: str = knob("bias", "entry of the BALANCERS table: bias (V3's auxiliary-loss-free rule) or none")
    bias_update_speed: Any = knob(0.001, "step of the router bias (gamma); number or [[progress, value], ...]")
    seq_aux_alpha: float = knob(1e-4, "weight of the sequence-wise balance loss; 0 switches it off", ge=0)

    num_nextn_predict_layers: int = knob(1, "depth D of multi-token prediction; dropped at inference", ge=0)
    mtp_weight: Any = knob(0.3, "weight (lambda) of the MTP loss; number or [[progress, value], ...]")
    mtp_rows: float = knob(1.0, "share of a batch's rows that carry the MTP loss: unbiased, and cheaper", gt=0, le=1)

    tie_word_embeddings: bool = knob(False, "output head shares the embedding's weight")
    init: str = knob(
        "scaled", "std of the weights: 0.006 sqrt(7168/hidden_size), or V3's literal 0.006", choices=["scaled", "paper"]
    )
    initializer_range: float | None = knob(None, "explicit std of the weights; overrides model.init", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_schedule("model.bias_update_speed", self.bias_update_speed)
        _check_schedule("model.mtp_weight", self.mtp_weight)
        if self.qk_rope_head_dim % 2:
            raise UserError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary positions turn pairs; "
                f"try {self.qk_rope_head_dim + 1}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise UserError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} exceeds "
                f"num_hidden_layers={self.num_hidden_layers}; lower it"
            )
        check_rope_scaling(self.rope_scaling, "model.rope_scaling")
        if self.n_routed_experts:
            check_routing(
                self.n_routed_experts,
                self.num_experts_per_tok,
                self.n_group,
                self.topk_group,
                self.norm_topk_prob,
                prefix="model.",
            )

    @classmethod
    def preset(cls, preset: str, /, **changes: Any) -> ModelConfig:
        """A named configuration (`PRESETS`), with changes: `ModelConfig.preset("tiny", num_hidden_layers=2)`."""
        if preset not in PRESETS:
            raise UserError(f"model.preset={preset!r} is not one of {list(PRESETS)}{nearest(preset, PRESETS)}")
        unknown = set(changes) - {f.name for f in fields(cls)}
        for name in unknown:
            raise UserError(f"model.{name} is not a knob{nearest(name, [f.name for f in fields(cls)])}")
        return cls(**{"name": preset, **PRESETS[preset], **changes})

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def init_std(self) -> float:
        """Standard deviation of every weight matrix (V3 section 4.2: 0.006 at width 7168)."""
        if self.initializer_range is not None:
            return self.initializer_range
        return 0.006 if self.init == "paper" else 0.006 * math.sqrt(7168 / self.hidden_size)

    def is_dense(self, layer: int) -> bool:
        """Whether block `layer` has a dense feed-forward. MTP blocks follow the last layer: index num_hidden_layers."""
        return self.n_routed_experts == 0 or layer < self.first_k_dense_replace

    def dense_twin(self) -> ModelConfig:
        """The dense model with this one's depth and attention, and its training FLOPs for a token.

        One feed-forward width for all blocks, chosen so that the multiply-adds of all feed-forwards (routers and MTP
        blocks included, the latter by their share of rows) are equal up to rounding to a multiple of 8.
        """
        if self.n_routed_experts == 0:
            return self
        d, f = self.hidden_size, self.moe_intermediate_size
        dense = self.first_k_dense_replace
        sparse = self.num_hidden_layers - dense + self.num_nextn_predict_layers * self.mtp_rows
        active = 3 * d * f * (self.num_experts_per_tok + self.n_shared_experts) + d * self.n_routed_experts
        total = dense * 3 * d * self.intermediate_size + sparse * active
        width = max(8, round(total / (3 * d * (dense + sparse)) / 8) * 8)
        return dataclasses.replace(
            self, name=f"{self.name}-dense", intermediate_size=width, n_routed_experts=0, first_k_dense_replace=0
        )


def check_routing(
    experts: int, k: int, n_group: int, topk_group: int, norm_topk_prob: bool, prefix: str = ""
) -> None:
    """Refuse what no router can do. Shared by `ModelConfig` and the layers, which take plain numbers."""
    if experts % n_group:
        groups = [g for g in range(1, min(experts, 64) + 1) if experts % g == 0]
        raise UserError(f"{prefix}n_group={n_group} must divide n_routed_experts={experts}; try one of {groups}")
    if topk_group > n_group:
        raise UserError(f"{prefix}topk_group={topk_group} exceeds n_group={n_group}; lower it")
    if k > topk_group * (experts // n_group):
        raise UserError(
            f"{prefix}num_experts_per_tok={k} cannot come from topk_group={topk_group} of n_group={n_group} groups of "
            f"{experts // n_group} experts; raise topk_group or lower num_experts_per_tok"
        )
    if n_group > topk_group and experts // n_group < 2:
        raise UserError(
            f"{prefix}n_group={n_group} leaves {experts // n_group} expert a group, but a group is scored by its two "
            "best; lower n_group"
        )
    if k == 1 and norm_topk_prob:
        raise UserError(
            f"{prefix}num_experts_per_tok=1 with norm_topk_prob=true makes every gate constant, so the router gets no "
            "gradient from the language loss; set norm_topk_prob=false or num_experts_per_tok=2"
        )


ROPE_KEYS = {
    "type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "rope_theta",
}  # fmt: skip


def check_rope_scaling(scaling: dict | None, key: str = "rope_scaling") -> None:
    """Refuse a rope scaling that is not YaRN, lacks a number, or has a misspelt key."""
    if scaling is None:
        return
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind not in ("yarn", "default"):
        raise UserError(f"{key}.type={kind!r} is not supported; use yarn, or null for plain rotary positions")
    for name in scaling:
        if name not in ROPE_KEYS:
            raise UserError(f"{key}.{name} is not a knob{nearest(name, ROPE_KEYS)}")
    if kind == "yarn":
        for name in ("factor", "original_max_position_embeddings"):
            value = scaling.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1:
                raise UserError(f"{key}.{name}={value} must be a number >= 1")


_V2 = dict(scoring_func="softmax", norm_topk_prob=False, balance="none", num_nextn_predict_layers=0, rms_norm_eps=1e-6)
_YARN = dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)

PRESETS: dict[str, dict[str, Any]] = {
    # The default: V3's routing and shape whole, its widths small. Learns in minutes on two CPU cores.
    "tiny": dict(
        bias_update_speed=[[0, 0.02], [0.33, 0.001], [0.966, 0.001], [0.966, 0]],
        mtp_weight=[[0, 0.3], [0.67, 0.3], [0.67, 0.1]],
        mtp_rows=0.25,
    ),
    # One 24 GB GPU with its optimizer.
    "small": dict(
        vocab_size=8192, hidden_size=512, num_hidden_layers=8, intermediate_size=1408, num_attention_heads=8,
        q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        moe_intermediate_size=128, bias_update_speed=[[0, 0.001], [0.966, 0.001], [0.966, 0]],
        mtp_weight=[[0, 0.3], [0.67, 0.3], [0.67, 0.1]],
    ),
    "v2-lite-16b": dict(
        _V2, vocab_size=102400, hidden_size=2048, num_hidden_layers=27, first_k_dense_replace=1,
        intermediate_size=10944, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        moe_intermediate_size=1408, n_group=1, topk_group=1, routed_scaling_factor=1.0,
        rope_scaling=dict(_YARN, mscale=0.707, mscale_all_dim=0.707), max_position_embeddings=163840, init="paper",
    ),
    "v2-236b": dict(
        _V2, vocab_size=102400, hidden_size=5120, num_hidden_layers=60, first_k_dense_replace=1,
        intermediate_size=12288, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6,
        moe_intermediate_size=1536, n_group=8, topk_group=3, routed_scaling_factor=16.0,
        rope_scaling=dict(_YARN, mscale=1.0, mscale_all_dim=1.0), max_position_embeddings=163840, init="paper",
    ),
    "v3-671b": dict(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, first_k_dense_replace=3, intermediate_size=18432,
        num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        n_group=8, topk_group=4, routed_scaling_factor=2.5, max_position_embeddings=163840,
        rope_scaling=dict(_YARN, mscale=1.0, mscale_all_dim=1.0), init="paper",
        bias_update_speed=[[0, 0.001], [0.966, 0.001], [0.966, 0]], mtp_weight=[[0, 0.3], [0.676, 0.3], [0.676, 0.1]],
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- other sections


@dataclass
class DataConfig(Section):
    section = "data"

    corpus: str = knob("torch", "embedded text: Python sources of torch or of the standard library",
                       choices=["torch", "stdlib"])  # fmt: skip
    path: str | None = knob(None, "your text instead: a .txt, .jsonl or other text file, or a folder of them")
    text_column: str = knob("text", "field of a jsonl line that holds the text")
    fraction: float = knob(1.0, "share of the embedded training files that is used", gt=0, le=1)
    val_fraction: float = knob(0.04, "share of your own documents held out for validation, by hash", gt=0, lt=1)
    tokenizer: str = knob("train", "train: byte-level BPE on this corpus; or the path of a tokenizer.json")
    seq_len: int = knob(256, "tokens of one training row", ge=2)
    mask_documents: bool = knob(True, "attention, positions and targets stop at document borders (V3 did not mask)")
    cache: str = knob("runs/cache", "folder of tokenised corpora")


@dataclass
class OptimConfig(Section):
    section = "optim"

    lr: float = knob(3e-3, "peak learning rate", gt=0)
    schedule: str = knob("v3", "entry of the SCHEDULES table: v3, cosine or constant")
    warmup: float = knob(0.02, "share of the run spent warming up", ge=0, lt=1)
    final_lr: float = knob(0.1, "last learning rate as a share of the peak", ge=0, le=1)
    beta1: float = knob(0.9, "AdamW's first decay", ge=0, lt=1)
    beta2: float = knob(0.95, "AdamW's second decay", ge=0, lt=1)
    eps: float = knob(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = knob(0.1, "decoupled decay of matrices; norms and biases have none", ge=0)
    grad_clip: float = knob(1.0, "largest global gradient norm; 0 switches clipping off", ge=0)


@dataclass
class TrainConfig(Section):
    section = "train"

    steps: int = knob(300, "optimizer steps", ge=1)
    seed: int = knob(0, "seed of initialisation and data order", ge=0)
    batch_tokens: int = knob(4096, "tokens of one optimizer step, over all ranks and micro-steps", ge=1)
    micro_batch_size: int = knob(16, "rows of one pass on one rank", ge=1)
    precision: str = knob("fp32", "fp32, or bf16: working copy in bf16, fp32 masters", choices=["fp32", "bf16"])
    ops: str = knob("auto", "path of moe.ops", choices=["auto", "reference", "torch"])
    zero_stage: int = knob(0, "DeepSpeed ZeRO stage; 0: plain all-reduce", choices=[0])
    activation_checkpointing: bool = knob(False, "recompute each block in the backward pass instead of storing it")
    compile: bool = knob(False, "torch.compile the model")
    device: str = knob("auto", "auto: cuda where there is one, else cpu", choices=["auto", "cpu", "cuda"])
    threads: int = knob(0, "CPU threads of each rank; 0: cores divided by local ranks", ge=0)
    keep_memory: bool = knob(True, "CPU with glibc: freed memory stays with the process, which halves a step's time")
    eval_every: int = knob(50, "steps between validations; 0: only at the end", ge=0)
    eval_tokens: int = knob(65536, "tokens of the fixed validation subset used during the run", ge=1)
    save_every: int = knob(100, "steps between checkpoints; 0: only at the end", ge=0)
    keep_checkpoints: int = knob(2, "checkpoints kept, newest first", ge=1)
    max_bad_steps: int = knob(10, "steps in a row with a non-finite loss or gradient before the run stops", ge=1)
    health_check: bool = knob(True, "check gradients of every expert and router at steps 1 and 100")
    export: bool = knob(True, "write a Hugging Face folder at the end")


@dataclass
class ParallelConfig(Section):
    section = "parallel"

    expert_parallel_size: int = knob(1, "ranks that share one set of experts", choices=[1])


@dataclass
class LogConfig(Section):
    section = "log"

    every: int = knob(10, "steps between console lines", ge=1)
    wandb: str = knob("auto", "auto: online only with a key at hand; never asks",
                      choices=["auto", "online", "offline", "disabled"])  # fmt: skip
    project: str = knob("moe", "wandb project")


@dataclass
class RunConfig(Section):
    section = "run"

    dir: str | None = knob(None, "run folder; the same command with the same folder resumes; null: runs/<name>-<hash>")
    dry_run: bool = knob(False, "print size, memory and expected time, then stop")


@dataclass
class PretrainConfig(Section):
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        rows = self.train.batch_tokens / self.data.seq_len
        if rows != int(rows):
            near = max(1, round(rows)) * self.data.seq_len
            raise UserError(
                f"train.batch_tokens={self.train.batch_tokens} must be a multiple of data.seq_len={self.data.seq_len}; "
                f"try {near}"
            )
        if self.data.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_position_embeddings="
                f"{self.model.max_position_embeddings}; raise the latter"
            )
        if self.data.seq_len < self.model.num_nextn_predict_layers + 2:
            raise UserError(
                f"data.seq_len={self.data.seq_len} leaves no target for model.num_nextn_predict_layers="
                f"{self.model.num_nextn_predict_layers}; raise it"
            )

    @property
    def rows(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.train.batch_tokens // self.data.seq_len


# ---------------------------------------------------------------------------------------------------------- resolving

PSEUDO = {  # keys that fill the model section instead of standing in it
    "model.preset": ("tiny", f"start from a named model: {', '.join(PRESETS)}"),
    "model.dense_twin": (False, "train the dense model of equal training FLOPs instead"),
}


def load(schema: type, argv: list[str] | None = None, default_file: str | None = None) -> Any:
    """Resolve one configuration from `config=FILE` and dotted `key=value` arguments; see the module docstring.

    `--key=value` is accepted too, `--help` prints every knob and exits, `--dry-run` sets `run.dry_run`. Raises
    `UserError` with one line for a typo (naming the nearest key), a wrong type or an impossible combination.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(describe(schema, default_file))
        raise SystemExit(0)
    file, overrides = default_file, []
    for arg in argv:
        text = arg.lstrip("-") if arg.startswith("--") else arg
        if text == "dry-run":
            text = "run.dry_run=true"
        key, eq, value = text.partition("=")
        if key in ("local_rank", "local-rank"):  # the deepspeed launcher adds it
            continue
        if not eq or not key:
            raise UserError(f"{arg!r} is not key=value; write for example train.steps=100, or --help for every knob")
        if key == "config":
            file = value
        else:
            overrides.append((key, value))
    raw: dict[str, Any] = {}
    for layer in _read_yaml(file) if file else []:
        _merge(raw, layer)
    types_by_key = _leaf_types(schema)
    for key, value in overrides:
        _merge(raw, _nest(key, _parse(key, value, types_by_key)))
    return resolve(schema, raw)


def resolve(schema: type, raw: dict[str, Any]) -> Any:
    """Nested plain values -> a checked instance of `schema`. `raw["model"]` may hold `preset` and `dense_twin`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = _leaf_types(schema)
    raw = json.loads(json.dumps(raw))  # a private copy
    _check_keys(raw, known)
    model = dict(raw.get("model") or {})
    preset, twin = model.pop("preset", PSEUDO["model.preset"][0]), model.pop("dense_twin", False)
    if not isinstance(twin, bool):
        raise UserError(f"model.dense_twin={twin!r} must be true or false")
    try:
        structured = OmegaConf.structured(schema)
        if "model" in {f.name for f in fields(schema)}:
            if preset is not None:
                ModelConfig.preset(str(preset))  # an unknown name fails here
                model = {"name": str(preset), **PRESETS[str(preset)], **model}
            raw["model"] = model
        config = OmegaConf.to_object(OmegaConf.merge(structured, OmegaConf.create(raw)))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, raw, known)) from None
    if twin:
        config.model = config.model.dense_twin()
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values; `resolve(type(config), to_dict(config))` gives an equal one."""
    values = dataclasses.asdict(config)
    if "model" in values:
        values["model"] = {"preset": None, **values["model"]}
    return values


def fingerprint(config: Any) -> str:
    """8 hex digits over everything that can change a run's numbers (not `run.*`, not `log.*`)."""
    values = {k: v for k, v in to_dict(config).items() if k not in ("run", "log")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def differences(a: dict, b: dict) -> list[str]:
    """`key: old -> new` for every leaf in which two plain configurations differ."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    keys = sorted(left.keys() | right.keys())
    return [f"{k}: {left.get(k)} -> {right.get(k)}" for k in keys if left.get(k) != right.get(k)]


def describe(schema: type, default_file: str | None = None) -> str:
    """The text of `--help`: every knob with its default, type and meaning."""
    defaults = load(schema, [], default_file) if default_file else schema()
    lines = ["usage: RECIPE [config=FILE] [key=value ...] [--dry-run] [--help]", ""]
    if default_file:
        lines += [f"defaults shown are those of {default_file}", ""]
    lines += [f"  {'config=FILE':34s} YAML that says only what differs; `base: other.yaml` names a parent"]
    for key, (default, meaning) in PSEUDO.items():
        lines.append(f"  {key + '=' + _show(default):34s} {meaning}")
    for section in fields(schema):
        values = getattr(defaults, section.name)
        lines += ["", f"{section.name}:"]
        for f in fields(values):
            shown = f"{section.name}.{f.name}={_show(getattr(values, f.name))}"
            choices = f.metadata.get("choices")
            note = f" (one of {', '.join(map(str, choices))})" if choices else ""
            lines.append(f"  {shown:34s} {f.metadata.get('meaning', '')}{note}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value).replace(" ", "")


def _read_yaml(file: str, seen: tuple[str, ...] = ()) -> list[dict]:
    """The file's parents first, then the file itself."""
    import yaml

    path = os.path.abspath(file)
    if path in seen:
        raise UserError(f"config file {file} is its own ancestor through base:; remove one base: line")
    try:
        with open(path, encoding="utf-8") as handle:
            content = _yaml(handle) or {}
    except FileNotFoundError:
        raise UserError(f"config file {file} does not exist; see recipes/configs for those that come along") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"config file {file} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {file} must hold sections such as 'model:' and 'train:'")
    base = content.pop("base", None)
    parents = _read_yaml(os.path.join(os.path.dirname(path), base), (*seen, path)) if base else []
    return [*parents, _expand_dots(content)]


def _yaml(text: Any) -> Any:
    """YAML in which 1e-3 is a number, as everyone who types it means it (YAML 1.1 reads text)."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml.load(text, Loader)  # a SafeLoader: plain values only


def _expand_dots(content: dict) -> dict:
    """YAML may write `train.steps: 5` at the top level as well as nested sections."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        _merge(result, _nest(str(key), value))
    return result


def _nest(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict, layer: dict) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and key != "rope_scaling":
            _merge(into[key], value)
        else:
            into[key] = value


def _leaves(values: dict, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and key != "rope_scaling":
            yield from _leaves(value, name + ".")
        else:
            yield name, value


def _leaf_types(schema: type) -> dict[str, Any]:
    """Dotted key -> annotation, for every knob of every section."""
    result: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for section in fields(schema):
        inner = hints[section.name]
        for f in fields(inner):
            result[f"{section.name}.{f.name}"] = typing.get_type_hints(inner)[f.name]
    for key, (default, _) in PSEUDO.items():
        result[key] = type(default)
    return result


def _check_keys(raw: dict, known: dict[str, Any]) -> None:
    sections = sorted({k.split(".")[0] for k in known})
    for name, value in raw.items():
        if name not in sections:
            tail = [k for k in known if k.endswith(f".{name}")]
            hint = f"; did you mean '{tail[0]}'?" if tail else nearest(name, [*sections, *known])
            raise UserError(f"{name} is not a section of this configuration{hint}")
        if not isinstance(value, dict):
            example = next(k for k in known if k.startswith(name + "."))
            raise UserError(f"{name}={value} is a whole section; set one of its keys, such as {example}=...")
    for key, _ in _leaves(raw):
        if key not in known:
            base = key.split(".")[0]
            same = {k.split(".")[-1]: k for k in known if k.startswith(base + ".")}
            elsewhere = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
            close = difflib.get_close_matches(key.split(".")[-1], same, n=1, cutoff=0.6)
            found = elsewhere[:1] or [same[c] for c in close]
            hint = f"; did you mean {found[0]!r}?" if found else nearest(key, known)
            raise UserError(f"{key} is not a knob{hint} (--help lists them all)")


def _parse(key: str, text: str, known: dict[str, Any]) -> Any:
    """A command-line value, read by the knob's type so that strings stay strings and 1e3 may be an integer."""
    import yaml

    hint = known.get(key)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    if text == "" and str not in allowed:
        raise UserError(f"{key}= has no value; write {key}=VALUE")
    if text in ("null", "None") and (type(None) in allowed or hint is Any):
        return None
    if str in allowed:
        return text
    try:
        value = _yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{key}={text} cannot be read as a value") from None
    if isinstance(value, str) and float in allowed:
        try:
            value = float(value)  # nan and inf, which the range check then refuses by name
        except ValueError:
            pass
    if isinstance(value, float) and int in allowed and float not in allowed and value.is_integer():
        value = int(value)
    return value


def _one_line(error: Exception, raw: dict, known: dict[str, Any]) -> str:
    key = getattr(error, "full_key", None) or ""
    value = dict(_leaves(raw)).get(key)
    hint = known.get(key)
    if hint is not None:
        names = [a.__name__ for a in (typing.get_args(hint) or (hint,)) if a is not type(None) and hasattr(a, "__name__")]
        kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping"}
        what = " or ".join(kinds.get(n, n) for n in names) or str(hint)
        return f"{key}={value} must be {what}"
    return f"{key}: {str(error).splitlines()[0]}"
