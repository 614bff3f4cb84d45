"""What every op of `moe.ops` means: loops over tokens and experts, in the inputs' dtype, differentiable, never fast.

This is the oracle of the tests (call it in float64) and the path `MOE_OPS=reference`, the first move in a bug hunt.
It uses no sorting, no grouping and no fused call, so that it shares no mistake with the paths it judges.

    N tokens, D model, E experts, K choices, F expert width, V vocabulary; T time, H heads
"""

from __future__ import annotations

import torch
from torch import Tensor


def experts(x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    """[N, D], [E, 2F, D], [E, D, F], [N, K], [N, K] -> [N, D]: sum over k of gate * down(silu(gate_row x) * up_row x).

    An id outside [0, E) is no expert: it adds nothing and its gate gets zero gradient.
    """
    n_experts, width = w13.shape[0], w13.shape[1] // 2
    rows = []
    for n in range(x.shape[0]):
        y = torch.zeros_like(x[n])
        for k in range(experts.shape[1]):
            e = int(experts[n, k])
            if 0 <= e < n_experts:
                h = w13[e] @ x[n]
                a = h[:width] * torch.sigmoid(h[:width]) * h[width:]
                y = y + gates[n, k].to(x.dtype) * (w2[e] @ a)
        rows.append(y)
    used = (w13.sum() + w2.sum() + gates.sum() + x.sum()) * 0  # every input takes part, so gradients are zero, not None
    return torch.stack(rows) + used if rows else x + used


def grouped_swiglu(rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor) -> Tensor:
    """[M, D] rows in expert order, ends [E], [M] gates -> [M, D]; rows past ends[-1] are nobody's and give zeros."""
    bounds = [0, *ends.tolist()]
    owner = [e for e in range(len(ends)) for _ in range(bounds[e], bounds[e + 1])]
    ids = torch.tensor(owner + [-1] * (len(rows) - len(owner)), dtype=torch.int64).view(-1, 1)
    live = (ids >= 0).to(rows.device)
    return experts(torch.where(live, rows, 0), w13, w2, ids, torch.where(live, row_gates.unsqueeze(1), 0))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None = None) -> Tensor:
    """Causal attention, [B, T, H, dqk] x 2, [B, T, H, dv] -> [B, T, H, dv]; positions see their own segment only."""
    batch, time, heads, _ = q.shape
    rows = []
    for b in range(batch):
        for t in range(time):
            seen = [j for j in range(t + 1) if segment_ids is None or segment_ids[b, j] == segment_ids[b, t]]
            for h in range(heads):
                p = torch.softmax(torch.stack([q[b, t, h] @ k[b, j, h] for j in seen]) * scale, 0)
                rows.append(torch.stack([p[i] * v[b, j, h] for i, j in enumerate(seen)]).sum(0))
    return torch.stack(rows).view(batch, time, heads, v.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D] -> [..., D]: x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N, D], [V, D], [N] -> scalar: sum of -log softmax(weight @ hidden)[target]; a negative target is no target."""
    total = (hidden.sum() + weight.sum()) * 0
    for n in range(hidden.shape[0]):
        if targets[n] >= 0:
            logits = weight @ hidden[n]
            total = total + torch.logsumexp(logits, 0) - logits[targets[n]]
    return total


def route(scores: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, group_top: int = 2) -> list[list[int]]:
    """[N, E] affinities and [E] bias -> per token the K chosen ids, best biased score first, lowest id first on a tie.

    Group score: sum of the `group_top` best biased scores of the group (V3: 2; V2: 1). Excluded groups score -inf.
    """
    chosen = []
    for s in (scores + bias).tolist():
        size = len(s) // n_group
        strength = [sum(sorted(s[g * size : (g + 1) * size], reverse=True)[:group_top]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: (-strength[g], g))[:topk_group]
        open_ids = [e for e in range(len(s)) if e // size in kept]
        chosen.append(sorted(open_ids, key=lambda e: (-s[e], e))[:k])
    return chosen
