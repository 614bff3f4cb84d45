"""Native products with fp32 results against float64, by every level."""

import pytest
import torch

from moe.kernels.native import library

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
linear = pytest.importorskip("moe.kernels.native.linear")

F32, BF16 = torch.float32, torch.bfloat16
LEVELS = library.levels() if not library.status() else []


@pytest.fixture(params=LEVELS)
def level(request):
    library.use_level(request.param)
    yield request.param
    library.use_level("")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "n, d, m", [(0, 5, 3), (1, 1, 1), (5, 7, 16), (9, 64, 5), (33, 37, 64), (400, 19, 17), (3, 1100, 20)]
)
def test_results_are_those_of_exact_products(agree, level, dtype, n, d, m):
    x, weight = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    y = linear.linear(x, weight)
    assert y.dtype == F32
    agree(y, x.double() @ weight.double().t(), 2e-6, scale=d**0.5)  # nothing was rounded to bf16


def test_strided_views_are_read_as_what_they_show(level):
    wide, weight = torch.randn(5, 30).to(BF16), torch.randn(12, 9).to(BF16)
    x = wide[:, 3:15]
    assert torch.equal(linear.linear(x, weight.t()), linear.linear(x.contiguous(), weight.t().contiguous()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads_gives_the_same_bits_and_so_does_any_company(level, dtype):
    x, weight, found = torch.randn(500, 21).to(dtype), torch.randn(19, 21).to(dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(linear.linear(x, weight))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert torch.equal(linear.linear(x[123:124], weight), found[0][123:124])
