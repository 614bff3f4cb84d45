"""Root-mean-square norm against its formula, values and every gradient."""

import pytest
import torch

from moe import ops
from moe.kernels import reference
from moe.kernels.native import library
from moe.ops.norm import SMALL
from tests.op_cases import with_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
needs_native = pytest.mark.skipif(library.status() != "", reason=library.status())


def norm_inputs(layout, dtype):
    match layout:
        case "vector":
            x = torch.randn(5)
        case "split":  # as the latent arrives in MLA: a part of wider rows
            x = torch.randn(2, 3, 11).split([7, 4], -1)[0]
        case "transposed":
            x = torch.randn(3, 2, 8).transpose(0, 1)
        case "columns":
            x = torch.randn(6, 4).t()
        case "nothing":
            x = torch.randn(0, 4)
        case _:
            x = torch.randn(2, 3, 64) * 50
    return x.to(dtype), (1 + 0.3 * torch.randn(x.shape[-1])).to(dtype)


NORMS = ["vector", "split", "transposed", "columns", "nothing", "large"]


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("layout", NORMS)
def test_norm_agrees_with_its_formula_in_value_and_every_gradient(agree, dtype, layout):
    x, weight = norm_inputs(layout, dtype)
    upstream = torch.randn(x.shape).to(dtype)
    exact, exact_gradients = with_gradients(
        lambda x, w: reference.rms_norm(x, w, 0.1), (x.double(), weight.double()), upstream, (0, 1)
    )
    x.requires_grad_(), weight.requires_grad_()  # the layout stays, unlike in a clone
    y = ops.rms_norm(x, weight, 0.1)
    gradients = torch.autograd.grad(y, (x, weight), upstream)
    assert y.dtype == dtype
    agree(y, exact, what="y")
    for name, g, e in zip(("x", "weight"), gradients, exact_gradients):
        assert g.dtype == dtype
        agree(g, e, what=f"gradient of {name}", scale=0.02 if layout == "large" else 1.0)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [3, 700])
def test_norm_without_gradients_is_the_same_for_few_rows_and_many(agree, dtype, rows):
    x, weight = (torch.randn(rows, 64) * 50).to(dtype), (1 + 0.3 * torch.randn(64)).to(dtype)
    assert (x.numel() > SMALL) == (rows == 700)
    y = ops.rms_norm(x, weight, 0.1)
    assert y.dtype == dtype
    agree(y, reference.rms_norm(x.double(), weight.double(), 0.1))
    agree(y, ops.rms_norm(x.requires_grad_(), weight, 0.1), {F64: 1e-13, F32: 1e-6, BF16: 4e-3}[dtype])


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (4, 1)])
def test_a_weight_laid_out_for_few_rows_is_the_same_matrix_and_a_product_of_it(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    laid = ops.for_few_rows(weight)
    assert torch.equal(laid, weight) and laid.shape == weight.shape and laid.dtype == dtype
    if dtype == F32:
        assert laid.t().is_contiguous()


@pytest.mark.parametrize("layout", NORMS)
def test_norm_is_well_formed_for_any_layout(layout):
    x, weight = norm_inputs(layout, F64)
    torch.library.opcheck(torch.ops.moe.rms_norm.default, (x.requires_grad_(), weight.requires_grad_(), 1e-6))
    if layout != "nothing":
        assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), (x, weight))
        torch.autograd.grad(ops.rms_norm(x, weight, 1e-6).sum(), (x, weight))  # an expanded upstream gradient


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", NORMS)
def test_the_native_norm_is_well_formed_and_agrees_with_pytorchs(agree, ops_path, layout, dtype):
    x, weight = norm_inputs(layout, dtype)
    upstream, found = torch.randn(x.shape).to(dtype), []
    x.requires_grad_(), weight.requires_grad_()
    for path in ("torch", "native"):
        ops_path(path)
        y = ops.rms_norm(x, weight, 0.1)
        assert (type(y.grad_fn).__name__).count("native") == (path == "native")
        found.append((y, *torch.autograd.grad(y, (x, weight), upstream)))
    for a, e in zip(*found):
        assert a.dtype == e.dtype == dtype
        agree(a, e, scale=0.02 if layout == "large" else 1.0)
    if dtype is F32:
        torch.library.opcheck(torch.ops.moe.rms_norm_native.default, (x, weight, 1e-6))


@needs_native
def test_a_weight_of_another_dtype_stays_with_pytorch(agree, ops_path):
    ops_path("native")
    x, weight = torch.randn(3, 8).to(BF16).requires_grad_(), torch.randn(8)
    agree(ops.rms_norm(x, weight, 0.1), reference.rms_norm(x.double(), weight.double(), 0.1))
