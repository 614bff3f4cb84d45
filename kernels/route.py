"""Choice of K of E experts for each token, their gates and their counts, in one pass over the logits; and its gradient.

    s = sigmoid(logits), or softmax over experts          [N, E] affinities, never stored
    ids = top-k of s + bias, best first                   [N, K] int64; the lower id wins a tie; bias steers choice only
    gates = s at ids, over their sum if `norm`, * scaling [N, K] fp32
    hist = choices in each block of 8 tokens              [ceil(N / 8), E] int32; hist.sum(0) counts tokens per expert

With groups, ids come from the `topk_group` strongest of `n_group`; a group's strength is the sum of its two best biased
scores (sigmoid) or its best (softmax). A token whose mask is False has ids = E and gates = 0, and is not counted. A NaN
score counts as the greatest, as in torch.topk: its gate is NaN and tells.

Source: DeepSeek-V3 (arXiv 2412.19437) equations 12-16. No atomics: the histogram is a sum over the block's choices.
Experts stand in groups that are padded to powers of two, so any E and any group size fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch

ROWS = 8  # tokens of a block, one row of the histogram: at K = 16 as many choices as order.py ranks at a time
# The least score of an expert that may be chosen; other groups' experts and padding lie below, at OUT, and those chosen
# already at -inf. Two of either still add up to a number.
LOW, OUT = tl.constexpr(-1e38), tl.constexpr(-1.5e38)


@triton.jit
def _sigmoid(x):
    q = tl.exp(-tl.abs(x))  # at most 1: no overflow on either side
    return tl.where(x >= 0, 1.0, q) / (1.0 + q)


@triton.jit
def _softmax_parts(x):
    """[R, W] with -inf for padding -> the row's maximum and its sum of exponentials, [R] each."""
    top = tl.max(x, 1)
    return top, tl.sum(tl.exp(x - top[:, None]), 1)


@triton.jit
def _open_groups(score, n_group: tl.constexpr, topk_group: tl.constexpr, TWO: tl.constexpr):
    """[R, G, S] biased scores -> [R, G] bool: the strongest groups."""
    G: tl.constexpr = score.shape[1]
    S: tl.constexpr = score.shape[2]
    strength = tl.max(score, 2)
    if TWO:  # a tie counts twice, so one place is masked, not a value
        first = tl.argmax(score, 2)
        rest = tl.where(tl.arange(0, S)[None, None, :] == first[:, :, None], OUT, score)
        strength += tl.max(rest, 2)
    group = tl.arange(0, G)[None, :]
    strength = tl.where(group < n_group, tl.maximum(strength, LOW), OUT)
    for _ in range(topk_group):
        best = tl.argmax(strength, 1)
        strength = tl.where(group == best[:, None], float("-inf"), strength)
    return strength == float("-inf")


