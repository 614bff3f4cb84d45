"""What a configuration costs, by arithmetic alone: parameters, FLOPs, cache, memory, tokens an expert, the dense twin.

    forward FLOPs a token = 2 x (matmul weights it meets; no embedding lookup, each use of the head)
                          + 2 H (d_qk + d_v) (S + 1) / 2 for each layer
    training = 3 x forward; recomputation is never counted

No model is built; tests hold the counts against the modules themselves. Attention is counted as MLA in its expanded
form, experts as SwiGLU. A deeper MTP depth k sees k tokens less; that difference is ignored.
Sources: DeepSeek-V2 (arXiv 2405.04434) table 1 for the cache; sampling floor: largest of E independent loads.
Not here: time, which depends on the machine (ceiling.py has what MFU is measured against), and ZeRO's shares.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from moe.analysis.diagnostics import maxvio_floor
from moe.config import ModelConfig

FORMULA = (
    "training FLOPs = 3 x forward; forward = 2 x (matmul weights a token meets, embedding lookup excluded, each "
    "use of the head included) + 2 H (d_qk + d_v) (S + 1) / 2 per layer; recomputation is never counted"
)
CHUNK = 512  # rows of logits that exist at a time: ops.linear_cross_entropy
BLOCK = 128  # query rows of a pass of the CPU attention, which keeps its probabilities: kernels/attention.py


@dataclass(frozen=True)
class Parameters:
    total: int
    """Main model, embedding and head included (V3: 671,026,404,352)."""
    active: int
    """Those one token meets: K of E experts, the head but not the embedding table (V3: 36,625,603,584)."""
    mtp: int
    """MTP modules, which are dropped at inference; they use the main embedding and head."""
    mtp_active: int


@dataclass(frozen=True)
class Flops:
    """A token of a row of `seq_len`."""

    seq_len: int
    matmul_weights: dict[str, int]
    """Weights that a token is multiplied with, by part; `mtp` holds all depths, each with its use of the head."""
    attention: float
    """Forward FLOPs of scores and values, MTP included: the part that grows with the row."""
    forward: float
    training: float
    training_without_mtp: float


@dataclass(frozen=True)
class Cache:
    elements: int
    """(kv_lora_rank + qk_rope_head_dim) x layers; drafting with MTP adds one layer for each depth."""
    full_elements: int
    """What full keys and values of every head would take: H (d_qk + d_v) x layers."""
    bytes: int
    """In bf16."""
    full_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on one rank while training without sharding. The first four are exact, the others estimates.

    The process holds more: torch itself, and the allocator's slack.
    """

    weights: int
    master: int
    gradients: int
    moments: int
    activations: int
    """Kept between forward and backward of one pass."""
    head: int
    """A chunk of logits, and the head's gradients, which the forward pass makes."""
    workspace: int
    """Rows in expert order while one layer's experts run backward."""
    total: int


@dataclass(frozen=True)
class Balance:
    tokens_per_expert: float
    """Of one optimizer step."""
    tokens_per_expert_std: float
    """Sampling noise under perfect balance: K of E drawn independently for each token."""
    tokens_per_expert_pass: float
    """Of one pass on one rank: the rows of an expert's matrix products."""
    maxvio_floor: float


@dataclass(frozen=True)
class Twin:
    """The dense model with the same depth, attention and training FLOPs."""

    intermediate_size: int
    total: int
    active: int
    training: float


@dataclass(frozen=True)
class Plan:
    name: str
    parameters: Parameters
    flops: Flops
    cache: Cache
    memory: Memory
    balance: Balance | None
    twin: Twin | None
    batch_tokens: int
    passes: int
    """Micro-steps of one optimizer step on one rank."""
    precision: str
    notes: list[str]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


# ---------------------------------------------------------------------------------------------- parameters and FLOPs


def _attention(c: ModelConfig) -> int:
    """Matmul weights of one MLA."""
    d, heads = c.hidden_size, c.num_attention_heads
    query = heads * c.qk_head_dim
    q = d * c.q_lora_rank + c.q_lora_rank * query if c.q_lora_rank else d * query
    kv = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return q + kv + heads * c.v_head_dim * d


