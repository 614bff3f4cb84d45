"""What a card allows at best: FLOPs and bytes of every kernel, of a layer and of a whole training step.

    floor of a kernel = max(bytes / bandwidth, FLOPs / rate), every tensor read or written once
    floor of a layer or a step = the sum over its kernels

Bandwidth and rate are what a card reaches in practice, nine and eight tenths of its data sheet (an H200: 4.3 TB/s,
790 TFLOP/s). Rows that several experts share count once, which holds where x and dy fit into L2. Pure functions; what is
left out of a step (norms, residual sums, activations of dense layers) could be fused into its neighbours.

    N tokens, D width, F expert width, E experts, K choices, M = N K rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe.analysis.ceiling import known_peak
from moe.analysis.planner import parameters
from moe.config import ModelConfig


class Shape(NamedTuple):
    tokens: int
    width: int
    hidden: int
    experts: int = 256
    choices: int = 8

    @property
    def rows(self) -> int:
        return self.tokens * self.choices


SIZES = {"S": Shape(8192, 512, 64), "M": Shape(16384, 1024, 256), "L": Shape(32768, 2048, 512)}
TINY = Shape(20, 32, 16, 8, 2)


class Work(NamedTuple):
    flops: float
    bytes: float


class Card(NamedTuple):
    bandwidth: float
    """bytes/s"""
    rate: float
    """bf16 FLOP/s"""
    source: str

    def seconds(self, work: Work) -> float:
        return max(work.bytes / self.bandwidth, work.flops / self.rate)

    def bound(self, work: Work) -> str:
        return "memory" if work.bytes / self.bandwidth >= work.flops / self.rate else "tensor cores"


BANDWIDTHS = {  # bytes/s of NVIDIA's data sheets; the longest name that fits counts
    "B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "A100": 1.555e12,
    "A100 80GB": 2.039e12, "A10": 0.6e12, "L40S": 0.864e12, "L4": 0.3e12, "RTX 4090": 1.008e12, "RTX 3090": 0.936e12,
}  # fmt: skip
REACHED = 0.9, 0.8
"""Of the data sheet's bandwidth and rate."""


def known_card(name: str) -> Card | None:
    """By the name its driver gives."""
    words = name.replace("-", " ").split()
    fits = [known for known in BANDWIDTHS if all(word in words for word in known.split())]
    rate = known_peak(name, torch.bfloat16)
    if not fits or rate is None:
        return None
    bandwidth = BANDWIDTHS[max(fits, key=len)]
    return Card(REACHED[0] * bandwidth, REACHED[1] * rate, "nine and eight tenths of the data sheet")


# ------------------------------------------------------------------------------------------------------------- a layer

FORWARD = ("up_swiglu", "down", "combine")
BACKWARD = ("bwd_act", "dw2", "dx", "combine_dx", "dw13")
GROUPS = {
    "forward": FORWARD,
    "forward+backward": FORWARD + BACKWARD,
    "layer": ("router", "route", *FORWARD, *BACKWARD),
}
"""Rows of the table that are sums. `layer` leaves the router's backward pass out."""


def kernels(s: Shape, live: int | None = None, gradient: int = 2, base: bool = False) -> dict[str, Work]:
    """Work of each kernel of a layer in bf16.

    live: experts that somebody chose, whose weights are read. gradient: bytes of one number of dw. base: the combine
    adds to a tensor.
    """
    n, d, f, e, m = s.tokens, s.width, s.hidden, s.experts, s.rows
    w2 = (e if live is None else live) * f * d
    return {
        "router": Work(2 * n * d * e, 2 * n * d + 2 * d * e + 4 * n * e),
        "route": Work(0, 4 * n * e + 32 * m),
        "up_swiglu": Work(4 * m * d * f, 4 * w2 + 2 * n * d + 6 * m * f),
        "down": Work(2 * m * d * f, 2 * w2 + 2 * m * f + 2 * m * d),
        "combine": Work(0, 2 * m * d + (4 if base else 2) * n * d),
        "bwd_act": Work(2 * m * d * f, 2 * w2 + 2 * n * d + 10 * m * f),
        "dw2": Work(2 * m * d * f, 2 * m * f + 2 * n * d + gradient * e * f * d),
        "dx": Work(4 * m * d * f, 4 * m * f + 4 * w2 + 2 * m * d),
        "combine_dx": Work(0, 2 * m * d + 2 * n * d),
        "dw13": Work(4 * m * d * f, 4 * m * f + 2 * n * d + 2 * gradient * e * f * d),
    }


