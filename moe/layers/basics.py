"""Small parts every block uses: RMSNorm, dense SwiGLU, rotary positions with YaRN.

Rotary layout is interleaved, as DeepSeek's weights imply: channels (0, 1), (2, 3), ... share one frequency.
Sources: DeepSeek-V3 (arXiv 2412.19437) section 2.1.1 and 4.3; YaRN, arXiv 2309.00071.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from moe import ops
from moe.config import check_rope_scaling


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on the device of `x`; None where it is off. It reaches no custom op."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


class RMSNorm(nn.Module):
    """[..., D] -> [..., D]: x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """[..., D] -> [..., D]: w2(silu(w13_gate x) * w13_up x). w13 holds the gate rows, then the up rows."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(hidden_size, 2 * width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(ops.swiglu(self.w13(x)))


class Rotary:
    """Rotary tables for R channels: `rotary(positions)` gives cos and sin, `softmax_factor` scales the logits.

    Not a module: tables are made from positions on the fly in fp32, so no cast of the model can round them.
    `scaling` is DeepSeek's rope_scaling dictionary; None or type "default" is plain RoPE. With YaRN and
    `mscale_all_dim`, attention logits are multiplied by m^2, m = 0.1 mscale_all_dim ln(factor) + 1 (section 4.3).
    """

    def __init__(self, width: int, theta: float = 10000.0, scaling: dict | None = None) -> None:
        check_rope_scaling(scaling)
        frequency = [theta ** (-pair / width) for pair in range(0, width, 2)]
        self.magnitude = self.softmax_factor = 1.0
        if scaling is not None and scaling.get("type", scaling.get("rope_type")) == "yarn":
            frequency = _yarn_frequencies(frequency, width, theta, scaling)
            factor = float(scaling["factor"])
            all_dim = float(scaling.get("mscale_all_dim") or 0)
            self.magnitude = _mscale(factor, float(scaling.get("mscale") or 1)) / _mscale(factor, all_dim)
            self.softmax_factor = _mscale(factor, all_dim) ** 2
        self.frequency = tuple(frequency)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] or [T] positions -> cos, sin [..., T, R/2] fp32."""
        frequency = torch.tensor(self.frequency, dtype=torch.float32, device=positions.device)
        angle = positions.unsqueeze(-1).float() * frequency
        return angle.cos() * self.magnitude, angle.sin() * self.magnitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, H, R] with cos, sin [B or 1, T, R/2] -> [B, T, H, R]; interleaved pairs, computed in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def _yarn_frequencies(frequency: list[float], width: int, theta: float, scaling: dict) -> list[float]:
    """Fast channels keep their frequency, slow ones are divided by the factor, a linear ramp joins them."""
    original, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
    fast, slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def channel(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(fast)), 0)
    high = min(math.ceil(channel(slow)), width - 1)
    ramp = [min(max((i - low) / max(high - low, 0.001), 0.0), 1.0) for i in range(width // 2)]
    return [f * (1 - r) + f / factor * r for f, r in zip(frequency, ramp)]
