"""SwiGLU of a dense feed-forward against its formula, on every path, values and gradients."""

import sys

import pytest
import torch

from moe import ops
from moe.kernels import reference
from moe.kernels.native import library
from moe.layers.basics import SwiGLU
from tests.op_cases import with_gradients

SMALL = sys.modules["moe.ops.swiglu"].SMALL
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
needs_native = pytest.mark.skipif(library.status() != "", reason=library.status())
PATHS = ["torch", "reference", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3, 38), (0, 4), (2, 0, 6)], ids=str)
def test_swiglu_agrees_with_its_formula_in_value_and_gradient(agree, ops_path, path, dtype, shape):
    if (path, dtype) == ("native", F64):
        return
    ops_path(path)
    z, upstream = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    a, (dz,) = with_gradients(ops.swiglu, (z,), upstream, (0,))
    exact, (gradient,) = with_gradients(reference.swiglu, (z.double(),), upstream, (0,))
    assert a.dtype == dz.dtype == dtype
    agree(a, exact, scale=1.0)
    agree(dz, gradient, scale=1.0)


@needs_native
@pytest.mark.parametrize("rows", [3, 700])
def test_swiglu_without_gradients_is_the_same_for_few_rows_and_many(agree, ops_path, rows):
    ops_path("native")
    z = torch.randn(rows, 100)
    assert (z.numel() > SMALL) == (rows == 700)
    agree(ops.swiglu(z), reference.swiglu(z.double()), 1e-6)


@needs_native
@pytest.mark.parametrize("shape", [(6,), (2, 3, 38), (0, 4)], ids=str)
def test_the_op_is_well_formed_for_autograd_and_compilers(shape):
    z = torch.randn(shape, requires_grad=True)
    torch.library.opcheck(torch.ops.moe.swiglu_native.default, (z,))
    torch.library.opcheck(
        torch.ops.moe.swiglu_native_backward.default, (torch.randn(*shape[:-1], shape[-1] // 2), z.detach())
    )


@needs_native
def test_the_feed_forward_is_the_same_on_both_paths_and_compiles(agree, ops_path):
    layer, x, found = SwiGLU(12, 20), torch.randn(5, 12), []
    for path, call in (
        ("torch", layer),
        ("native", layer),
        ("native", torch.compile(layer, backend="aot_eager", fullgraph=True)),
    ):
        ops_path(path)
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, layer.w13.weight, layer.w2.weight))))
    for other in found[1:]:
        for a, e in zip(other, found[0]):
            agree(a, e)


def test_an_odd_width_has_no_halves():
    with pytest.raises(ValueError, match="two halves"):
        ops.swiglu(torch.randn(3, 5))
