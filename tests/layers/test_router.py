"""Which experts are chosen and how they are weighed: golden choices, gates, masks, replay, bias, sequence loss."""

import copy

import pytest
import torch

from moe.config import UserError
from moe.kernels import reference
from moe.layers.router import Router

F64 = torch.float64


def make(n_experts=16, k=4, n_group=4, topk_group=2, bias=None, **options):
    """A router that hands its input on as logits: x [..., E]."""
    router = Router(n_experts, n_experts, k, n_group, topk_group, **options).double()
    router.weight.data.copy_(torch.eye(n_experts))
    if bias is not None:
        router.bias.copy_(bias)
    return router


def logits_of(scores):
    """[..., E] wanted sigmoid affinities -> logits."""
    return torch.logit(torch.as_tensor(scores, dtype=F64))


def affinities(x, scoring_func):
    return torch.sigmoid(x) if scoring_func == "sigmoid" else torch.softmax(x, -1)


BIASES = {
    "none": lambda e: torch.zeros(e),
    "small": lambda e: torch.randn(e) * 0.1,
    "large": lambda e: torch.randn(e) * 5,
    "all negative": lambda e: -3 - torch.rand(e),  # excluded groups scored 0 instead of -inf would win
    "all positive": lambda e: 2 + torch.rand(e),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "n_experts, k, n_group, topk_group", [(16, 4, 1, 1), (16, 4, 4, 2), (16, 5, 8, 3), (15, 3, 5, 1), (12, 12, 3, 3)]
)
def test_choices_are_those_of_the_loops(n_experts, k, n_group, topk_group, scoring_func, bias):
    router = make(n_experts, k, n_group, topk_group, BIASES[bias](n_experts), scoring_func=scoring_func)
    x = torch.randn(40, n_experts, dtype=F64) * 2
    golden = reference.route(
        affinities(x, scoring_func), router.bias.double(), k, n_group, topk_group, 2 if scoring_func == "sigmoid" else 1
    )
    assert router(x).experts.tolist() == golden


def test_two_hand_made_choices():
    # groups {0,1} {2,3} {4,5} of sums 1.0, 1.2, 1.1, one may be used: the second, although 4 is the best expert
    x = logits_of([[0.5, 0.5, 0.6, 0.6, 0.9, 0.2]])
    assert set(make(6, 2, 3, 1)(x).experts[0].tolist()) == {2, 3}
    # bias lifts group 2 by 0.2; the gates stay those of 0.9 and 0.2
    routing = make(6, 2, 3, 1, bias=torch.tensor([0, 0, 0, 0, 0.1, 0.1]))(x)
    assert routing.experts.tolist() == [[4, 5]]
    assert routing.gates[0].tolist() == pytest.approx([0.9 / 1.1, 0.2 / 1.1], rel=1e-12)
    # V2 scores a group by its best expert alone: softmax keeps the order of logits, so group 2 wins without a bias
    routing = make(6, 2, 3, 1, scoring_func="softmax", norm_topk_prob=False)(x)
    assert routing.experts.tolist() == [[4, 5]]


def test_a_tie_inside_a_group_counts_twice():
    # group sums: {0.6, 0.6} = 1.2 beats {0.9, 0.2} = 1.1; masking the best by value would leave 0.6
    assert set(make(4, 2, 2, 1)(logits_of([[0.6, 0.6, 0.9, 0.2]])).experts[0].tolist()) == {0, 1}


