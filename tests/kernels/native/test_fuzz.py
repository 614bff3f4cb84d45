"""Native experts at random shapes, by every level, and from two Python threads at once."""

import random
import threading

import pytest
import torch

from moe.kernels import reference
from moe.kernels.native import library
from tests.op_cases import expert_inputs, with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())

NAMES = ("y", "dx", "dw13", "dw2", "dgates")


@pytest.fixture
def levels():
    """The levels of this processor; the one that the test began with is back afterwards."""
    before = library.level()
    yield library.levels()
    library.use_level(before)


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def some_inputs(dtype, most=40):
    """Sizes around the vectors' widths, and far from them; ids that repeat, crowd, and name nobody."""
    n, d, f = (random.choice((random.randint(1, 9), random.randint(10, most))) for _ in range(3))
    n_experts, k = random.randint(1, 9), random.randint(1, 4)
    ids = torch.randint(random.choice((0, -1)), n_experts + random.choice((0, 2)), (n, k))
    x, w13, w2, _, gates = expert_inputs(ids, n_experts, d, f, dtype)
    return x, w13, w2, ids, gates.float()


def whole(inputs, upstream, keep_z=True):
    from moe.kernels.native import experts

    y, z = experts.experts_forward(*inputs)
    return y, *experts.experts_backward(upstream, *inputs, z if keep_z else z.new_empty(0))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_random_shapes_agree_with_the_loops_on_every_level(agree, levels, threads, dtype, tolerance):
    for _ in range(25):
        inputs = some_inputs(dtype)
        upstream = torch.randn(inputs[0].shape).to(dtype)
        exact = [t.double() if t.is_floating_point() else t for t in inputs]
        y, gradients = with_gradients(reference.experts, exact, upstream.double(), (0, 1, 2, 4))
        for level in levels:
            library.use_level(level)
            threads(random.randint(1, 3))
            shapes = f"{level} {[tuple(t.shape) for t in inputs]}"
            found = whole(inputs, upstream, keep_z=random.random() < 0.5)
            for name, actual, right in zip(NAMES, found, (y, *gradients)):
                agree(actual, right, tolerance, f"{name} {shapes}", scale=1.0)


def test_two_threads_with_their_own_experts_disturb_nobody(levels):
    given = [some_inputs(torch.float32, most=60) for _ in range(2)]
    upstream = [torch.randn(inputs[0].shape) for inputs in given]
    alone = [whole(*each) for each in zip(given, upstream)]
    wrong, start = [], threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(60):
            found = whole(given[i], upstream[i])
            wrong.extend(name for name, a, b in zip(NAMES, found, alone[i]) if not torch.equal(a, b))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