def row(name: str, s: Shape, card: Card, live: int | None = None) -> tuple[float, Work]:
    """-> seconds and work of a row of the table, a kernel or a sum."""
    work = kernels(s, live)
    parts = [work[part] for part in GROUPS.get(name, (name,))]
    return sum(map(card.seconds, parts)), Work(sum(w.flops for w in parts), sum(w.bytes for w in parts))


# -------------------------------------------------------------------------------------------------------------- a step


class Times(NamedTuple):
    count: float
    work: Work


def product(n: float, a: int, b: int) -> Times:
    """Forward pass, input gradient and weight gradient of [n, a] x [a, b]: three products that move the same bytes."""
    return Times(3, Work(2 * n * a * b, 2 * (n * a + n * b + a * b)))


def step(c: ModelConfig, rows: int, seq_len: int, passes: int) -> dict[str, list[Times]]:
    """Work of one optimizer step by part: `rows` rows in `passes` passes, bf16 with fp32 masters, sums and moments."""
    d, heads, f = c.hidden_size, c.num_attention_heads, c.moe_intermediate_size
    query, key = heads * c.qk_head_dim, c.kv_lora_rank
    found: dict[str, list[Times]] = {
        name: []
        for name in (
            "routed experts",
            "router",
            "attention products",
            "attention core",
            "dense and shared",
            "head",
            "MTP",
        )
    }
    depths = c.num_nextn_predict_layers if c.mtp_rows else 0
    for layer in range(c.num_hidden_layers + depths):
        n = rows * seq_len / passes * (1 if layer < c.num_hidden_layers else c.mtp_rows)
        q = [(d, c.q_lora_rank), (c.q_lora_rank, query)] if c.q_lora_rank else [(d, query)]
        kv = [
            (d, key + c.qk_rope_head_dim),
            (key, heads * (c.qk_nope_head_dim + c.v_head_dim)),
            (heads * c.v_head_dim, d),
        ]
        found["attention products"] += [product(n, a, b) for a, b in q + kv]
        both = heads * (c.qk_head_dim + c.v_head_dim)
        core = Work(both * n * (seq_len + 1), 4 * n * both)  # scores and values, the causal half
        found["attention core"] += [Times(1, core), Times(1, Work(2 * core.flops, 2 * core.bytes))]
        if c.is_dense(layer):
            found["dense and shared"] += [product(n, d, 2 * c.intermediate_size), product(n, c.intermediate_size, d)]
        else:
            shape = Shape(n, d, f, c.n_routed_experts, c.num_experts_per_tok)  # type: ignore[arg-type]
            work = kernels(shape)
            found["routed experts"] += [Times(1, work[name]) for name in FORWARD + BACKWARD]
            found["router"] += [product(n, d, c.n_routed_experts), Times(1, work["route"])]
            if wide := c.n_shared_experts * f:
                found["dense and shared"] += [product(n, d, 2 * wide), product(n, wide, d)]
        if layer >= c.num_hidden_layers:
            found["MTP"] += [product(n, 2 * d, d), product(n, d, c.vocab_size)]
    found["head"] = [product(rows * seq_len / passes, d, c.vocab_size)]
    whole = {name: [Times(passes * t.count, t.work) for t in parts] for name, parts in found.items() if parts}
    size = parameters(c)
    count = size.total + size.mtp
    # a pass: its bf16 gradient is read, the fp32 sum read and written, but for the first pass, which writes
    whole["gradient sums"] = [Times(1, Work(0, count * (10 * passes - 4)))]
    # the sum; master and two moments, read and written; the bf16 copy
    whole["optimizer"] = [Times(1, Work(0, count * (4 + 24 + 2)))]
    return whole


def step_seconds(work: dict[str, list[Times]], card: Card) -> dict[str, float]:
    """Each part's floor."""
    return {name: sum(t.count * card.seconds(t.work) for t in parts) for name, parts in work.items()}
