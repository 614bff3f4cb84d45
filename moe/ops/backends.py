"""Which kernels answer attention on a GPU: the choice of the user (`train.attention`), and what this device can do.

    auto    documents: flash-attn where it is installed, else FlexAttention. Whole rows: PyTorch's SDPA
    sdpa    PyTorch's kernels: cuDNN from sm_90 on, flash; for documents those of variable length
    flex    FlexAttention with a document block mask
    flash   flash-attn's variable-length form
    blocks  PyTorch, right on any device and for any dtype (kernels/attention.py): CPUs, and the last resort here

Each must first agree with the last one in float64 on a small case of the model's widths, forward and backward. Where it
does not, or has no room for the widths, `auto` goes on to the next with one warning; a named choice is an error.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor

from moe.config import UserError, nearest
from moe.kernels import attention as blocks
from moe.kernels import sdpa, varlen
from moe.ops import fused
from moe.ops.paths import KERNEL_DTYPES, selected, undisturbed

BACKENDS = ("auto", "sdpa", "flex", "flash")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of the trial: largest error against the largest value; TF32, where it is allowed, has as many digits as fp16."""
_selected, _compiled = "auto", False
_answers: dict[tuple, tuple[str, str]] = {}  # what answers, and what was wrong with better ones


def select_attention(
    name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, int], compiled: bool = False
) -> str:
    """Choose for this process -> one line for the log: what answers, and why. widths: of keys and of values.

    compiled: the model goes through torch.compile, under which kernels of variable length do too much (varlen.py).
    """
    global _selected, _compiled
    if name not in BACKENDS:
        raise UserError(f"train.attention={name!r} is not one of {list(BACKENDS)}{nearest(name, BACKENDS)}")
    _selected, _compiled = name, compiled
    _answers.clear()
    if device.type != "cuda":
        if name != "auto":
            raise UserError(f"train.attention={name} is for GPUs, and this run is on {device.type}; use auto")
        return "blocks of queries in PyTorch, which is what there is without a GPU"
    if selected() == "reference":
        return "loops, as train.ops or MOE_OPS asks"
    documents, rows = (_told(device, dtype, *widths, packed) for packed in (True, False))
    return f"documents {documents}; whole rows {rows}"


def backend_for(device: torch.device, dtype: torch.dtype, dqk: int, dv: int, packed: bool) -> str:
    """sdpa, flex, flash or blocks, for heads of these widths; packed: rows of documents that do not see each other."""
    return "blocks" if device.type != "cuda" else _answer(device.index, dtype, dqk, dv, packed)


def _answer(index: int | None, dtype: torch.dtype, dqk: int, dv: int, packed: bool) -> str:
    """The first candidate that works; looked into once, and told once. Within a compiler nothing can be tried."""
    key = index, dtype, dqk, dv, packed
    if key not in _answers:
        device, failed, may_try = torch.device("cuda", index), [], not torch.compiler.is_compiling()
        surprised = False
        for name in _candidates(packed) if _selected == "auto" else (_selected,):
            why = _unable(name, device, dtype, dqk, dv, packed)
            if not why and may_try:
                with undisturbed():
                    why = trial(name, device, dtype, dqk, dv, packed)
                surprised = surprised or bool(why)
            if not why:
                break
            failed.append(f"{name}: {why}")
        else:
            raise UserError(f"train.attention={failed[0]}; use auto")
        reasons = ", ".join(failed)
        if surprised or name == "blocks":
            rows = "documents" if packed else "whole rows"
            warnings.warn(f"attention over {rows} by {name}, as {reasons}", RuntimeWarning, stacklevel=2)
        if not may_try:
            return name
        _answers[key] = name, reasons
    return _answers[key][0]


# Compilers call it and take the answer for a constant; torch.compiler's decorator for this would load them at import.
_answer._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _candidates(packed: bool) -> list[str]:
    """What `auto` tries, best first. Reasons: docs/attention.md."""
    return ["flash", "flex", "sdpa", "blocks"] if packed else ["sdpa", "flex", "blocks"]


def _told(device: torch.device, dtype: torch.dtype, dqk: int, dv: int, packed: bool) -> str:
    """What answers, and why: by which kernel, at whose wish, after which others."""
    name = backend_for(device, dtype, dqk, dv, packed)
    why = [_answers[device.index, dtype, dqk, dv, packed][1]]
    if name == "sdpa" and not packed and sdpa.takes_cudnn(device.index, dtype, dqk, dv):
        why += ["cuDNN"]
    if _selected != "auto":
        why += ["train.attention"]
    return f"{name} ({', '.join(filter(None, why))})" if any(why) else name


def _unable(name: str, device: torch.device, dtype: torch.dtype, dqk: int, dv: int, packed: bool) -> str:
    """Why not, as far as it is known without a try, or nothing."""
    if name == "blocks":
        return ""
    if name == "flash" and not _installed("flash_attn"):
        return "flash-attn is not installed"
    if name == "flash" and _compiled and _selected == "auto":
        return "it does too much under train.compile"
    if name == "flex" and not _installed("triton"):
        return "Triton is not installed (it exists for Linux)"
    if dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {dtype}"
    if name == "flash" or (name == "sdpa" and packed):
        if dtype not in sdpa.HALF:
            return f"documents need kernels that take bf16 or fp16, and this run is in {dtype} (train.precision)"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "its kernels need sm_80 or later"
        if max(dqk, dv) > varlen.WIDEST:
            return f"its kernels take heads up to {varlen.WIDEST} wide, and these are {max(dqk, dv)}"
    return ""


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --------------------------------------------------------------------------------------------------------------- trial


@torch.inference_mode(False)  # prefill may be who asks first
@torch.enable_grad()
def trial(name: str, device: torch.device, dtype: torch.dtype, dqk: int, dv: int, packed: bool) -> str:
    """What goes wrong in a small case, or nothing. Takes seconds, most of them compiling; no global generator moves."""
    if name == "blocks":
        return ""
    random = torch.Generator().manual_seed(0)
    batch, time, heads = 2, 150, 2  # not whole blocks, and a document across the border of two
    inputs = [torch.randn(batch, time, heads, d, generator=random).to(dtype) for d in (dqk, dqk, dv, dv)]
    ids = torch.tensor([0, 1, 1, 2, 3]).repeat_interleave(torch.tensor([1, 60, 3, 80, 6])).repeat(batch, 1)
    ids[1, 100:] = -1
    ids = ids if packed else None
    try:
        got = _forward_and_backward(name, [x.to(device) for x in inputs], None if ids is None else ids.to(device))
    except Exception as error:  # whatever a compiler or driver may say
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    q, k, v, do = (x.double() for x in inputs)  # none wants a gradient: `blocks` writes its own
    o, p = blocks.attention_forward(q, k, v, dqk**-0.5, ids)
    right = (o, *blocks.attention_backward(do, q, k, v, o, p, dqk**-0.5))
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    tolerance = TOLERANCE[torch.float16 if tf32 else dtype]
    for what, actual, expected in zip(("o", "dq", "dk", "dv"), got, right):
        off = (actual.double().cpu() - expected).abs().max() / expected.abs().max()
        if not off <= tolerance:  # NaN too
            return f"{what} off by {off:.2g} of its largest value"
    return ""


def _forward_and_backward(name: str, inputs: list[Tensor], ids: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    o = fused.attention(q, k, v, q.shape[3] ** -0.5, fused.prepare(name, ids, q), trial=True)
    return (o.detach(), *torch.autograd.grad(o, (q, k, v), inputs[3]))
