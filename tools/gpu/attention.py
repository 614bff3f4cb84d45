"""Attention backends by their public door: values and gradients against whole scores in float64, and their times.

What a device or an installation does not have is skipped, with the line that `train.attention` would answer.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import Part
from correctness import Found
from floors import Work
from machine import Clock, Machine, first_line, seconds
from torch import Tensor

BACKENDS = ("auto", "sdpa", "flex", "flash")
WIDTHS = ((96, 64), (192, 128), (48, 32))
"""Of keys and values: `small`, V3, `tiny`."""
TOLERANCE = 2e-2
"""bf16; probabilities are rounded between the two products."""
TIMED = (16, 1024, 8)
"""Rows, places, heads."""


def run(machine: Machine, clock: Clock, tiny: bool) -> dict[str, Any]:
    from moe import ops
    from moe.config import UserError

    found, times = Found(), []
    for widths in WIDTHS[-1:] if tiny else WIDTHS:
        for name in BACKENDS:
            if not clock.has(5 if name in ("sdpa", "auto") else 25, f"attention by {name}, widths {widths}"):
                continue
            try:
                told = ops.select_attention(name, machine.device, torch.bfloat16, widths)
            except UserError as refused:
                if " off by " in str(refused):  # it works, and is wrong
                    found.failures.append(f"attention by {name}, widths {widths}: {refused}")
                    continue
                found.skipped.append(f"{name}, widths {widths}: {refused}")
                continue
            except Exception as raised:
                found.failures.append(f"attention by {name}, widths {widths}: {first_line(raised)}")
                continue
            for packed in (False, True):
                what = f"{name} {'documents' if packed else 'whole rows'}"
                with found.trying(f"attention, {what}, widths {widths}"):
                    one(found, what, machine.device, widths, packed, tiny)
                    if machine.is_gpu:
                        times.append({"what": what, "widths": widths, "told": told, **timed(machine, widths, packed)})
    ops.select_attention("auto", machine.device, torch.bfloat16, WIDTHS[0])
    return found.to_dict() | {"times": times}


def one(found: Found, what: str, device: torch.device, widths: tuple[int, int], packed: bool, tiny: bool) -> None:
    batch, time, heads = (2, 21, 2) if tiny else (2, 333, 3)
    q, k, v, do = made(device, batch, time, heads, widths)
    ids = documents(device, batch, time) if packed else None
    got = _both_ways(q, k, v, do, ids)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    o = exact(*wide, ids)
    right = (o.detach(), *torch.autograd.grad(o, wide, do.double()))
    parts = [Part(name, slice(None), t) for name, t in zip(("o", "dq", "dk", "dv"), right)]
    found.compare(f"attention {widths}", f"attention, {what}:", "bf16", got, parts, TOLERANCE)


def made(device: torch.device, batch: int, time: int, heads: int, widths: tuple[int, int]) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(time)
    sizes = (widths[0], widths[0], widths[1], widths[1])
    return [torch.randn(batch, time, heads, d, generator=random, device=device).bfloat16() for d in sizes]


def documents(device: torch.device, batch: int, time: int) -> Tensor:
    """[B, T] ids: documents of random length, padding at the end of the first row."""
    random = torch.Generator().manual_seed(time)
    starts = torch.rand(batch, time, generator=random) < 8 / time
    ids = starts.int().cumsum(1)
    ids[0, -max(1, time // 16) :] = -1
    return ids.to(device)


def exact(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
    """[B, T, H, .] -> [B, T, H, dv], whole scores."""
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()[None]
    if ids is not None:
        seen = seen & (ids[:, :, None] == ids[:, None, :])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, do: Tensor, ids: Any) -> tuple[Tensor, ...]:
    from moe import ops

    given = [t.detach().requires_grad_() for t in (q, k, v)]
    o = ops.attention(*given, q.shape[-1] ** -0.5, ids)
    return (o.detach(), *torch.autograd.grad(o, given, do))


def timed(machine: Machine, widths: tuple[int, int], packed: bool) -> dict[str, float]:
    """Forward and backward at `small`'s size; floor without recomputed scores, all of a row seen."""
    from moe import ops

    batch, time, heads = TIMED
    q, k, v, do = made(machine.device, batch, time, heads, widths)
    ids = ops.documents(documents(machine.device, batch, time) if packed else None, q.flatten(2), widths)
    took = seconds([lambda: _both_ways(q, k, v, do, ids)], machine.device, 0.1)
    both, n = heads * sum(widths), batch * time
    floor = machine.card.seconds(Work(both * n * (time + 1), 4 * n * both))
    floor += machine.card.seconds(Work(2 * both * n * (time + 1), 8 * n * both))
    return {"seconds": took, "floor": floor, "TFLOP/s": 3 * both * n * (time + 1) / took / 1e12}