def test_ties_choose_equally_good_experts_once_each():
    x = torch.randint(0, 3, (60, 16)).to(F64)
    router = make(16, 4, 4, 2)
    s = torch.sigmoid(x)
    for row, ids, golden in zip(s, router(x).experts, reference.route(s, torch.zeros(16), 4, 4, 2)):
        groups = row.view(4, 4).topk(2).values.sum(-1)
        used = {e // 4 for e in ids.tolist()}
        assert len(set(ids.tolist())) == 4 and len(used) <= 2
        assert groups[list(used)].min() >= groups.topk(2).values[-1] - 1e-12
        if groups.topk(3).values[1] > groups.topk(3).values[2]:  # the groups are clear, only experts tie
            assert sorted(row[ids].tolist()) == sorted(row[golden].tolist())


@pytest.mark.parametrize(
    "scoring_func, norm, scaling", [("sigmoid", True, 2.5), ("sigmoid", False, 1.0), ("softmax", False, 16.0)]
)
def test_gates_are_unbiased_affinities_normalised_then_scaled(agree, scoring_func, norm, scaling):
    router = make(
        bias=torch.randn(16), scoring_func=scoring_func, norm_topk_prob=norm, routed_scaling_factor=scaling
    )  # fmt: skip
    x = torch.randn(9, 16, dtype=F64, requires_grad=True)
    routing = router(x)
    s = affinities(x, scoring_func).gather(1, routing.experts)
    expected = (s / s.sum(-1, keepdim=True) if norm else s) * scaling
    agree(routing.gates, expected)
    if norm:
        agree(routing.gates.sum(-1), torch.full((9,), scaling, dtype=F64))
    upstream = torch.randn_like(expected)
    agree(torch.autograd.grad(routing.gates, x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0])


def test_router_weight_gets_the_gradient_of_its_gates(agree):
    router = Router(5, 8, 3, 4, 2).double()
    x = torch.randn(7, 5, dtype=F64, requires_grad=True)
    routing = router(x)
    w = router.weight.detach().clone().requires_grad_()
    s = torch.sigmoid(x @ w.t()).gather(1, routing.experts)
    upstream = torch.randn(7, 3, dtype=F64)
    expected = torch.autograd.grad(s / s.sum(-1, keepdim=True), (x, w), upstream)
    for a, e in zip(torch.autograd.grad(routing.gates, (x, router.weight), upstream), expected):
        agree(a, e)


def test_a_bias_that_keeps_the_choice_keeps_every_gate_bit():
    x = torch.randn(30, 16, dtype=F64)
    router = make()
    plain = router(x)
    router.bias.fill_(0.75)
    shifted = router(x)
    assert torch.equal(plain.experts, shifted.experts) and torch.equal(plain.gates, shifted.gates)


def test_bias_decides_who_is_chosen():
    x = torch.randn(30, 16, dtype=F64)
    bias = torch.zeros(16)
    bias[5], bias[9] = -9, 9
    ids = make(bias=bias)(x).experts
    assert (ids == 9).any(1).all() and not (ids == 5).any()


def test_padding_has_no_expert_no_gate_and_no_count():
    router = make(routed_scaling_factor=2.5)
    x = torch.randn(2, 6, 16, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    masked, full = router(x, mask=mask), router(x)
    assert masked.experts[~mask].eq(16).all() and masked.gates[~mask].eq(0).all()
    assert torch.equal(masked.experts[mask], full.experts[mask]) and torch.equal(masked.gates[mask], full.gates[mask])
    assert torch.equal(masked.counts, torch.bincount(full.experts[mask].flatten(), minlength=16))
    assert masked.stats["tokens"] == mask.sum()
    nothing = router(x, mask=torch.zeros_like(mask))
    assert nothing.counts.eq(0).all() and nothing.gates.eq(0).all() and nothing.losses == {}


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (2, 0), (2, 3, 4)])
def test_leading_dimensions_are_kept_and_counts_are_exact(shape):
    routing = make()(torch.randn(*shape, 16, dtype=F64), keep_scores=True)
    assert routing.experts.shape == routing.gates.shape == (*shape, 4) and routing.scores.shape == (*shape, 16)
    assert routing.experts.dtype == routing.counts.dtype == torch.int64
    assert torch.equal(routing.counts, torch.bincount(routing.experts.flatten(), minlength=16))


