"""Routed SwiGLU experts as ops: for tokens with ids, and for rows that stand in expert order already.

The Triton, the native and the PyTorch path are ops of their own, since they keep other things for the backward pass;
which one answers is settled outside (paths.py), so compilers see one node. Kept a token, Triton, bf16: 2D bytes of x, 4FK of z
(none with `recompute_z`), 12K of order and gates.

    N tokens, D model, E experts, K choices, F expert width, M rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels import eager, reference
from moe.ops.paths import path_for, wants_grad


def experts(x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, recompute_z: bool = False) -> Tensor:
    """Routed SwiGLU experts, weighted and summed for each token.

    x [N, D]; w13 [E, 2F, D] gate rows then up rows; w2 [E, D, F]; experts [N, K] int64; gates [N, K] -> [N, D] in x's
    dtype. Differentiable in x, w13, w2 and gates. An id outside [0, E) is no expert: no compute, zero gradient; K is a
    maximum. Every expert's weight receives a gradient, zero for an expert without tokens. recompute_z: the backward
    pass repeats the first product instead of keeping its result (4FK bytes a token in bf16). Raises ValueError on
    shapes that do not fit.
    """
    check_weights("experts", x, w13, w2)
    if experts.shape != gates.shape or experts.shape[0] != x.shape[0] or experts.ndim != 2:
        raise ValueError(
            f"experts: ids {tuple(experts.shape)} and gates {tuple(gates.shape)} must both be [N, K] with N={x.shape[0]}"
        )
    _check_gates("experts", x, gates)
    if experts.dtype != torch.int64:
        if experts.dtype.is_floating_point or experts.dtype.is_complex or experts.dtype == torch.bool:
            raise ValueError(f"experts: ids must be integers, not {experts.dtype}")
        experts = experts.long()
    if experts.device != x.device:
        raise ValueError(f"experts: ids are on {experts.device}, x is on {x.device}")
    if not experts.shape[1]:  # nobody is chosen: zeros, and zero gradients
        return torch.zeros_like(x) + sum(t.sum() * 0 for t in (x, w13, w2)) if x.numel() else x.clone()
    path = path_for(x)
    if path == "reference":
        return reference.experts(x, w13, w2, experts, gates)
    if path == "triton":
        return _triton(x, w13, w2, experts, gates, recompute_z)[0]
    if path == "native":
        return _native(x, w13, w2, experts, gates, not recompute_z and wants_grad(x, w13, w2, gates))[0]
    if not wants_grad(x, w13, w2, gates) and eager.experts_are_few(w13, w2, experts.numel()):
        return eager.experts_of_few(x, w13, w2, experts, gates)
    return _experts(x, w13, w2, experts, gates, recompute_z)[0]


def grouped_swiglu(
    rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, recompute_z: bool = False
) -> Tensor:
    """SwiGLU experts over rows in expert order, each weighted by its gate: what is left once somebody has sorted.

    rows [M, D]; ends [E] int32, one past the last row of each expert, rising, at most M; row_gates [M] -> [M, D].
    Rows past `ends[-1]` are never read: their results and gradients are zero. Differentiable in rows, w13, w2 and
    row_gates. `ends` stays on the device: its values are not checked.
    """
    check_weights("grouped_swiglu", rows, w13, w2)
    if row_gates.shape != rows.shape[:1] or ends.shape != w13.shape[:1] or ends.dtype != torch.int32:
        raise ValueError(
            f"grouped_swiglu: ends {tuple(ends.shape)} {ends.dtype} and row_gates {tuple(row_gates.shape)} must be "
            f"[{w13.shape[0]}] int32 and [{rows.shape[0]}]"
        )
    _check_gates("grouped_swiglu", rows, row_gates)
    path = path_for(rows)
    if path == "reference":
        return reference.grouped_swiglu(rows, w13, w2, ends, row_gates)
    op = {"triton": _triton_rows, "native": _native_rows, "torch": _rows}[path]
    return op(rows, w13, w2, ends, row_gates, recompute_z)[0]


def check_weights(op: str, x: Tensor, w13: Tensor, w2: Tensor) -> None:
    n_experts, double, width = w13.shape if w13.ndim == 3 else (0, 1, 0)
    if x.ndim != 2 or x.shape[1] != width or tuple(w2.shape) != (n_experts, width, double // 2) or double % 2:
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)} do not fit; "
            "expected x [N, D], w13 [E, 2F, D], w2 [E, D, F]"
        )
    if not w13.numel():
        raise ValueError(f"{op}: w13 {tuple(w13.shape)} is empty; there must be an expert, and widths above 0")
    for name, w in {"w13": w13, "w2": w2}.items():
        if w.dtype != x.dtype or w.device != x.device:
            raise ValueError(f"{op}: {name} is {w.dtype} on {w.device}, x is {x.dtype} on {x.device}; convert one")


def _check_gates(op: str, x: Tensor, gates: Tensor) -> None:
    if not gates.dtype.is_floating_point or gates.device != x.device:
        raise ValueError(f"{op}: gates must be floating point on {x.device}, not {gates.dtype} on {gates.device}")


def _trained(ctx) -> bool:
    """Whether anybody wants the weights' gradients: not where experts are frozen and an adapter is trained."""
    return any(ctx.needs_input_grad[1:3])


