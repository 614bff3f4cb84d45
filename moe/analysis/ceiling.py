"""What a machine could do at most: the FLOP/s that MFU is a fraction of.

Known GPUs answer from NVIDIA's data sheets; any other device is measured with square matrix products, a lower bound of
its peak. Figures of one kind compare, so print `Peak.source` beside every MFU.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

PEAKS = {  # dense FLOP/s of bf16 and of fp32 without TF32, from NVIDIA's data sheets; the longest name that fits counts
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "A100": (312e12, 19.5e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


class Peak(NamedTuple):
    flops: float
    """FLOP/s"""
    source: str
    """`data sheet` or `measured`: to be printed beside every MFU."""


def known_peak(name: str, dtype: torch.dtype) -> float | None:
    """Data-sheet FLOP/s of a GPU by the name its driver gives."""
    words = name.replace("-", " ").split()
    fits = [known for known in PEAKS if all(word in words for word in known.split())]
    if not fits or dtype not in (torch.bfloat16, torch.float32):
        return None
    return PEAKS[max(fits, key=len)][0 if dtype == torch.bfloat16 else 1]


def measure_ceiling(
    dtype: torch.dtype, threads: int | None = None, device: torch.device | str = "cpu", seconds: float = 0.3
) -> float:
    """FLOP/s of the best of several square matrix products, on `threads` CPU threads (None: as torch is set)."""
    device = torch.device(device)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        size = 1024 if device.type == "cpu" else 8192
        a = torch.randn(size, size, device=device).to(dtype)  # zeros would flatter: they draw less power
        out = torch.mm(a, a)
        best, stop = math.inf, time.perf_counter() + seconds
        while best == math.inf or time.perf_counter() < stop:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best


def peak_flops(device: torch.device | str, dtype: torch.dtype, threads: int | None = None) -> Peak:
    """What MFU is measured against: the data sheet for known GPUs, else the measured ceiling."""
    device = torch.device(device)
    if device.type == "cuda" and (dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"):
        known = known_peak(torch.cuda.get_device_name(device), dtype)
        if known:
            return Peak(known, "data sheet")
    return Peak(measure_ceiling(dtype, threads, device), "measured")
