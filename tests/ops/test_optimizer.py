"""The optimizer's pass behind the door: a whole training step by it is a step of torch's AdamW."""

import pytest
import torch

from moe import ops
from moe.config import OptimConfig
from moe.kernels.native import library
from moe.train.optim import adamw, one_pass

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())


def test_one_pass_and_torchs_step_follow_each_other(agree):
    """Five steps in turns against five steps of torch alone, gradients clipped on the way."""
    shapes = [(7, 5), (33,), (2, 3, 4)]
    start = [torch.randn(s) for s in shapes]
    mine, theirs = ([p.clone() for p in start] for _ in range(2))
    config = OptimConfig(lr=0.01, weight_decay=0.1)
    ours, torchs = adamw(mine, config), adamw(theirs, config)
    copies = [p.bfloat16() for p in mine]
    for number in range(5):
        gradients = [torch.randn(s).bfloat16() for s in shapes]
        for p, g in zip(theirs, gradients):
            p.grad = g.float() * 0.5
        torchs.step()
        if number % 2:
            for p, g in zip(mine, gradients):
                p.grad = g.float() * 0.5
            ours.step()
        else:
            one_pass(ours, mine, gradients, copies, 0.5)
            assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, mine))
    for a, e in zip(mine, theirs):
        agree(a, e)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            agree(ours.state[mine[0]][key], torchs.state[theirs[0]][key], what=key)


@pytest.mark.parametrize("changes", [dict(m=torch.zeros(4, 3)), dict(p=torch.ones(3, 4).double()), dict(copy=torch.ones(3, 4))])
def test_what_does_not_fit_is_one_line(changes):
    given = dict(p=torch.ones(3, 4), g=torch.ones(3, 4), m=torch.zeros(3, 4), v=torch.zeros(3, 4), copy=None) | changes
    with pytest.raises(ValueError, match="adamw: .*expected") as caught:
        ops.adamw(*given.values(), 1, 0.1, 0.9, 0.95, 1e-8, 0.0)
    assert "\n" not in str(caught.value)