def _ffn(c: ModelConfig, layer: int, active: bool) -> dict[str, int]:
    """Weights of one feed-forward by part; all of them, or those one token meets."""
    d = c.hidden_size
    if c.is_dense(layer):
        return {"dense": 3 * d * c.intermediate_size}
    expert = 3 * d * c.moe_intermediate_size
    return {
        "router": d * c.n_routed_experts,
        "routed": expert * (c.num_experts_per_tok if active else c.n_routed_experts),
        "shared": expert * c.n_shared_experts,
    }


def parameters(config: ModelConfig) -> Parameters:
    """Exact counts, equal to `Transformer.num_parameters`."""
    c, d = config, config.hidden_size
    norms = 2 * d + (c.q_lora_rank or 0) + c.kv_lora_rank

    def blocks(start: int, stop: int, active: bool) -> int:
        return sum(_attention(c) + norms + sum(_ffn(c, i, active).values()) for i in range(start, stop))

    layers, end = c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers
    table = c.vocab_size * d
    around = (end - layers) * (2 * d * d + 3 * d)  # projection and three norms of each MTP depth
    return Parameters(
        total=blocks(0, layers, False) + d + table * (1 if c.tie_word_embeddings else 2),
        active=blocks(0, layers, True) + d + table,
        mtp=blocks(layers, end, False) + around,
        mtp_active=blocks(layers, end, True) + around,
    )


def flops(config: ModelConfig, seq_len: int, mtp: bool = True) -> Flops:
    """FLOPs of one token in a row of `seq_len` tokens; `mtp=False`: the MTP loss takes no part."""
    c = config
    depths = c.num_nextn_predict_layers if mtp else 0
    head = c.vocab_size * c.hidden_size
    weights = {"attention": _attention(c) * c.num_hidden_layers, "dense": 0, "router": 0, "routed": 0, "shared": 0}
    for layer in range(c.num_hidden_layers):
        for part, count in _ffn(c, layer, active=True).items():
            weights[part] += count
    weights |= {"head": head, "mtp": 0}
    main = sum(weights.values())
    for layer in range(c.num_hidden_layers, c.num_hidden_layers + depths):
        weights["mtp"] += 2 * c.hidden_size**2 + _attention(c) + sum(_ffn(c, layer, active=True).values()) + head
    weights["mtp"] = round(weights["mtp"] * c.mtp_rows)  # the other rows skip it
    core = 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * (seq_len + 1) / 2
    attention = core * (c.num_hidden_layers + depths * c.mtp_rows)
    forward = 2 * sum(weights.values()) + attention
    alone = 2 * main + core * c.num_hidden_layers
    return Flops(seq_len, weights, attention, forward, 3 * forward, 3 * alone)


def mfu_flops(config: ModelConfig, seq_len: int, mtp: bool | None = None) -> float:
    """Training FLOPs a token that MFU counts. mtp: whether the MTP loss takes part; None: unless its weight is 0."""
    if mtp is None:
        weight = config.mtp_weight
        mtp = weight > 0 if isinstance(weight, (int, float)) else any(value > 0 for _, value in weight)
    return flops(config, seq_len, mtp).training


# ------------------------------------------------------------------------------------------------------------- memory


def _saved(c: ModelConfig, layer: int, seq_len: int, b: int, path: str, recompute_z: bool = False) -> int:
    """Bytes a token that one block keeps for its backward pass, of working type with `b` bytes."""
    d, heads = c.hidden_size, c.num_attention_heads
    wide = [d, d, c.kv_lora_rank, c.q_lora_rank or 0]
    kept = sum(_norm(width, b, path) for width in wide)
    # queries, what kv_b made (keys and values are views of it), output
    kept += b * heads * (c.qk_head_dim + c.qk_nope_head_dim + 2 * c.v_head_dim)
    if path == "native":  # it turns queries and keys itself, and keeps one number a row of scores
        kept += 4 * heads + b * c.qk_rope_head_dim
    else:
        kept += b * heads * c.qk_head_dim  # keys with their rotary part
    if path == "torch":
        kept += b * heads * (seq_len + min(seq_len, BLOCK)) // 2
    swiglu = 3 if path == "native" else 4
    if c.is_dense(layer):
        return kept + swiglu * b * c.intermediate_size
    kept += 4 * c.n_routed_experts + 16 * c.num_experts_per_tok  # scores, ids, gates: wide
    kept += 4 * d if b < 4 and path != "native" else 0  # and the router's input
    z = 0 if recompute_z else 2 * c.num_experts_per_tok
    return kept + b * c.moe_intermediate_size * (z + swiglu * c.n_shared_experts)


