"""Native SwiGLU against its formula in float64: values and gradients, by every level."""

import pytest
import torch

from moe.kernels import reference
from moe.kernels.native import library
from tests.op_cases import with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
swiglu = pytest.importorskip("moe.kernels.native.swiglu")

LEVELS = library.levels() if not library.status() else []


@pytest.fixture(params=LEVELS)
def level(request):
    library.use_level(request.param)
    yield request.param
    library.use_level("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2,), (1, 2), (5, 6), (3, 2, 64), (70, 74), (0, 6), (4, 0), (2, 3, 66)], ids=str)
def test_values_and_gradients_agree_with_the_formula(agree, level, dtype, shape):
    z = (torch.randn(shape) * 3).to(dtype)
    upstream = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    a, (dz,) = with_gradients(reference.swiglu, (z.double(),), upstream.double(), (0,))
    found = swiglu.swiglu_forward(z)
    assert found.dtype == dtype
    agree(found, a, scale=1.0)
    agree(swiglu.swiglu_backward(upstream, z), dz, scale=1.0)


def test_strided_views_are_read_as_what_they_show(level):
    wide = torch.randn(5, 30)
    z, da = wide[:, 3:23], torch.ones(()).expand(5, 10)
    assert torch.equal(swiglu.swiglu_forward(z), swiglu.swiglu_forward(z.contiguous()))
    assert torch.equal(swiglu.swiglu_backward(da, z), swiglu.swiglu_backward(da.contiguous(), z.contiguous()))


def test_large_gates_open_and_close_without_overflow(agree, level):
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    z, da = torch.cat([gate, torch.full((7,), 2.0)]), torch.ones(7)
    agree(swiglu.swiglu_forward(z), reference.swiglu(z.double()))
    _, (dz,) = with_gradients(reference.swiglu, (z.double(),), da.double(), (0,))
    agree(swiglu.swiglu_backward(da, z), dz)
    z[3] = float("nan")
    assert swiglu.swiglu_forward(z).isnan().nonzero().flatten().tolist() == [3]
    assert swiglu.swiglu_backward(da, z).isnan().nonzero().flatten().tolist() == [3, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(level, dtype):
    z, da, found = torch.randn(301, 70).to(dtype), torch.randn(301, 35).to(dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append((swiglu.swiglu_forward(z), swiglu.swiglu_backward(da, z)))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
