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


def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float, segment_ids: Tensor | None = None
) -> Tensor:
    """MLA's expanded form: q [B, T, H, nope + R], kv [B, T, H, nope + dv], one k_rope [B, T, R] for all heads; cos, sin
    [B or 1, T, R / 2] turn the rotary channels of q and k_rope, pair by pair -> [B, T, H, dv]."""
    batch, time, heads, _ = q.shape
    rope = k_rope.shape[2]
    nope = q.shape[3] - rope

    def turned(x: Tensor, b: int, t: int) -> list[Tensor]:
        c, s = (table[b if table.shape[0] > 1 else 0, t] for table in (cos, sin))
        pairs = [(x[2 * i], x[2 * i + 1], c[i], s[i]) for i in range(rope // 2)]
        return [y for even, odd, c, s in pairs for y in (even * c - odd * s, even * s + odd * c)]

    at = [(b, t, h) for b in range(batch) for t in range(time) for h in range(heads)]
    queries = [torch.stack([*q[b, t, h, :nope], *turned(q[b, t, h, nope:], b, t)]) for b, t, h in at]
    keys = [torch.stack([*kv[b, t, h, :nope], *turned(k_rope[b, t], b, t)]) for b, t, h in at]
    shape = batch, time, heads, nope + rope
    return attention(torch.stack(queries).view(shape), torch.stack(keys).view(shape), kv[..., nope:], scale, segment_ids)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D] -> [..., D]: x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


def swiglu(z: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: gate * sigmoid(gate) * up."""
    width = z.shape[-1] // 2
    return z[..., :width] * torch.sigmoid(z[..., :width]) * z[..., width:]


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


def sequence_loss(s: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """[B, T, E] affinities -> mean over sequences of sum over experts of f P. DeepSeek-V3, equations 17-20.

    f: E / (K T) times the tokens that have the expert among their k best; no gradient. P: mean of s over a token's sum.
    """
    losses = []
    for b in range(s.shape[0]):
        live = [t for t in range(s.shape[1]) if mask is None or mask[b, t]]
        hits = [0] * s.shape[2]
        for chosen in route(s[b, live].detach(), torch.zeros(s.shape[2]), k, 1, 1):
            for e in chosen:
                hits[e] += 1
        f = torch.tensor(hits, dtype=s.dtype) * s.shape[2] / (k * max(1, len(live)))
        losses += [sum((f @ s[b, t] / s[b, t].sum() for t in live), s.sum() * 0) / max(1, len(live))]
    return torch.stack(losses).mean()


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on parameter p with gradient g and moments m, v -> the new p, m, v. Loshchilov and Hutter, 1711.05101."""
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    update = m / (1 - beta1**step) / (torch.sqrt(v / (1 - beta2**step)) + eps)
    return p * (1 - lr * decay) - lr * update, m, v
