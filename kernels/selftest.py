"""Do the Triton kernels agree with their oracle on this device? Asked once for each dtype, before they answer for real.

A tiny router and a tiny layer, forward and backward, with an expert that nobody chose, one that most chose, and ids of
nobody. It takes seconds, nearly all of them compiling; production shapes take other tiles, which tools/gpu_check.py looks
at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels import chain, reference
from moe.kernels import route as router

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
    try:
        return _router(device) or _layer(device, dtype)
    except Exception as error:  # whatever a compiler or driver may say
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _router(device: torch.device) -> str:
    """Choice, gates, counts and gradient of grouped sigmoid routing, which is fp32 whatever the layer's dtype."""
    random = torch.Generator().manual_seed(1)
    logits, dgates = torch.randn(N, 2 * E, generator=random), torch.randn(N, K, generator=random)
    bias = 0.1 * torch.randn(2 * E, generator=random)
    with torch.enable_grad():
        wide = logits.double().requires_grad_()
        s = torch.sigmoid(wide)
        ids = torch.tensor(reference.route(s.detach(), bias.double(), K, 4, 2))
        gates = s.gather(1, ids)
        gates = 2.5 * gates / gates.sum(1, keepdim=True)
        (dlogits,) = torch.autograd.grad(gates, wide, dgates.double())
    with torch.no_grad():
        given = logits.to(device)
        chosen, weights, hist = router.route(given, bias.to(device), K, 4, 2, "sigmoid", True, 2.5)
        back = router.route_backward(dgates.to(device), given, chosen, "sigmoid", True, 2.5)
    if not torch.equal(chosen.cpu(), ids):
        return "the router chose other experts"
    if not torch.equal(hist.sum(0).cpu(), torch.bincount(ids.flatten(), minlength=2 * E)):
        return "the router counted wrong"
    return _off("gates", weights, gates, 1e-5) or _off("dlogits", back, dlogits, 1e-5)


def _layer(device: torch.device, dtype: torch.dtype) -> str:
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
        y, z, order, inv, ends = chain.experts_forward(x, w13, w2, ids, gates)
        got = [y, *chain.experts_backward(dy, x, w13, w2, gates, z, order, inv, ends)]
    found = (_off(*each, tolerance) for each in zip(("y", *(f"d{n}" for n in names)), got, expected))
    return next(filter(None, found), "")


def _off(name: str, actual: Tensor, right: Tensor, tolerance: float) -> str:
    off = (actual.double().cpu() - right).abs().max() / right.abs().max()
    return "" if off <= tolerance else f"{name} off by {off:.2g} of its largest value"  # NaN too
