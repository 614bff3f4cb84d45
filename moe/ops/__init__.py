"""The one door to `moe.kernels`: what the layers call, and the choice of the path that answers (paths.py).

    experts(x, w13, w2, experts, gates)            [N, D] -> [N, D]   routed experts
    grouped_swiglu(rows, w13, w2, ends, gates)     [M, D] -> [M, D]   the same for rows that are sorted already
    attention(q, k, v, scale, segment_ids)         [B, T, H, .]       causal attention, unequal key and value widths
    latent_attention(q, kv, k_rope, cos, sin, ...) [B, T, H, .]       the same in MLA's expanded form, native only
    documents(segment_ids, x, widths)              [B, T]             the same ids, prepared once for all layers
    router_logits(x, weight)                       [N, D] -> [N, E]   fp32, whatever the dtype of x
    route(logits, bias, k, ...)                    [N, E]             choice of experts by kernels: ids, gates, counts
    route_scored(...), sequence_loss(s, k, mask)   [N, E]             the same with affinities, and their loss; native only
    rms_norm(x, weight, eps)                       [..., D]           without normalised copies
    swiglu(z)                                      [..., 2F]          silu(gate) * up of a dense feed-forward
    linear_cross_entropy(hidden, weight, targets)  -> scalar sum      output head and loss, [N, V] never whole
    fp8_linear(x, weight), fp8_experts(...)        products over E4M3 operands, for train.precision=fp8
    adamw(p, g, m, v, copy, ...), square_sum(x)    the optimizer's pass and the norm it needs, native only
    for_few_rows(weight)                           [out, in]          a weight as decoding reads it fastest

Each but `documents` and the last is a custom op with a written-out backward, so torch.compile and engines see a single
node; attention is one on CPUs (docs/attention.md).
"""

try:
    from moe.kernels import reference as _reference  # noqa: F401
except ImportError as error:  # a checkout without symbolic links holds a text file there
    raise ImportError(
        "moe/kernels is not a link to ../kernels; run `git config core.symlinks true` and check it out again"
    ) from error

from moe.ops.attend import Documents, attention, documents
from moe.ops.backends import select_attention
from moe.ops.fp8 import fp8_experts, fp8_linear
from moe.ops.grouped import experts, grouped_swiglu
from moe.ops.head import linear_cross_entropy
from moe.ops.latent import latent_attention
from moe.ops.norm import for_few_rows, rms_norm
from moe.ops.optimizer import adamw, square_sum
from moe.ops.paths import PATHS, answer, path_for, select, selected
from moe.ops.routing import route, route_scored, router_logits, sequence_loss
from moe.ops.swiglu import swiglu

__all__ = [
    "PATHS", "Documents", "adamw", "answer", "attention", "documents", "experts", "for_few_rows", "fp8_experts", "fp8_linear", "grouped_swiglu",
    "latent_attention", "linear_cross_entropy", "path_for", "rms_norm", "route", "route_scored", "router_logits",
    "select", "select_attention", "selected", "sequence_loss", "square_sum", "swiglu",
]  # fmt: skip