def test_scores_are_kept_only_when_asked(agree):
    x = torch.randn(3, 16, dtype=F64)
    assert make()(x).scores is None
    agree(make()(x, keep_scores=True).scores, torch.sigmoid(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_affinities_are_computed_in_fp32_for_half_precision_tokens(agree, dtype):
    router = Router(8, 16, 4, 4, 2).to(dtype)
    x = torch.randn(20, 8).to(dtype)
    routing = router(x, keep_scores=True)
    assert routing.gates.dtype == routing.scores.dtype == torch.float32
    agree(routing.scores, torch.sigmoid(x.double() @ router.weight.double().t()), 1e-6)


# -------------------------------------------------------------------------------------------------------------- replay


def test_replay_uses_recorded_choices_with_todays_gates_and_trains_the_router(agree):
    router = make(bias=torch.randn(16), routed_scaling_factor=2.5)
    x = torch.randn(2, 5, 16, dtype=F64)
    recorded = torch.rand(2, 5, 16).topk(4).indices
    routing = router(x, replay=recorded)
    s = torch.sigmoid(x).gather(-1, recorded)
    assert torch.equal(routing.experts, recorded)
    agree(routing.gates, s / s.sum(-1, keepdim=True) * 2.5)
    assert torch.equal(routing.counts, torch.bincount(recorded.flatten(), minlength=16))
    routing.gates.square().sum().backward()
    assert router.weight.grad.abs().max() > 0


def test_replaying_ones_own_choices_changes_nothing():
    router = make(bias=torch.randn(16))
    x = torch.randn(2, 5, 16, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    first = router(x, mask=mask)
    for again in (router(x, replay=first.experts), router(x, mask=mask, replay=first.experts)):
        assert torch.equal(first.experts, again.experts) and torch.equal(first.gates, again.gates)
        assert torch.equal(first.counts, again.counts)


def test_a_replayed_id_outside_the_experts_has_no_gate_and_no_part_in_the_sum(agree):
    router = make()
    x = torch.randn(1, 16, dtype=F64)
    routing = router(x, replay=torch.tensor([[3, 16, 7, -1]]))
    s = torch.sigmoid(x[0, [3, 7]])
    agree(routing.gates[0, [0, 2]], s / s.sum())
    assert routing.gates[0, [1, 3]].eq(0).all() and routing.counts.sum() == 2


# ---------------------------------------------------------------------------------------------------------------- bias


def test_bias_is_a_saved_buffer_that_no_optimizer_sees():
    router = make()
    assert "bias" in router.state_dict() and [n for n, _ in router.named_parameters()] == ["weight"]
    assert router.bias.dtype == torch.float32 and not router.bias.requires_grad
    routing = router(torch.randn(6, 16, dtype=F64))
    assert routing.gates.requires_grad and not router.bias.requires_grad


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_no_cast_of_a_model_reaches_the_bias(cast):
    parent = torch.nn.ModuleDict({"router": Router(4, 16, 4)})
    steps = torch.randn(16) + 1e-3 * torch.arange(16)  # bf16 would round the steps away
    parent["router"].bias.copy_(steps)
    parent = getattr(parent, cast)()
    assert parent["router"].weight.dtype != torch.float32 or cast == "float"
    assert parent["router"].bias.dtype == torch.float32 and torch.equal(parent["router"].bias, steps)
    parent = copy.deepcopy(parent.to(torch.float16).to("cpu").float())
    assert torch.equal(parent["router"].bias, steps) and "bias" in dict(parent["router"].named_buffers())
    other = Router(4, 16, 4).to(torch.bfloat16)
    other.load_state_dict(parent["router"].state_dict())
    assert torch.equal(other.bias, steps)


def test_bias_survives_the_meta_device_in_fp32():
    with torch.device("meta"):
        router = Router(4, 16, 4)
    assert router.to(torch.bfloat16).bias.dtype == torch.float32
    filled = router.to_empty(device="cpu")
    assert filled.bias.dtype == torch.float32 and filled.bias.device.type == "cpu"


# ------------------------------------------------------------------------------------------------------ sequence loss


TOKENS = [[0.8, 0.4, 0.2, 0.6], [0.5, 0.1, 0.1, 0.3]]  # shares .4 .2 .1 .3 and .5 .1 .1 .3; best two: 0 and 3, twice


def test_sequence_loss_by_hand():
    # f = 4/(2*2) * [2, 0, 0, 2], P = [.45, .15, .1, .3] -> 2*.45 + 2*.3
    x = logits_of(TOKENS)
    assert make(4, 2, 1, 1, seq_aux_alpha=0.1)(x).losses["seq_aux"].item() == pytest.approx(0.15, rel=1e-12)
    # bias and group limit choose otherwise, but f counts the plain best
    other = make(4, 2, 2, 1, bias=torch.tensor([-9.0, 5, 5, -9]), seq_aux_alpha=0.1)(x)
    assert set(other.experts[0].tolist()) != {0, 3}
    assert other.losses["seq_aux"].item() == pytest.approx(0.15, rel=1e-12)


def test_perfect_balance_costs_exactly_alpha():
    x = logits_of([[0.8, 0.4, 0.2, 0.6], [0.1, 0.5, 0.3, 0.1]])  # every expert once among the best two
    assert make(4, 2, 1, 1, seq_aux_alpha=0.3)(x).losses["seq_aux"].item() == pytest.approx(0.3, rel=1e-12)


def by_equations_17_to_20(s, k):
    """One sequence [T, E]; s carries the gradient, f does not."""
    time, n_experts = s.shape
    f = torch.zeros(n_experts, dtype=s.dtype)
    for row in s.detach():
        for e in sorted(range(n_experts), key=lambda e: -row[e])[:k]:
            f[e] += n_experts / (k * time)
    p = (s / s.sum(-1, keepdim=True)).sum(0) / time
    return (f * p).sum()


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_sequence_loss_averages_rows_skips_padding_and_reaches_the_router_through_shares_only(agree, scoring_func):
    router = make(16, 4, 4, 2, torch.randn(16), scoring_func=scoring_func, seq_aux_alpha=0.2)
    x = torch.randn(3, 7, 16, dtype=F64, requires_grad=True)
    lengths = [7, 4, 1]
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    s = affinities(x, scoring_func)
    for valid, rows in ((None, [7, 7, 7]), (mask, lengths)):
        expected = 0.2 * sum(by_equations_17_to_20(s[i, :n], 4) for i, n in enumerate(rows)) / 3
        actual = router(x, mask=valid).losses["seq_aux"]
        agree(actual, expected)
        agree(torch.autograd.grad(actual, x)[0], torch.autograd.grad(expected, x, retain_graph=True)[0])


def test_tokens_without_rows_are_one_sequence(agree):
    router = make(seq_aux_alpha=1.0)
    x = torch.randn(6, 16, dtype=F64)
    agree(router(x).losses["seq_aux"], by_equations_17_to_20(torch.sigmoid(x), 4))
    agree(router(x.view(1, 6, 16)).losses["seq_aux"], router(x).losses["seq_aux"])


def test_no_loss_in_evaluation_nor_without_alpha():
    x = torch.randn(2, 3, 16, dtype=F64)
    assert make(seq_aux_alpha=0.1).eval()(x).losses == {} and make()(x).losses == {}
    assert make().eval()(x).stats == {}


def test_health_sums_count_margin_and_choices_the_bias_left_alone(agree):
    x = torch.randn(2, 5, 16, dtype=F64)
    best = torch.sigmoid(x).topk(2).values
    stats = make()(x).stats
    assert stats["tokens"] == 10 and stats["kept"] == 40
    agree(stats["margin"], (best[..., 0] - best[..., 1]).sum(), 1e-6)
    pushed = torch.zeros(16)
    pushed[3] = 9
    routing = make(bias=pushed)(x)
    own = make()(x).experts
    assert routing.stats["kept"] == sum(len(set(a) & set(b)) for a, b in zip(
        routing.experts.view(10, 4).tolist(), own.view(10, 4).tolist()))  # fmt: skip
    assert all(not v.requires_grad for v in stats.values())


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(num_experts_per_tok=1), ["num_experts_per_tok=1", "norm_topk_prob", "no gradient"]),
        (dict(n_group=3), ["n_group=3", "n_routed_experts=8", "[1, 2, 4, 8]"]),
        (dict(n_group=2, topk_group=3), ["topk_group=3", "n_group=2"]),
        (dict(n_group=4, topk_group=1, num_experts_per_tok=3), ["num_experts_per_tok=3", "2 experts"]),
        (dict(n_group=8, topk_group=4), ["n_group=8", "two best"]),
        (dict(scoring_func="tanh"), ["scoring_func='tanh'", "sigmoid"]),
    ],
)
def test_routers_that_cannot_work_are_refused(arguments, words):
    with pytest.raises(UserError) as error:
        Router(**{**dict(hidden_size=4, n_routed_experts=8, num_experts_per_tok=2), **arguments})
    assert all(word in str(error.value) for word in words), error.value