@triton.jit(do_not_specialize=["n"])
def _route(
    logits, bias, mask, ids, gates, hist, n, scaling,
    E: tl.constexpr, K: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, SIGMOID: tl.constexpr,
    NORM: tl.constexpr, R: tl.constexpr, G: tl.constexpr, S: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One block of R tokens. The tile is [R, G * S]: column g * S + j is expert g * (E // N_GROUP) + j."""
    SIZE: tl.constexpr = E // N_GROUP
    block = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, R)
    live = block * R + row < n
    column = tl.arange(0, G * S)
    expert = (column // S) * SIZE + column % S
    real = (column % S < SIZE) & (expert < E)
    x = tl.load(logits + block * R * E + row[:, None] * E + expert[None, :], live[:, None] & real[None, :], 0.0)
    if SIGMOID:
        score = _sigmoid(x)
    else:
        x = tl.where(real[None, :], x, float("-inf"))
        top, total = _softmax_parts(x)
        score = tl.exp(x - top[:, None]) / total[:, None]
    score += tl.load(bias + expert, real, 0.0)[None, :]
    score = tl.where(score == score, tl.maximum(score, LOW), float("inf"))
    score = tl.where(real[None, :], score, OUT)
    if TOPK_GROUP < N_GROUP:
        opened = _open_groups(tl.reshape(score, [R, G, S]), N_GROUP, TOPK_GROUP, SIGMOID and SIZE > 1)
        opened = tl.reshape(tl.broadcast_to(opened[:, :, None], [R, G, S]), [R, G * S])
        score = tl.where(opened, score, OUT)

    choice = tl.arange(0, KP)
    chosen = tl.zeros([R, KP], tl.int32)
    for k in range(K):
        best = tl.argmax(score, 1)
        chosen = tl.where(choice[None, :] == k, best[:, None], chosen)
        score = tl.where(column[None, :] == best[:, None], float("-inf"), score)
    chosen = (chosen // S) * SIZE + chosen % S

    used = live
    if mask is not None:
        used = tl.load(mask + block * R + row, live, 0) != 0
    counted = (score == float("-inf")) & used[:, None]
    tl.store(hist + block * E + expert, tl.sum(counted.to(tl.int32), 0), real)

    # The chosen affinities are read again: cheaper than keeping all of them through the choice.
    some = live[:, None] & (choice < K)[None, :]
    at = tl.load(logits + block * R * E + row[:, None] * E + chosen, some, 0.0)
    s = _sigmoid(at) if SIGMOID else tl.exp(at - top[:, None]) / total[:, None]
    s = tl.where(some, s, 0.0)
    if NORM:
        s = s / (tl.sum(s, 1) + 1e-20)[:, None]
    out = block * R * K + row[:, None] * K + choice[None, :]
    tl.store(gates + out, tl.where(used[:, None], s * scaling, 0.0), some)
    tl.store(ids + out, tl.where(used[:, None], chosen, E).to(tl.int64), some)


@triton.jit(do_not_specialize=["n"])
def _route_backward(
    dgates, logits, ids, dlogits, n, scaling,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """One block of R tokens, whole rows. With s the affinities at ids, t their sum, d the gradient of a gate:
    ds = scaling * (d - sum(d s) / t) / t, or scaling * d; then through the sigmoid or the softmax."""
    block = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, R)
    live = block * R + row < n
    expert = tl.arange(0, W)
    here = live[:, None] & (expert < E)[None, :]
    x = logits + block * R * E + row[:, None] * E
    if not SIGMOID:
        wide = tl.where((expert < E)[None, :], tl.load(x + expert[None, :], here, 0.0), float("-inf"))
        top, total = _softmax_parts(wide)

    choice = tl.arange(0, KP)
    slot = block * R * K + row[:, None] * K + choice[None, :]
    some = live[:, None] & (choice < K)[None, :]
    chosen = tl.load(ids + slot, some, -1)
    some = some & (chosen >= 0) & (chosen < E)
    chosen = tl.where(some, chosen, 0).to(tl.int32)
    d = tl.load(dgates + slot, some, 0.0)
    at = tl.load(x + chosen, some, 0.0)
    s = _sigmoid(at) if SIGMOID else tl.exp(at - top[:, None]) / total[:, None]
    s = tl.where(some, s, 0.0)
    if NORM:
        t = (tl.sum(s, 1) + 1e-20)[:, None]
        d = (d - tl.sum(d * s, 1)[:, None] / t) / t
    d *= scaling
    if SIGMOID:
        q = tl.exp(-tl.abs(at))
        d *= q / ((1.0 + q) * (1.0 + q))  # s (1 - s) without the cancellation
    else:
        shared = tl.sum(d * s, 1)  # where `some` is false, s is zero
    d = tl.where(some, d, 0.0)

    dense = tl.zeros([R, W], tl.float32)
    for k in range(K):
        mine = some & (choice == k)[None, :]
        at_k = tl.max(tl.where(mine, chosen, -1), 1)
        d_k = tl.sum(tl.where(mine, d, 0.0), 1)
        dense += tl.where(expert[None, :] == at_k[:, None], d_k[:, None], 0.0)
    if not SIGMOID:
        routed = tl.max(some.to(tl.int32), 1) > 0  # a token that was masked may hold anything
        dense = tl.where(routed[:, None], tl.exp(wide - top[:, None]) / total[:, None] * (dense - shared[:, None]), 0.0)
    tl.store(dlogits + block * R * E + row[:, None] * E + expert[None, :], dense, here)


def route(
    logits: Tensor,
    bias: Tensor,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scoring: str = "sigmoid",
    norm: bool = True,
    scaling: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, E], bias [E] fp32, mask [N] bool -> ids [N, K] int64, gates [N, K] fp32, hist [blocks, E] int32."""
    _check(logits, scoring)
    n, e = logits.shape
    if bias.shape != (e,) or bias.dtype != torch.float32:
        raise ValueError(f"route: bias {tuple(bias.shape)} {bias.dtype} must be [{e}] float32")
    if mask is not None and (mask.shape != (n,) or mask.dtype != torch.bool):
        raise ValueError(f"route: mask {tuple(mask.shape)} {mask.dtype} must be [{n}] bool")
    if e % n_group or not 1 <= topk_group <= n_group or not 1 <= k <= topk_group * (e // n_group):
        raise ValueError(
            f"route: k={k} of {e} experts in topk_group={topk_group} of n_group={n_group} cannot be chosen"
        )
    if topk_group == n_group:
        n_group = topk_group = 1
    ids = torch.empty(n, k, dtype=torch.int64, device=logits.device)
    gates = torch.empty(n, k, dtype=torch.float32, device=logits.device)
    hist = torch.empty(triton.cdiv(n, ROWS), e, dtype=torch.int32, device=logits.device)
    g, s = triton.next_power_of_2(n_group), triton.next_power_of_2(e // n_group)
    launch(
        _route, (hist.shape[0],), logits.contiguous(), bias.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8), ids, gates, hist, n, scaling,
        E=e, K=k, N_GROUP=n_group, TOPK_GROUP=topk_group, SIGMOID=scoring == "sigmoid", NORM=norm,
        R=ROWS, G=g, S=s, KP=triton.next_power_of_2(k), num_warps=_warps(g * s),
    )  # fmt: skip
    return ids, gates, hist


def route_backward(dgates: Tensor, logits: Tensor, ids: Tensor, scoring: str, norm: bool, scaling: float) -> Tensor:
    """Gradient of `route`'s gates with the choice held fixed -> dlogits [N, E] fp32, dense."""
    _check(logits, scoring)
    n, e = logits.shape
    if ids.ndim != 2 or ids.shape[0] != n or dgates.shape != ids.shape:
        raise ValueError(f"route_backward: dgates {tuple(dgates.shape)}, ids {tuple(ids.shape)} must both be [{n}, K]")
    k = ids.shape[1]
    dlogits = torch.empty(n, e, dtype=torch.float32, device=logits.device)
    w = triton.next_power_of_2(e)
    launch(
        _route_backward, (triton.cdiv(n, ROWS),), dgates.float().contiguous(), logits.contiguous(), ids.contiguous(),
        dlogits, n, scaling, E=e, K=k, SIGMOID=scoring == "sigmoid", NORM=norm, R=ROWS, W=w,
        KP=triton.next_power_of_2(k), num_warps=_warps(w),
    )  # fmt: skip
    return dlogits


def _check(logits: Tensor, scoring: str) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"route: logits {tuple(logits.shape)} {logits.dtype} must be [N, E] float32")
    if scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"route: scoring={scoring!r} is not one of ['sigmoid', 'softmax']")


def _warps(width: int) -> int:
    """Sixteen columns a thread; at 1024 twice that, since 16 warps may not have the registers of 8."""
    return min(max(width // 64, 1), 8 if width <= 1024 else 16)