def _norm(width: int, b: int, path: str) -> int:
    """RMSNorm keeps its input and one number a row; its output is kept by whoever multiplies it. On GPUs nothing else."""
    return 2 * b * width + (0 if path == "triton" else 4)


def _fill(c: ModelConfig, tokens: int) -> int:
    """Rows that bf16 experts on CPUs are filled up with, at most: kernels/eager.py."""
    choices = tokens * c.num_experts_per_tok
    return choices // 8 + 15 * min(choices, c.n_routed_experts) + 1


def memory(
    config: ModelConfig,
    seq_len: int,
    rows: int,
    precision: str = "fp32",
    activation_checkpointing: bool = False,
    path: str = "torch",
    mtp: bool = True,
    recompute_z: bool = False,
) -> Memory:
    """Training memory of one rank that takes `rows` rows a pass. path: that of moe.ops, `triton` for a GPU; by PyTorch
    attention keeps its probabilities and experts are filled up with rows."""
    c = config
    count = parameters(c)
    n = count.total + count.mtp
    b = 4 if precision == "fp32" else 2
    tokens, d = rows * seq_len, c.hidden_size
    depths = c.num_nextn_predict_layers if mtp else 0
    blocks: list[float] = [_saved(c, i, seq_len, b, path, recompute_z) for i in range(c.num_hidden_layers)]
    filled = b == 2 and (path == "torch" or path == "native" and precision == "fp8") and not recompute_z
    if filled:  # a share of each token, so that it counts like the rest
        spare = 2 * b * c.moe_intermediate_size * _fill(c, tokens) / tokens
        blocks = [size if c.is_dense(i) else size + spare for i, size in enumerate(blocks)]
    ahead = [  # the MTP module is one unit of recomputation; its projection reads two normed states
        (2 * _norm(d, b, path) + 2 * b * d + _saved(c, c.num_hidden_layers + k, seq_len, b, path, recompute_z)) * c.mtp_rows
        for k in range(depths)
    ]
    if filled and c.n_routed_experts:
        part = max(1, round(rows * c.mtp_rows)) * seq_len
        ahead = [size + 2 * b * c.moe_intermediate_size * _fill(c, part) / tokens for size in ahead]
    outside = (1 + depths * c.mtp_rows) * _norm(d, b, path)
    if activation_checkpointing:  # every block's input (MTP: state and embedding), and one block made again
        inside = b * d * (len(blocks) + 2 * depths) + max([*blocks, *ahead])
    else:
        inside = sum(blocks) + sum(ahead)
    chunk = min(CHUNK, tokens) * c.vocab_size * (4 if b == 4 else 6)
    head = chunk + b * d * ((1 + depths * c.mtp_rows) * tokens + (1 + depths) * c.vocab_size)
    k, f = (c.num_experts_per_tok, c.moe_intermediate_size) if c.n_routed_experts else (1, c.intermediate_size)
    rest = dict(
        weights=b * n,
        master=4 * n if b == 2 else 0,
        gradients=(4 + 2 if b == 2 else 4) * n,  # bf16: a pass's own gradients beside the fp32 sum
        moments=8 * n,
        activations=round(tokens * (outside + inside)),
        head=round(head),
        workspace=tokens * b * k * (8 * d + 12 * f if precision == "fp8" else 2 * d + 6 * f),  # fp8: and fp32 copies
    )
    return Memory(**rest, total=sum(rest.values()))


# ---------------------------------------------------------------------------------------------------------- the plan


