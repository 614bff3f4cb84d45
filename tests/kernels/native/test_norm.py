"""Native root-mean-square norm against its formula in float64: values and every gradient, by every level."""

import pytest
import torch

from moe.kernels import reference
from moe.kernels.native import library
from tests.op_cases import with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
norm = pytest.importorskip("moe.kernels.native.norm")

F32, BF16 = torch.float32, torch.bfloat16
LEVELS = library.levels() if not library.status() else []
INPUTS = {
    "vector": lambda: torch.randn(5),
    "one channel": lambda: torch.randn(4, 1),
    "one row": lambda: torch.randn(1, 33),
    "odd width": lambda: torch.randn(3, 2, 37),
    "whole vectors": lambda: torch.randn(70, 64),
    "many rows": lambda: torch.randn(301, 19),
    "large": lambda: torch.randn(2, 3, 64) * 50,
    "split": lambda: torch.randn(2, 3, 51).split([40, 11], -1)[0],  # as the latent arrives in MLA
    "transposed": lambda: torch.randn(3, 2, 18).transpose(0, 1),
    "columns": lambda: torch.randn(6, 4).t(),
    "one row for all": lambda: torch.randn(1, 20).expand(7, 20),
}


@pytest.fixture(params=LEVELS)
def level(request):
    library.use_level(request.param)
    yield request.param
    library.use_level("")


def everything(x, weight, upstream, eps=0.1):
    y, r = norm.rms_norm_forward(x, weight, eps)
    return y, *norm.rms_norm_backward(upstream, x, weight, r), r


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_values_and_gradients_agree_with_the_formula(agree, level, dtype, name):
    x = INPUTS[name]().to(dtype)
    weight, upstream = (1 + 0.3 * torch.randn(x.shape[-1])).to(dtype), torch.randn(x.shape).to(dtype)
    y, gradients = with_gradients(
        lambda x, w: reference.rms_norm(x, w, 0.1), (x.double(), weight.double()), upstream.double(), (0, 1)
    )
    found = everything(x, weight, upstream)
    for what, a, e in zip(("y", "x", "weight"), found, (y, *gradients)):
        assert a.dtype == dtype and a.is_contiguous()
        agree(a, e, what=what, scale=0.02 if name == "large" else 1.0)
    agree(found[3].squeeze(-1), (x.double().square().mean(-1) + 0.1).rsqrt(), 1e-6)


def test_rows_are_read_where_they_lie():
    whole = torch.randn(4, 3, 30)
    part = whole[..., 5:17]
    assert norm._rows(part).data_ptr() == part.data_ptr() and norm._rows(part).stride() == (30, 1)
    for upstream in (
        torch.ones(()).expand(4, 3, 12),
        torch.randn(12).expand(4, 3, 12),
        torch.randn(4, 3, 20)[..., 3:15],
    ):
        found = everything(part, torch.ones(12), upstream)
        copied = everything(part.contiguous(), torch.ones(12), upstream.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, copied))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(level, dtype):
    x, upstream, weight = torch.randn(1001, 70).to(dtype), torch.randn(1001, 70).to(dtype), torch.randn(70).to(dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(everything(x, weight, upstream))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_no_rows_give_no_values_and_a_weight_gradient_of_zero(level):
    x = torch.randn(0, 21)
    y, dx, dw, _ = everything(x, torch.ones(21), x)
    assert y.shape == dx.shape == (0, 21) and dw.eq(0).all() and dw.shape == (21,)


def test_a_value_that_is_no_number_shows_in_its_row_alone(level):
    x = torch.randn(3, 20)
    x[1, 7] = float("nan")
    y, dx, dw, _ = everything(x, torch.ones(20), torch.ones(3, 20))
    assert y[1].isnan().all() and dx[1].isnan().all() and dw.isnan().all()
    assert not y[[0, 2]].isnan().any() and not dx[[0, 2]].isnan().any()
