"""The DeepSeekMoE feed-forward in float64: routed plus shared, every gradient, padding, replay, foreign routers."""

import pytest
import torch
import torch.nn.functional as F

from moe import MoE, Routing
from moe.config import UserError
from moe.kernels import reference

F64 = torch.float64


def make(**options):
    return MoE(6, 5, 8, 3, **{**dict(n_group=4, topk_group=2, routed_scaling_factor=2.5), **options}).double()


def by_loops(layer, x):
    """x [N, D]: gates from the formula, experts and shared expert one token at a time."""
    s = torch.sigmoid(x @ layer.router.weight.t())
    ids = torch.tensor(reference.route(s.detach(), layer.router.bias.double(), 3, 4, 2)).view(-1, 3)
    gates = s.gather(1, ids)
    gates = gates / gates.sum(1, keepdim=True) * 2.5
    y = reference.experts(x, layer.experts.w13, layer.experts.w2, ids, gates)
    if layer.shared is not None:
        gate, up = (x @ layer.shared.w13.weight.t()).chunk(2, -1)
        y = y + (F.silu(gate) * up) @ layer.shared.w2.weight.t()
    return y


@pytest.mark.parametrize("n_shared", [0, 1, 2])
@pytest.mark.parametrize("hot", [False, True])
def test_moe_is_routed_plus_shared_in_value_and_every_gradient(agree, n_shared, hot):
    layer = make(n_shared_experts=n_shared)
    layer.router.bias.normal_(0, 0.2)
    if hot:
        layer.router.bias[5] += 9
    x = torch.randn(11, 6, dtype=F64, requires_grad=True)
    y, routing = layer(x)
    expected = by_loops(layer, x)
    agree(y, expected)
    assert not hot or routing.counts[5] == 11
    inputs, upstream = [x, *layer.parameters()], torch.randn_like(y)
    for name, a, e in zip(
        ["x", *dict(layer.named_parameters())],
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream),
    ):  # fmt: skip
        agree(a, e, what=name)


def test_shared_experts_are_one_wide_expert():
    assert make(n_shared_experts=2).shared.w13.weight.shape == (2 * 2 * 5, 6)
    assert make(n_shared_experts=0).shared is None


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0), (2, 2, 2)])
def test_output_has_the_shape_of_the_input(shape, agree):
    layer = make()
    x = torch.randn(*shape, 6, dtype=F64)
    y, routing = layer(x)
    assert y.shape == x.shape and routing.experts.shape == (*shape, 3)
    agree(y.reshape(-1, 6), layer(x.reshape(-1, 6))[0])


def test_tokens_do_not_see_each_other(agree):
    layer = make()
    x = torch.randn(9, 6, dtype=F64)
    order = torch.randperm(9)
    agree(layer(x[order])[0], layer(x)[0][order])
    agree(layer(x[4:5])[0], layer(x)[0][4:5])


def test_padding_meets_the_shared_expert_only(agree):
    layer = make()
    x = torch.randn(2, 4, 6, dtype=F64)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    y, routing = layer(x, mask=mask)
    agree(y[~mask], layer.shared(x[~mask]))
    agree(y[mask], layer(x)[0][mask])
    assert routing.counts.sum() == 9


def test_recorded_choices_are_replayed(agree):
    layer = make()
    x = torch.randn(2, 4, 6, dtype=F64)
    y, routing = layer(x)
    layer.router.bias.normal_(0, 5)
    agree(layer(x, replay=routing.experts)[0], y)
    assert not torch.equal(layer(x)[1].experts, routing.experts)


def test_a_router_of_ones_own_takes_the_place(agree):
    class ByToken(torch.nn.Module):
        def forward(self, x, mask=None, token_ids=None, replay=None, keep_scores=False):
            ids = (token_ids % 8).unsqueeze(-1)
            return Routing(
                ids, torch.ones(ids.shape, dtype=x.dtype), torch.bincount(ids.flatten(), minlength=8), {}, {}
            )

    layer = MoE(6, 5, 8, 1, n_shared_experts=0, router=ByToken()).double()
    x, tokens = torch.randn(7, 6, dtype=F64), torch.arange(7) + 3
    expected = reference.experts(
        x, layer.experts.w13, layer.experts.w2, (tokens % 8).unsqueeze(1), torch.ones(7, 1, dtype=F64)
    )
    agree(layer(x, token_ids=tokens)[0], expected)


def test_sequence_loss_takes_each_row_as_a_sequence(agree):
    layer = make(seq_aux_alpha=1.0)
    x = torch.randn(3, 5, 6, dtype=F64)
    each = torch.stack([layer(row)[1].losses["seq_aux"] for row in x])
    agree(layer(x)[1].losses["seq_aux"], each.mean())


def test_an_unknown_router_is_named(small):
    with pytest.raises(UserError, match="model.router='topkk' is not one of .*did you mean 'topk'"):
        MoE.from_config(small(router="topkk"))