def test_one_expert_a_token_works_without_normalisation():
    router = make(8, 1, 1, 1, norm_topk_prob=False)
    router(torch.randn(5, 8, dtype=F64)).gates.sum().backward()
    assert router.weight.grad.abs().max() > 0


# --------------------------------------------------------------------------------------------------------- batch loss


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape, hidden", [((4, 6), 3), ((1, 5), 1), ((7, 1), 2), ((3, 5), 0), ((9,), 4)])
def test_batch_loss_takes_all_real_tokens_as_one_sequence(agree, scoring_func, shape, hidden):
    router = make(16, 4, 1, 1, scoring_func=scoring_func, batch_aux_alpha=0.4)
    x = torch.randn(*shape, 16, dtype=F64, requires_grad=True)
    mask = torch.ones(x[..., 0].numel(), dtype=torch.bool)
    mask[torch.randperm(len(mask))[:hidden]] = False
    expected = 0.4 * by_equations_17_to_20(affinities(x, scoring_func).reshape(-1, 16)[mask], 4)
    actual = router(x, mask=mask.view(shape) if hidden else None).losses["batch_aux"]
    agree(actual, expected)
    agree(torch.autograd.grad(actual, x)[0], torch.autograd.grad(expected, x)[0])


def test_batch_loss_lets_a_sequence_be_uneven_and_the_sequence_loss_does_not():
    x = logits_of([[[0.9, 0.9, 0.1, 0.1]] * 3, [[0.1, 0.1, 0.9, 0.9]] * 3])  # together in balance, alone not
    losses = make(4, 2, 1, 1, seq_aux_alpha=1.0, batch_aux_alpha=1.0)(x).losses
    assert losses["batch_aux"].item() == pytest.approx(1.0, rel=1e-12)
    assert losses["seq_aux"].item() == pytest.approx(1.8, rel=1e-12)


def test_batch_loss_belongs_to_the_rule_aux(small):
    for balance, alpha in (("aux", 0.02), ("bias", 0.0), ("none", 0.0)):
        router = Router.from_config(small(balance=balance, aux_alpha=0.02, seq_aux_alpha=0.0))
        assert router.batch_aux_alpha == alpha
        losses = router(torch.randn(2, 5, 24)).losses
        assert set(losses) == ({"batch_aux"} if alpha else set())
        assert router.eval()(torch.randn(2, 5, 24)).losses == {}