def _empty(x: Tensor, w13: Tensor, w2: Tensor, gates: Tensor, weights: bool) -> tuple[Tensor, ...]:
    """Shapes of a backward pass's results: unwanted gradients of weights are empty."""
    return tuple(
        t.new_empty(t.shape if wanted else 0) for t, wanted in zip((x, w13, w2, gates), (1, weights, weights, 1))
    )


# ------------------------------------------------------------------------------------------------------------- PyTorch


@torch.library.custom_op("moe::experts", mutates_args=())
def _experts(
    x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, recompute_z: bool
) -> tuple[Tensor, Tensor]:
    y, z = eager.experts_forward(x, w13, w2, experts, gates)
    return y, z.new_empty(0) if recompute_z else z


@_experts.register_fake
def _(x, w13, w2, experts, gates, recompute_z):
    rows = eager.order_rows(x, experts.numel(), w13.shape[0])
    return x.new_empty(x.shape), x.new_empty(0) if recompute_z else x.new_empty(rows, w13.shape[1])


@torch.library.custom_op("moe::experts_backward", mutates_args=())
def _experts_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not z.numel():
        z = eager.experts_forward(x, w13, w2, experts, gates)[1]
    return eager.experts_backward(dy, x, w13, w2, experts, gates, z, weights)


@_experts_backward.register_fake
def _(dy, x, w13, w2, experts, gates, z, weights):
    return _empty(x, w13, w2, gates, weights)


def _experts_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])


def _experts_grad(ctx, dy, dz):
    x, w13, w2, ids, gates, z = ctx.saved_tensors
    dx, dw13, dw2, dgates = _experts_backward(dy, x, w13, w2, ids, gates, z, _trained(ctx))
    return dx, dw13, dw2, None, dgates, None


_experts.register_autograd(_experts_grad, setup_context=_experts_setup)


@torch.library.custom_op("moe::grouped_swiglu", mutates_args=())
def _rows(
    rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, recompute_z: bool
) -> tuple[Tensor, Tensor]:
    y, z = eager.rows_forward(rows, w13, w2, ends, row_gates)
    return y, z.new_empty(0) if recompute_z else z


