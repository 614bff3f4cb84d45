"""Do the Triton kernels agree with their oracle on this device? Asked once for each dtype, before they answer for real.

A tiny layer, forward and backward, with an expert that nobody chose, one that most chose, and ids of nobody. It takes
seconds, nearly all of them compiling; production shapes take other tiles, which tools/gpu_check.py looks at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels import chain, reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest error against the largest value; TF32, where it is allowed, has as many digits as fp16."""
N, D, F, E, K = 37, 40, 24, 6, 3


def case(dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs and an upstream gradient on the CPU, the same in every process; no global generator moves."""
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (N, D), "w13": (E, 2 * F, D), "w2": (E, D, F), "gates": (N, K), "dy": (N, D)}
    found = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    ids = torch.randint(0, E, (N, K), generator=random)
    ids[ids == 2] = 4  # nobody's, and a crowd's
    ids[::5, 1], ids[3, :] = E, -1  # no expert
    return found | {"gates": found["gates"].float(), "experts": ids}


def disagreement(device: torch.device, dtype: torch.dtype) -> str:
    """What differs and by how much, or nothing."""
    given = case(dtype)
    names = ("x", "w13", "w2", "gates")
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    tolerance = TOLERANCE[torch.float16 if tf32 else dtype]
    with torch.enable_grad():
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        for name in names:
            wide[name].requires_grad_()
        y = reference.experts(*(wide[k] for k in ("x", "w13", "w2", "experts", "gates")))
        expected = [y, *torch.autograd.grad(y, [wide[k] for k in names], wide["dy"])]
    with torch.no_grad():
        x, w13, w2, ids, gates, dy = (given[k].to(device) for k in ("x", "w13", "w2", "experts", "gates", "dy"))
        try:
            y, z, order, inv, ends = chain.experts_forward(x, w13, w2, ids, gates)
            got = [y, *chain.experts_backward(dy, x, w13, w2, gates, z, order, inv, ends)]
        except Exception as error:  # whatever a compiler or driver may say
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    for name, actual, right in zip(("y", *(f"d{n}" for n in names)), got, expected):
        off = (actual.double().cpu() - right).abs().max() / right.abs().max()
        if not off <= tolerance:  # NaN too
            return f"{name} off by {off:.2g} of its largest value"
    return ""
