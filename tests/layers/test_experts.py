"""Stacked experts as a layer: shapes, rows of w13, start values, gradients of idle experts."""

import pytest
import torch

from moe.kernels import reference
from moe.layers.experts import Experts


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (1,), (2, 1, 2)])
def test_layer_is_the_sum_over_chosen_experts(agree, shape):
    layer = Experts(6, 5, 4).double()
    x = torch.randn(*shape, 6, dtype=torch.float64)
    ids = torch.rand(*shape, 4).topk(2).indices
    gates = torch.rand(*shape, 2, dtype=torch.float64)
    y = layer(x, ids, gates)
    assert y.shape == x.shape
    flat = reference.experts(x.view(-1, 6), layer.w13, layer.w2, ids.view(-1, 2), gates.view(-1, 2))
    agree(y.view(-1, 6), flat)


def test_first_rows_of_w13_are_the_gate(agree):
    layer = Experts(2, 3, 1).double()
    x = torch.randn(1, 2, dtype=torch.float64)
    gate, up = layer.w13[0, :3] @ x[0], layer.w13[0, 3:] @ x[0]
    expected = layer.w2[0] @ (gate / (1 + torch.exp(-gate)) * up)
    agree(layer(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64))[0], expected)


def test_every_weight_has_a_gradient_when_one_expert_takes_all():
    layer = Experts(8, 8, 5)
    layer(torch.randn(7, 8), torch.full((7, 2), 3), torch.ones(7, 2)).sum().backward()
    for weight in (layer.w13, layer.w2):
        used = weight.grad.flatten(1).norm(dim=1) > 0
        assert used.tolist() == [False, False, False, True, False]


def test_start_values_keep_the_size_of_activations():
    layer = Experts(64, 100, 16)
    assert layer.w13.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert layer.w2.std().item() == pytest.approx(1 / 10, rel=0.05)