@torch.library.custom_op("moe::grouped_swiglu_backward", mutates_args=())
def _rows_backward(
    dy: Tensor, rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, z: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not z.numel():
        z = eager.rows_forward(rows, w13, w2, ends, row_gates)[1]
    return eager.rows_backward(dy, rows, w13, w2, ends, row_gates, z, weights)


# -------------------------------------------------------------------------------------------------------------- Triton


@torch.library.custom_op("moe::experts_triton", mutates_args=())
def _triton(
    x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, recompute_z: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from moe.kernels import chain

    return chain.experts_forward(x, w13, w2, experts, gates, keep_z=not recompute_z)


@_triton.register_fake
def _(x, w13, w2, experts, gates, recompute_z):
    m, int32 = experts.numel(), torch.int32
    z = x.new_empty(0) if recompute_z else x.new_empty(m, w13.shape[1])
    order, inv = experts.new_empty(m, dtype=int32), experts.new_empty(experts.shape, dtype=int32)
    return x.new_empty(x.shape), z, order, inv, experts.new_empty(w13.shape[0], dtype=int32)


@torch.library.custom_op("moe::experts_triton_backward", mutates_args=())
def _triton_backward(
    dy: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    gates: Tensor,
    z: Tensor,
    order: Tensor,
    inv: Tensor,
    ends: Tensor,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe.kernels import chain

    return chain.experts_backward(dy, x, w13, w2, gates, z, order, inv, ends, weights)


@_triton_backward.register_fake
def _(dy, x, w13, w2, gates, z, order, inv, ends, weights):
    return _empty(x, w13, w2, gates, weights)


def _triton_setup(ctx, inputs, output):
    x, w13, w2, _, gates, _ = inputs
    ctx.save_for_backward(x, w13, w2, gates, *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _triton_grad(ctx, dy, *_):
    dx, dw13, dw2, dgates = _triton_backward(dy, *ctx.saved_tensors, _trained(ctx))
    return dx, dw13, dw2, None, dgates, None


_triton.register_autograd(_triton_grad, setup_context=_triton_setup)


@torch.library.custom_op("moe::experts_native", mutates_args=())
def _native(
    x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, keep_z: bool
) -> tuple[Tensor, Tensor]:
    from moe.kernels.native import experts as native

    return native.experts_forward(x, w13, w2, experts, gates, keep_z)


@_native.register_fake
def _(x, w13, w2, experts, gates, keep_z):
    return x.new_empty(x.shape), x.new_empty(experts.numel() if keep_z else 0, w13.shape[1])


@torch.library.custom_op("moe::experts_native_backward", mutates_args=())
def _native_backward(
    dy: Tensor, x: Tensor, w13: Tensor, w2: Tensor, experts: Tensor, gates: Tensor, z: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe.kernels.native import experts as native

    return native.experts_backward(dy, x, w13, w2, experts, gates, z, weights)


@_native_backward.register_fake
def _(dy, x, w13, w2, experts, gates, z, weights):
    return _empty(x, w13, w2, gates, weights)


def _native_grad(ctx, dy, dz):
    x, w13, w2, ids, gates, z = ctx.saved_tensors
    dx, dw13, dw2, dgates = _native_backward(dy, x, w13, w2, ids, gates, z, _trained(ctx))
    return dx, dw13, dw2, None, dgates, None


_native.register_autograd(_native_grad, setup_context=_experts_setup)


@torch.library.custom_op("moe::grouped_swiglu_native", mutates_args=())
def _native_rows(
    rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, recompute_z: bool
) -> tuple[Tensor, Tensor]:
    from moe.kernels.native import experts as native

    y, z = native.rows_forward(rows, w13, w2, ends, row_gates, keep_z=not recompute_z)
    return y, z.new_empty(0) if recompute_z else z


@torch.library.custom_op("moe::grouped_swiglu_native_backward", mutates_args=())
def _native_rows_backward(
    dy: Tensor, rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, z: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe.kernels.native import experts as native

    return native.rows_backward(dy, rows, w13, w2, ends, row_gates, z, weights)


@torch.library.custom_op("moe::grouped_swiglu_triton", mutates_args=())
def _triton_rows(
    rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, recompute_z: bool
) -> tuple[Tensor, Tensor]:
    from moe.kernels import chain

    return chain.rows_forward(rows, w13, w2, ends, row_gates, keep_z=not recompute_z)


@torch.library.custom_op("moe::grouped_swiglu_triton_backward", mutates_args=())
def _triton_rows_backward(
    dy: Tensor, rows: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, row_gates: Tensor, z: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe.kernels import chain

    return chain.rows_backward(dy, rows, w13, w2, ends, row_gates, z, weights)


def _register_rows(forward, backward) -> None:
    """All paths of `grouped_swiglu` keep the same things."""

    @forward.register_fake
    def _(rows, w13, w2, ends, row_gates, recompute_z):
        z = rows.new_empty(0) if recompute_z else rows.new_empty(rows.shape[0], w13.shape[1])
        return rows.new_empty(rows.shape), z

    @backward.register_fake
    def _(dy, rows, w13, w2, ends, row_gates, z, weights):
        return _empty(rows, w13, w2, row_gates, weights)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], output[1])

    def grad(ctx, dy, dz):
        drows, dw13, dw2, dgates = backward(dy, *ctx.saved_tensors, _trained(ctx))
        return drows, dw13, dw2, None, dgates, None

    forward.register_autograd(grad, setup_context=setup)


_register_rows(_rows, _rows_backward)
_register_rows(_triton_rows, _triton_rows_backward)
_register_rows(_native_rows, _native_rows_backward)
