"""The model section: shape and training-only choices of a DeepSeek-V3-style Transformer, and the named presets.

Field names are the ones DeepSeek publishes in `config.json`. Torch-free, so that a model builder pays nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import Any

from moe.config.knobs import Section, UserError, check_schedule, knob, nearest


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

    balance: str = knob(
        "bias", "entry of the BALANCERS table: bias (V3's auxiliary-loss-free rule), aux (batch-wise loss) or none"
    )
    aux_alpha: float = knob(1e-3, "weight of the batch-wise balance loss of model.balance=aux", ge=0)
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
        check_schedule("model.bias_update_speed", self.bias_update_speed)
        check_schedule("model.mtp_weight", self.mtp_weight)
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


def check_routing(experts: int, k: int, n_group: int, topk_group: int, norm_topk_prob: bool, prefix: str = "") -> None:
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
    # For tasks in a vocabulary of single characters: fine-tuning and reinforcement learning in minutes on two cores.
    "tiny-rl": dict(
        vocab_size=24, num_hidden_layers=2, first_k_dense_replace=0, n_routed_experts=32, num_experts_per_tok=4,
        n_group=1, topk_group=1, max_position_embeddings=256, num_nextn_predict_layers=0,
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
