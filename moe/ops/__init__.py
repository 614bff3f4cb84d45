"""The one door to `moe.kernels`: what the layers call, and the choice of the path that answers (paths.py).

    experts(x, w13, w2, experts, gates)            [N, D] -> [N, D]   routed experts
    grouped_swiglu(rows, w13, w2, ends, gates)     [M, D] -> [M, D]   the same for rows that are sorted already
    attention(q, k, v, scale, segment_ids)         [B, T, H, .]       causal attention, unequal key and value widths
    rms_norm(x, weight, eps)                       [..., D]           without normalised copies
    linear_cross_entropy(hidden, weight, targets)  -> scalar sum      output head and loss, [N, V] never whole
    for_few_rows(weight)                           [out, in]          a weight as decoding reads it fastest

Each but the last is a custom op with a written-out backward, so torch.compile and engines see a single node.
"""

try:
    from moe.kernels import reference as _reference  # noqa: F401
except ImportError as error:  # a checkout without symbolic links holds a text file there
    raise ImportError(
        "moe/kernels is not a link to ../kernels; run `git config core.symlinks true` and check it out again"
    ) from error

from moe.ops.attend import attention
from moe.ops.grouped import experts, grouped_swiglu
from moe.ops.head import linear_cross_entropy
from moe.ops.norm import for_few_rows, rms_norm
from moe.ops.paths import PATHS, path_for, select, selected

__all__ = [
    "PATHS", "attention", "experts", "for_few_rows", "grouped_swiglu", "linear_cross_entropy", "path_for", "rms_norm",
    "select", "selected",
]  # fmt: skip
