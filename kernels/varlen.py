"""Causal attention over packed documents by kernels of variable length: all places in one line, borders in a list.

    starts [B, T] (packed.py)  ->  borders [N + 1] int32: where each of N documents starts in the line of B * T places

How many documents a batch holds depends on its data. Under a compiler and in a CUDA graph the list has a fixed size,
B * T + 1, ends repeated: always right, but kernels start blocks of threads for documents that are not there. Elsewhere
`trimmed` asks the device, once a batch.

The kernels want one width: queries and keys are padded with zeros, which changes no score, values likewise, and the
padding of the result is cut off. Source: FlashAttention-2, arXiv 2307.08691. Not here: cuDNN's ragged form, whose
backward pass in PyTorch read the head width for the longest document (pytorch pull request 186142).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.packed import ALIGNED, fitted, multiple

WIDEST = 256


def borders(starts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] -> (borders [B * T + 1] int32, of which those past the last document are B * T; [documents, longest])."""
    batch, time = starts.shape
    places = batch * time
    at = torch.arange(time, dtype=torch.int32, device=starts.device)
    line = torch.arange(places, dtype=torch.int32, device=starts.device)
    begins = (starts == at).flatten()
    end = line.new_full((1,), places)
    found = torch.cat((torch.where(begins, line, places).sort().values, end))
    longest = (at - starts).max() + 1
    return found, torch.stack((begins.sum(), longest))


def trimmed(borders: Tensor, sizes: Tensor) -> tuple[Tensor, int]:
    """-> (borders without repeated ends, the longest document); the host waits for the device."""
    documents, longest = sizes.tolist()
    return borders[: documents + 1], longest


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, borders: Tensor, longest: int, library: str = "torch"
) -> Tensor:
    """[B, T, H, dqk] x 2, [B, T, H, dv] -> [B, T, H, dv], bf16 or fp16.

    longest: of the documents, or any larger number. library: torch (compiled into PyTorch) or flash_attn.
    """
    batch, time, heads, _ = q.shape
    value, width = v.shape[3], multiple(max(q.shape[3], v.shape[3]), ALIGNED)
    q, k, v = (fitted(x, time, width).flatten(0, 1) for x in (q, k, v))
    o = {"torch": _torch, "flash_attn": _flash_attn}[library](q, k, v, scale, borders, longest)
    return o.view(batch, time, heads, width)[..., :value]


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float, borders: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    causal = (-1, 0)
    o = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=causal)
    assert isinstance(o, Tensor)  # a pair when more is asked for
    return o


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float, borders: Tensor, longest: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, borders, borders, longest, longest, softmax_scale=scale, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
