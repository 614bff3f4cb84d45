"""Native AdamW against its formula in float64, step after step, and the sum of squares."""

import pytest
import torch

from moe import ops
from moe.kernels import reference
from moe.kernels.native import library

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(1,), (17,), (3, 5, 7), (33, 1025), (70_000,)]


@pytest.fixture(params=library.levels() if not library.status() else [])
def level(request):
    library.use_level(request.param)
    yield
    library.use_level("")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_three_steps_follow_the_formula_and_the_working_copy_follows_them(agree, level, dtype):
    for shape in SHAPES:
        p, copy = torch.randn(shape), torch.empty(shape, dtype=BF16)
        m, v = torch.zeros(shape), torch.zeros(shape)
        exact = [t.double() for t in (p, m, v)]
        for step in (1, 2, 3):
            g = torch.randn(shape).to(dtype)
            ops.adamw(p, g, m, v, copy, step, 0.1, 0.9, 0.95, 1e-8, 0.3, scale=0.25)
            exact = list(reference.adamw(exact[0], g.double() * 0.25, *exact[1:], step, 0.1, 0.9, 0.95, 1e-8, 0.3))
        for name, a, e in zip("pmv", (p, m, v), exact):
            agree(a, e, what=f"{name} of {shape}")
        assert torch.equal(copy, p.to(BF16))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_squares_are_summed_and_any_number_of_threads_gives_the_same_bits(level, dtype):
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p, m, v = torch.ones(shape), torch.zeros(shape), torch.zeros(shape)
            ops.adamw(p, x, m, v, None, 1, 0.1, 0.9, 0.95, 1e-8, 0.0)
            found.append((ops.square_sum(x), p))
        torch.set_num_threads(1)
        assert found[0][0] == pytest.approx(x.double().square().sum().item(), rel=1e-5)
        assert all(s == found[0][0] and torch.equal(p, found[0][1]) for s, p in found[1:])


def test_what_does_not_fit_is_one_line():
    p, m, v = torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3, 4)
    for wrong in (dict(p=p.double()), dict(m=m.t()), dict(g=p[:2]), dict(copy=p), dict(v=torch.zeros(4, 3).t())):
        given = dict(p=p, g=p, m=m, v=v, copy=None) | wrong
        with pytest.raises(ValueError, match="adamw: .*expected|adamw: the gradient") as caught:
            ops.adamw(*given.values(), 1, 0.1, 0.9, 0.95, 1e-8, 0.0)
        assert "\n" not in str(caught.value)


def test_not_a_number_stays_one():
    p, m, v = torch.ones(5), torch.zeros(5), torch.zeros(5)
    ops.adamw(p, torch.full((5,), float("nan")), m, v, None, 1, 0.1, 0.9, 0.95, 1e-8, 0.0)
    assert p.isnan().all()
    assert ops.square_sum(torch.tensor([1.0, float("inf")])) == float("inf")
