"""Which implementation answers an op: the choice of the user, and what this machine can do.

    reference   loops, the oracle                     torch    PyTorch, right on any device
    triton      kernels/*.py on a GPU                 native   kernels/native/*.cpp on a CPU, fp32 and bf16
    auto        triton on a GPU and native on a CPU where they work, else torch

MOE_OPS wins over `select()`, which recipes call with `train.ops`. Before kernels answer for the first time on a device and
dtype they must agree with the oracle (kernels/selftest.py, kernels/native/selftest.py). Where they do not, `auto` goes to
torch with one warning, and a path that was demanded is an error. `auto` without a compiled library goes to torch too; a
run's header says so (`answer`). What a path has no kernel for is answered by torch.
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

PATHS = ("auto", "reference", "torch", "triton", "native")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NATIVE_DTYPES = (torch.bfloat16, torch.float32)
_selected = "auto"
_verdicts: dict[tuple[str, int | None, torch.dtype], str] = {}  # "" where the Triton kernels agree with the oracle
_native_verdicts: dict[tuple[str, torch.dtype], str] = {}


def select(path: str) -> None:
    """Choose the path for this process. MOE_OPS, when set, wins."""
    global _selected
    if path not in PATHS:
        raise UserError(f"train.ops={path!r} is not one of {list(PATHS)}{nearest(path, PATHS)}")
    _selected = path
    if (demanded := selected()) in ("triton", "native"):  # told now, not in the first layer
        if why := _unable() if demanded == "triton" else _no_library():
            knob = "MOE_OPS" if os.environ.get("MOE_OPS") else "train.ops"
            raise UserError(f"{knob}={demanded}: {why}; use auto or torch")


def selected() -> str:
    """What was asked for: MOE_OPS, else `select`'s choice, else auto."""
    path = os.environ.get("MOE_OPS") or _selected
    if path not in PATHS:
        raise UserError(f"MOE_OPS={path!r} is not one of {list(PATHS)}{nearest(path, PATHS)}")
    return path


def path_for(x: Tensor) -> str:
    """reference, torch, triton or native: what answers for tensors of the device and dtype of `x`."""
    path = selected()
    if path == "auto":
        if x.is_cuda and x.dtype in KERNEL_DTYPES:
            return "torch" if _verdict(x.device.type, x.device.index, x.dtype) else "triton"
        if x.device.type == "cpu" and x.dtype in NATIVE_DTYPES:
            return "torch" if _native_verdict(x.device.type, x.dtype) else "native"
        return "torch"
    if path == "triton" and (why := _verdict(x.device.type, x.device.index, x.dtype)):
        raise UserError(f"ops=triton was demanded: {why}; use auto or torch")
    if path == "native" and (why := _native_verdict(x.device.type, x.dtype)):
        raise UserError(f"ops=native was demanded: {why}; use auto or torch")
    return path


def answer(device: torch.device, dtype: torch.dtype) -> str:
    """`path_for` such tensors, in words for the header of a run: which level of the native kernels, or why none."""
    path = path_for(torch.empty(0, device=device, dtype=dtype))
    if path == "native":
        from moe.kernels.native import library

        return f"native, {library.level()}"
    if path == "torch" and selected() == "auto" and device.type == "cpu" and dtype in NATIVE_DTYPES:
        return f"torch, the slower path: {_native_verdict(device.type, dtype)}"
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


def _no_library() -> str:
    """Why the native kernels are not there, or nothing."""
    from moe.kernels.native import library

    try:
        return library.status()
    except ValueError as error:
        raise UserError(f"{error}; unset it, or name one of these") from None


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


def _native_verdict(kind: str, dtype: torch.dtype) -> str:
    """Why the native kernels cannot answer here, or nothing; looked into once. A library that fails us is told once."""
    key = kind, dtype
    if key not in _native_verdicts:
        from moe.kernels.native import library

        if kind != "cpu":
            why = f"the native kernels run on CPUs, not on {kind}"
        elif dtype not in NATIVE_DTYPES:
            why = f"there are no native kernels for {dtype}"
        elif not (why := _no_library()):
            from moe.kernels.native import selftest

            with undisturbed():
                wrong = selftest.disagreement(dtype)
            why = f"the native kernels disagree with their reference for {dtype}: {wrong}" if wrong else ""
        if why and selected() == "auto" and library.exists():
            warnings.warn(f"the slower PyTorch path answers: {why}", RuntimeWarning, stacklevel=2)
        _native_verdicts[key] = why
    return _native_verdicts[key]


# Compilers call them and take the answer for a constant; torch.compiler's decorator for this would load them at import.
_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]
_native_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]