def plan(
    config: ModelConfig,
    seq_len: int = 256,
    batch_tokens: int = 4096,
    micro_batch_size: int = 16,
    precision: str = "fp32",
    activation_checkpointing: bool = False,
    path: str = "torch",
    world_size: int = 1,
    recompute_z: bool = False,
) -> Plan:
    """Everything about one configuration. batch_tokens: of one optimizer step over all ranks; micro_batch_size: rows of
    one pass on one rank."""
    c = config
    rows = max(1, math.ceil(batch_tokens / seq_len / world_size))
    per_pass = min(micro_batch_size, rows)
    elements = (c.kv_lora_rank + c.qk_rope_head_dim) * c.num_hidden_layers
    full = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.num_hidden_layers
    balance = twin = None
    notes = [] if c.attention == "mla" else [f"model.attention={c.attention} is counted as mla"]
    if precision == "fp8":
        notes.append("fp8 is simulated over bf16: it saves neither memory nor time (docs/precision.md)")
    if c.n_routed_experts:
        share = c.num_experts_per_tok / c.n_routed_experts
        mean, in_pass = batch_tokens * share, per_pass * seq_len * share
        floor = maxvio_floor(batch_tokens, c.num_experts_per_tok, c.n_routed_experts)
        balance = Balance(mean, math.sqrt(mean * (1 - share)), in_pass, floor)
        if in_pass < 16:
            notes.append(f"{in_pass:.1f} tokens an expert in one pass: overhead outweighs arithmetic; take larger ones")
        dense = c.dense_twin()
        size = parameters(dense)
        twin = Twin(dense.intermediate_size, size.total, size.active, flops(dense, seq_len).training)
    return Plan(
        c.name, parameters(c), flops(c, seq_len), Cache(elements, full, 2 * elements, 2 * full),
        memory(c, seq_len, per_pass, precision, activation_checkpointing, path, recompute_z=recompute_z), balance, twin,
        batch_tokens, math.ceil(rows / per_pass), precision, notes,
    )  # fmt: skip


def si(number: float, unit: str = "") -> str:
    """Counts read 671.0 B, quantities with a unit 70.3 kB: steps of a thousand, one digit after the point."""
    letters = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"] if unit else ["", "K", "M", "B", "T"]
    step = min(int(math.log10(max(abs(number), 1)) // 3), len(letters) - 1)
    if step + 1 < len(letters) and round(abs(number) / 1000**step, 1) >= 1000:
        step += 1  # 999,999 is 1.0 M, not 1000.0 K
    return f"{number / 1000**step:.{1 if step else 0}f} {letters[step]}{unit}".rstrip()


def table(p: Plan) -> str:
    """The plan as aligned text: what, value, remark."""
    f, c, m = p.flops, p.cache, p.memory
    rows: list[tuple[str, str, str]] = [
        ("parameters", si(p.parameters.total), f"{p.parameters.total:,}"),
        ("  active", si(p.parameters.active), "one token meets them; the head counts, the embedding table does not"),
        ("  MTP apart", si(p.parameters.mtp), f"{si(p.parameters.mtp_active)} active; dropped at inference"),
        ("training FLOPs a token", si(f.training, "FLOP"), f"at S = {f.seq_len}; formula below"),
        *((f"  {part}", si(6 * count, "FLOP"), "") for part, count in f.matmul_weights.items() if count),
        ("  scores and values", si(3 * f.attention, "FLOP"), "MTP included"),
        ("  all without MTP", si(f.training_without_mtp, "FLOP"), ""),
        ("  one optimizer step", si(f.training * p.batch_tokens, "FLOP"), f"{p.batch_tokens:,} tokens"),
        ("cache a token, bf16", si(c.bytes, "B"), f"{c.elements:,} elements; one more layer when drafting with MTP"),
        ("  full keys and values", si(c.full_bytes, "B"), f"{c.full_elements / c.elements:.1f} times as much"),
        (f"training memory, {p.precision}", si(m.total, "B"), f"one rank, unsharded; passes a step: {p.passes}"),
    ]
    estimates = ("activations", "head", "workspace")
    rows += [
        (f"  {part}", si(size, "B"), "estimate" if part in estimates else "")
        for part, size in dataclasses.asdict(m).items()
        if part != "total" and size
    ]
    if b := p.balance:
        noise = f"+- {b.tokens_per_expert_std:.1f} by sampling; {b.tokens_per_expert_pass:,.1f} in one pass"
        rows.append(("tokens an expert, a step", f"{b.tokens_per_expert:,.1f}", noise))
        rows.append(("  MaxVio floor", f"{b.maxvio_floor:.3g}", "what sampling leaves of perfect balance"))
    if t := p.twin:
        rows.append(("dense twin", si(t.total), f"model.dense_twin=true: intermediate_size {t.intermediate_size:,}"))
        ratio = f"{t.training / f.training:.3f} times this model's"
        rows.append(("  training FLOPs a token", si(t.training, "FLOP"), ratio))
    rows += [("note", "", note) for note in p.notes]
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{what:{left}}  {value:>{middle}}  {remark}".rstrip() for what, value, remark in rows]
    return "\n".join([f"plan of {p.name}", *lines, "", FORMULA])
