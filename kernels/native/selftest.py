"""Do the native kernels agree with their oracle on this processor? Asked once for each dtype, before they answer for real.

Tiny experts with one that nobody chose and ids of nobody, and tiny attention over two documents; forward and backward, of
widths that fill no vector; milliseconds. It is there for what tests on our machines cannot see: another processor, another
compiler. Deliberately absent: decoding, and the ops that are no more than a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moe.kernels import reference
from moe.kernels.native import attention, experts

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # largest error against the largest value
N, D, F, E, K = 9, 21, 19, 4, 2
T, H, QK, V = 5, 2, 19, 7


def disagreement(dtype: torch.dtype) -> str:
    """What differs and by how much, or nothing."""
    try:
        for name, actual, right in (*_experts(dtype), *_attention(dtype)):
            off = float((actual.double() - right).abs().max() / right.abs().max())
            if not off <= TOLERANCE[dtype]:  # NaN too
                return f"{name} off by {off:.2g} of its largest value"
    except Exception as error:  # a field that drifted, an op that was left out
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    return ""


def _experts(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (N, D), "w13": (E, 2 * F, D), "w2": (E, D, F), "dy": (N, D)}
    given = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    x, w13, w2, dy = given.values()
    gates = torch.rand(N, K, generator=random)
    ids = torch.randint(0, E - 1, (N, K), generator=random)
    ids[2, 1], ids[4, :] = E, -1
    y, z = experts.experts_forward(x, w13, w2, ids, gates)
    got = y, *experts.experts_backward(dy, x, w13, w2, ids, gates, z)
    right = _exact(lambda x, w13, w2, gates: reference.experts(x, w13, w2, ids, gates), (x, w13, w2, gates), dy)
    yield from zip(("y", "dx", "dw13", "dw2", "dgates"), got, right)


def _attention(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    q, k, v, do = (torch.randn(1, T, H, width, generator=random).to(dtype) for width in (QK, QK, V, V))
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    o, lse = attention.attention_forward(q, k, v, 0.3, documents)
    got = o, *attention.attention_backward(do, q, k, v, o, lse, 0.3, documents)
    right = _exact(lambda q, k, v: reference.attention(q, k, v, 0.3, documents), (q, k, v), do)
    yield from zip(("o", "dq", "dk", "dv"), got, right)


def _exact(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """The function's value and gradients in float64."""
    with torch.enable_grad():
        wide = [t.double().requires_grad_() for t in inputs]
        y = function(*wide)
        # of a sum: upstream gradients of other shapes make PyTorch load sympy, a third of a second
        return y.detach(), *torch.autograd.grad((y * upstream.double()).sum(), wide)
