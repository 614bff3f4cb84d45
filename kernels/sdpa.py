"""Causal attention over whole rows by PyTorch's scaled_dot_product_attention, from its fused kernels alone.

    cuDNN              sm_90 and later, bf16 and fp16, where it takes the widths (MLA's 192 and 128 among them)
    flash              bf16 and fp16 elsewhere, and CPUs; it wants one width: values are padded
    memory-efficient   fp32, and wide heads

The math kernel, which forms whole scores, is never allowed. Documents packed in a row would need a mask of T x T:
varlen.py and flex.py take those.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.packed import ALIGNED, fitted, multiple

HALF = (torch.bfloat16, torch.float16)
BLOCK = 128  # cuDNN before 9.15.1 is wrong for other lengths (pytorch issue 169849); places added see and are not seen
_cudnn: dict[tuple[int | None, torch.dtype, int, int], bool] = {}


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, T, H, dqk] x 2, [B, T, H, dv] -> [B, T, H, dv]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    time, width = q.shape[1], v.shape[3]
    dqk, dv = multiple(q.shape[3], ALIGNED), multiple(width, ALIGNED)
    whole = multiple(time, BLOCK) if q.is_cuda else time
    kernels = _kernels(q.is_cuda, q.dtype, q.is_cuda and takes_cudnn(q.device.index, q.dtype, dqk, dv))
    if kernels[0] == "FLASH_ATTENTION":
        dqk = dv = max(dqk, dv)
    q, k, v = (fitted(x, whole, d).transpose(1, 2) for x, d in ((q, dqk), (k, dqk), (v, dv)))
    with sdpa_kernel([getattr(SDPBackend, name) for name in kernels], set_priority=True):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o.transpose(1, 2)[:, :time, :, :width]


def _kernels(cuda: bool, dtype: torch.dtype, cudnn: bool) -> tuple[str, ...]:
    """Best first; what a kernel cannot take goes to the next."""
    if not cuda:
        return ("FLASH_ATTENTION",)
    if dtype not in HALF:
        return ("EFFICIENT_ATTENTION",)
    return ("CUDNN_ATTENTION",) * cudnn + ("FLASH_ATTENTION", "EFFICIENT_ATTENTION")


def takes_cudnn(index: int | None, dtype: torch.dtype, dqk: int, dv: int) -> bool:
    """Whether PyTorch would hand heads of these widths to cuDNN for training; asked once."""
    key = index, dtype, dqk, dv
    if key not in _cudnn:
        from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

        _cudnn[key] = dtype in HALF and torch.cuda.get_device_capability(index)[0] >= 9
        if _cudnn[key]:
            with torch.inference_mode(False):
                q, v = (torch.empty(1, 1, BLOCK, d, dtype=dtype, device=f"cuda:{index or 0}") for d in (dqk, dv))
                _cudnn[key] = can_use_cudnn_attention(SDPAParams(q.requires_grad_(), q, v, None, 0.0, True, False))
    return _cudnn[key]


# Compilers call it and take the answer for a constant; torch.compiler's decorator for this would load them at import.
takes_cudnn._dynamo_marked_constant = True  # type: ignore[attr-defined]
