"""Schedules and parameter groups by hand."""

import math

import pytest
import torch

from moe.config import OptimConfig, UserError
from moe.train.optim import adamw, learning_rate


def test_v3_schedule_holds_decays_and_ends_low():
    c = OptimConfig(lr=2.2e-4, schedule="v3", warmup=2000 / 10000, final_lr=0.1)
    rate = lambda progress: learning_rate(c, int(progress * 10000) + 1, 10000)  # noqa: E731
    assert rate(0.05) == pytest.approx(2.2e-4 * 501 / 2000)  # warm-up
    assert rate(0.3) == rate(0.67) == pytest.approx(2.2e-4)  # constant to 10 T of 14.8 T
    middle = (10 + 2.15) / 14.8
    assert rate(middle) == pytest.approx(2.2e-4 * 0.55, rel=1e-3)  # half of the cosine
    assert rate(0.98) == pytest.approx(2.2e-5)
    assert rate(0.995) == pytest.approx(7.3e-6, rel=0.01)  # the last 167 B


def test_cosine_and_constant():
    c = OptimConfig(lr=1.0, schedule="cosine", warmup=0.0, final_lr=0.2)
    assert learning_rate(c, 1, 100) == 1.0
    assert learning_rate(c, 51, 100) == pytest.approx(0.6)
    assert learning_rate(c, 100, 100) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.99)))
    assert learning_rate(OptimConfig(lr=1.0, schedule="constant", warmup=0.1), 5, 100) == 0.5


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match="optim.schedule='cosin'.*did you mean 'cosine'"):
        learning_rate(OptimConfig(schedule="cosin"), 1, 10)


def test_norms_have_no_decay_and_one_step_equals_adamw_by_hand():
    matrix, vector = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4,)))
    before, grads = [p.detach().clone() for p in (matrix, vector)], [torch.randn_like(p) for p in (matrix, vector)]
    c = OptimConfig(lr=0.01, weight_decay=0.5)
    optimizer = adamw([matrix, vector], c)
    for p, g in zip((matrix, vector), grads, strict=True):
        p.grad = g
    optimizer.step()
    for p, old, g, decay in zip((matrix, vector), before, grads, (0.5, 0.0), strict=True):
        want = old * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + c.eps)  # first step: both moments are the gradient's own
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-12)
