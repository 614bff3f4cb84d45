"""Which implementation answers an op: the choice of the user, and what this machine can do.

    reference   loops, the oracle                     torch    PyTorch, right on any device
    triton      kernels/*.py on a GPU                 auto     triton on a GPU where it works, else torch

MOE_OPS wins over `select()`, which recipes call with `train.ops`. Before the Triton path answers for the first time on
a device and dtype it must agree with the oracle (kernels/selftest.py). Where it does not, `auto` goes to torch with one
warning, and `triton` is an error. What no Triton kernel is written for (attention, norms, the head) is answered by torch.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe.config import UserError, nearest

PATHS = ("auto", "reference", "torch", "triton")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_selected = "auto"
_verdicts: dict[tuple[str, int | None, torch.dtype], str] = {}  # "" where the kernels agree with the oracle


def select(path: str) -> None:
    """Choose the path for this process. MOE_OPS, when set, wins."""
    global _selected
    if path not in PATHS:
        raise UserError(f"train.ops={path!r} is not one of {list(PATHS)}{nearest(path, PATHS)}")
    _selected = path
    if selected() == "triton" and (why := _unable()):  # told now, not in the first layer
        raise UserError(f"{'MOE_OPS' if os.environ.get('MOE_OPS') else 'train.ops'}=triton: {why}; use auto or torch")


def selected() -> str:
    """What was asked for: MOE_OPS, else `select`'s choice, else auto."""
    path = os.environ.get("MOE_OPS") or _selected
    if path not in PATHS:
        raise UserError(f"MOE_OPS={path!r} is not one of {list(PATHS)}{nearest(path, PATHS)}")
    return path


def path_for(x: Tensor) -> str:
    """reference, torch or triton: what answers for tensors of the device and dtype of `x`."""
    path = selected()
    if path == "auto":
        if not x.is_cuda or x.dtype not in KERNEL_DTYPES:
            return "torch"
        return "torch" if _verdict(x.device.type, x.device.index, x.dtype) else "triton"
    if path == "triton" and (why := _verdict(x.device.type, x.device.index, x.dtype)):
        raise UserError(f"ops=triton was demanded: {why}; use auto or torch")
    return path


def wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Plain tensors, on the CPU and in fp32 unless told otherwise, whatever the caller is in: inference mode, another
    default device or dtype, a tracer's fake tensors. For checks whose answer is kept."""
    from torch.utils._python_dispatch import _disable_current_modes

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), _disable_current_modes(), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _unable() -> str:
    """Why no Triton kernel can run in this process, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it exists for Linux)"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "the kernels need a GPU, and none was found"
    return ""


def _verdict(kind: str, index: int | None, dtype: torch.dtype) -> str:
    """Why the Triton path cannot answer here, or nothing; looked into once, and told once."""
    key = kind, index, dtype
    if key not in _verdicts:
        why = _unable()
        if not why and dtype not in KERNEL_DTYPES:
            why = f"there are no kernels for {dtype}"
        if not why:
            from moe.kernels import selftest

            with undisturbed():
                wrong = selftest.disagreement(torch.device(kind, index), dtype)
            why = f"the kernels disagree with their reference for {dtype} on {kind}: {wrong}" if wrong else ""
        if why and selected() == "auto":
            warnings.warn(f"experts run on the slower PyTorch path: {why}", RuntimeWarning, stacklevel=2)
        _verdicts[key] = why
    return _verdicts[key]


# Compilers call it and take the answer for a constant; torch.compiler's decorator for this would load them at import.
_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]
