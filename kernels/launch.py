"""The one place that starts a Triton kernel: on a GPU, in Triton's interpreter, or into a list for the compile check.

    launch(kernel, grid, *args, num_warps=4, num_stages=3, BLOCK=64)     args in the kernel's order, constexprs by name
    with recording(arch=90) as launches: ...                             what production would start, on meta tensors

Wrappers ask here for the architecture and the number of multiprocessors, so a recording sees the choices of the device
it stands for. INTERPRET is Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported): it holds bf16 as raw
16-bit integers, so kernels convert to fp32 before they compute, behind that flag as a constexpr.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

INTERPRET = bool(triton.knobs.runtime.interpret)

SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170, 121: 48}
"""Multiprocessors of the usual card of each architecture: for recordings, and for the interpreter."""


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


class Device(NamedTuple):
    arch: int
    """Compute capability as one number: 90 for 9.0."""
    sms: int


_recorded: list[Launch] | None = None
_pretended: Device | None = None


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Launches are collected instead of started, as for a card of architecture `arch`."""
    global _recorded, _pretended
    before = _recorded, _pretended
    _recorded, _pretended = [], Device(arch, SMS[arch])
    try:
        yield _recorded
    finally:
        _recorded, _pretended = before


def device_of(tensor: torch.Tensor) -> Device:
    """What the wrapper of a kernel may choose by. The interpreter plays an H100."""
    if _pretended is not None:
        return _pretended
    if tensor.device.type != "cuda":
        return Device(90, SMS[90])
    p = torch.cuda.get_device_properties(tensor.device)
    return Device(10 * p.major + p.minor, p.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on `grid`; without programs there is nothing to start."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cpu" and not INTERPRET:
        raise RuntimeError("Triton kernels run on a GPU; on a CPU only under TRITON_INTERPRET=1, for tests")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)
