"""The routing kernels against loops in float64: choices, ties, groups, gates, counts, masks, gradients."""

import random

import pytest
import torch

from moe.kernels import launch, reference, route
from moe.layers.router import Router
from tests.kernels.guards import guard

F64 = torch.float64
SHAPES = [  # tokens, experts, choices, groups, groups used, affinity
    (37, 256, 8, 8, 4, "sigmoid"), (11, 64, 6, 1, 1, "softmax"), (9, 60, 3, 5, 2, "sigmoid"), (21, 24, 4, 3, 1, "softmax"),
    (3, 1024, 16, 8, 4, "sigmoid"), (2, 1024, 4, 1, 1, "softmax"), (1, 16, 2, 4, 1, "sigmoid"), (4, 12, 12, 3, 3, "sigmoid"),
    (6, 8, 8, 4, 4, "softmax"), (5, 1, 1, 1, 1, "sigmoid"), (10, 6, 3, 6, 3, "softmax"), (10, 6, 2, 6, 4, "sigmoid"),
]  # fmt: skip
BIASES = {
    "none": lambda e: torch.zeros(e),
    "small": lambda e: torch.randn(e) * 0.1,
    "large": lambda e: torch.randn(e) * 5,
    "all negative": lambda e: -3 - torch.rand(e),  # excluded groups scored 0 would win
}


def affinities(logits, scoring):
    return torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, -1)


def margin(s, bias, k, n_group, topk_group, scoring):
    """[N]: how far the closest other choice is from being made, in score. Below fp32's error nobody is right."""
    groups = (s + bias).unflatten(1, (n_group, -1))
    of_group = groups.topk(min(2 if scoring == "sigmoid" else 1, groups.shape[2])).values.sum(-1)
    strength = of_group.sort(-1, True).values
    closed = of_group < strength[:, topk_group - 1 : topk_group]
    best = groups.masked_fill(closed.unsqueeze(2), -float("inf")).flatten(1).sort(-1, True).values[:, : k + 1]
    gaps = [best[:, :-1] - best[:, 1:]]
    if topk_group < n_group:
        gaps.append(strength[:, topk_group - 1 : topk_group] - strength[:, topk_group : topk_group + 1])
    return torch.cat([*gaps, torch.ones(len(s), 1)], 1).amin(1)


def clear_logits(n, e, bias, *rest):
    """Random logits whose choice is the same in float32 and float64."""
    logits = torch.randn(n, e) * 1.5
    while (
        close := margin(affinities(logits.double(), rest[-1]), bias.double(), *rest) < 2e-6 * (1 + bias.abs().max())
    ).any():
        logits[close] = torch.randn(int(close.sum()), e) * 1.5
    return logits


def golden(logits, bias, k, n_group, topk_group, scoring, norm, scaling, mask=None):
    """ids, gates in float64, hist; by loops."""
    e = logits.shape[1]
    s = affinities(logits.double(), scoring)
    ids = reference.route(s, bias.double(), k, n_group, topk_group, 2 if scoring == "sigmoid" else 1)
    gates, hist = [], torch.zeros(-(-len(ids) // 8), e, dtype=torch.int32)
    for n, chosen in enumerate(ids):
        if mask is not None and not mask[n]:
            ids[n], row = [e] * k, [0.0] * k
        else:
            row = [s[n, i].item() for i in chosen]
            total = sum(row) + 1e-20 if norm else 1.0
            row = [g / total * scaling for g in row]
            for i in chosen:
                hist[n // 8, i] += 1
        gates.append(row)
    return torch.tensor(ids), torch.tensor(gates, dtype=F64), hist


def check(agree, logits, bias, *arguments, mask=None):
    ids, gates, hist = route.route(logits, bias, *arguments, mask)
    expected = golden(logits, bias, *arguments, mask)
    assert ids.dtype == torch.int64 and gates.dtype == torch.float32 and hist.dtype == torch.int32
    assert torch.equal(ids, expected[0]) and torch.equal(hist, expected[2])
    agree(gates, expected[1], 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_choices_gates_and_counts_are_those_of_the_loops(agree, shape, monkeypatch):
    n, e, *choice = shape
    guarded = guard(monkeypatch, route)
    for kind in random.sample(sorted(BIASES), 2):
        bias, mask = BIASES[kind](e), random.choice([None, torch.rand(n) < 0.7])
        gate = random.choice([(True, 2.5), (False, 1.0), (False, 16.0)])
        check(agree, clear_logits(n, e, bias, *choice), bias, *choice, *gate, mask=mask)
    guarded.check()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_every_kind_of_gate(agree, scoring, norm, masked):
    e, k, n_group = random.randint(2, 40), random.randint(1, 2), 1
    if e % 3 == 0 and e > 3:
        n_group = 3
    choice = k, n_group, random.randint(1, n_group), scoring
    bias, n = torch.randn(e) * 0.2, random.randint(1, 30)
    mask = torch.rand(n) < 0.6 if masked else None
    check(agree, clear_logits(n, e, bias, *choice), bias, *choice, norm, random.uniform(0.5, 3), mask=mask)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("e, k, n_group, topk_group", [(16, 4, 4, 2), (24, 5, 3, 2), (20, 7, 1, 1), (12, 4, 6, 2)])
def test_on_a_tie_the_lower_id_and_the_lower_group_win(agree, e, k, n_group, topk_group, scoring):
    logits = torch.randint(0, 3, (40, e)).float()
    logits[0] = 1.0
    check(agree, logits, torch.zeros(e), k, n_group, topk_group, scoring, True, 1.0)


def test_the_best_expert_of_a_tie_counts_twice_in_its_group():
    s = torch.tensor([[0.6, 0.6, 0.9, 0.2]])  # sums 1.2 and 1.1; masking the best by value would leave 0.6
    assert route.route(torch.logit(s), torch.zeros(4), 2, 2, 1)[0].tolist() == [[0, 1]]
    assert route.route(torch.logit(s), torch.zeros(4), 2, 2, 1, scoring="softmax")[0].tolist() == [[2, 3]]


@pytest.mark.parametrize("low", [-1e9, -float("inf")])
def test_a_bias_keeps_experts_out_as_long_as_others_are_left(low):
    bias = torch.full((16,), low)
    bias[[2, 7, 11]] = 0
    ids = route.route(torch.randn(9, 16), bias, 3)[0]
    assert ids.sort(-1).values.tolist() == [[2, 7, 11]] * 9
    for e, n_group in ((16, 4), (15, 3)):  # nobody is chosen twice, and nobody beyond the experts
        ids, _, hist = route.route(torch.randn(9, e), bias[:e], 7, n_group, 2)
        assert all(len(set(row)) == 7 and 0 <= min(row) and max(row) < e for row in ids.tolist())
        assert torch.equal(hist.sum(0), torch.bincount(ids.flatten(), minlength=e))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2), (3, 1)])
def test_what_is_no_number_spoils_its_own_token_only(monkeypatch, scoring, n_group, topk_group):
    guarded = guard(monkeypatch, route)
    n, e, k = 20, 12, 3
    logits, bias = torch.randn(n, e), torch.randn(e)
    clean = route.route(logits, bias, k, n_group, topk_group, scoring)
    bad = torch.tensor([1, 2, 3, 8, 19])
    logits[1], logits[2, 5], logits[3, 0] = float("nan"), float("nan"), float("inf")
    logits[8], logits[19, 2:9] = -float("inf"), float("nan")
    ids, gates, hist = route.route(logits, bias, k, n_group, topk_group, scoring)
    dlogits = route.route_backward(torch.randn(n, k), logits, ids, scoring, True, 1.0)
    guarded.check()
    assert all(len(set(row)) == k and 0 <= min(row) and max(row) < e for row in ids.tolist())
    assert torch.equal(hist.sum(0), torch.bincount(ids.flatten(), minlength=e))
    good = torch.ones(n, dtype=torch.bool)
    good[bad] = False
    assert torch.equal(ids[good], clean[0][good]) and torch.equal(gates[good], clean[1][good])
    assert gates[1].isnan().all() and gates[2].isnan().any() and gates[19].isnan().all()  # it is told, not hidden
    assert dlogits[good].isfinite().all()


def test_saturated_affinities_give_finite_gates_and_gradients(agree):
    logits = torch.tensor([[-200.0, -150, -120], [200, 150, 120], [-30, -20, -25], [0, 100, -100]])
    ids, gates, _ = route.route(logits, torch.zeros(3), 2)
    s = torch.sigmoid(logits).gather(1, ids)
    agree(gates, s / (s.sum(-1, keepdim=True) + 1e-20))
    assert route.route_backward(torch.randn(4, 2), logits, ids, "sigmoid", True, 1.0).isfinite().all()


def test_padding_has_no_expert_no_gate_no_count_and_no_gradient():
    logits, mask = torch.randn(19, 10), torch.rand(19) < 0.5
    logits[~mask] = float("nan")
    for scoring in ("sigmoid", "softmax"):
        ids, gates, hist = route.route(logits, torch.zeros(10), 3, scoring=scoring, mask=mask)
        assert ids[~mask].eq(10).all() and gates[~mask].eq(0).all() and hist.sum() == 3 * mask.sum()
        dlogits = route.route_backward(torch.randn(19, 3), logits, ids, scoring, True, 2.0)
        assert dlogits[~mask].eq(0).all() and dlogits.isfinite().all()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n, e, k", [(13, 256, 8), (1, 5, 2), (30, 23, 23), (9, 1024, 16), (3, 1, 1)])
def test_gradients_are_those_of_the_formula(agree, monkeypatch, n, e, k, norm, scoring):
    guarded = guard(monkeypatch, route)
    logits, dgates, scaling = torch.randn(n, e) * 2, torch.randn(n, k), random.uniform(0.5, 3)
    ids = torch.rand(n, e).topk(k).indices
    ids[torch.rand(n, k) < 0.1] = e  # a choice without an expert has no part in the sum
    x = logits.double().requires_grad_()
    gates = affinities(x, scoring).gather(1, ids.clamp_max(e - 1)) * (ids < e)
    if norm:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    expected = torch.autograd.grad(gates * scaling, x, dgates.double())[0]
    dlogits = route.route_backward(dgates, logits, ids, scoring, norm, scaling)
    guarded.check()
    assert dlogits.dtype == torch.float32
    agree(dlogits, expected, 1e-6, scale=scaling * dgates.abs().max().item())  # of one choice left, all cancels
    if scoring == "sigmoid":
        unchosen = torch.ones(n, e + 1, dtype=torch.bool).scatter_(1, ids, False)[:, :e]
        assert dlogits[unchosen].eq(0).all()


def test_views_are_read_as_what_they_show():
    wide = torch.randn(24, 31)
    for logits in (wide[::2, 3:23], torch.randn(20, 12).t(), torch.randn(1, 20).expand(12, 20)):
        bias, mask = torch.randn(41)[1::2], (torch.rand(24) < 0.5)[::2]
        ids, gates, hist = route.route(logits, bias, 4, 4, 2, mask=mask)
        again = route.route(
            logits.clone(memory_format=torch.contiguous_format), bias.clone(), 4, 4, 2, mask=mask.clone()
        )
        assert all(torch.equal(a, e) for a, e in zip((ids, gates, hist), again))
        dgates = torch.randn(12, 1).expand(12, 4)
        dlogits = route.route_backward(dgates, logits, ids, "sigmoid", True, 1.0)
        assert torch.equal(
            dlogits, route.route_backward(dgates.clone(), logits.clone(), ids.clone(), "sigmoid", True, 1.0)
        )


def test_without_tokens_there_is_nothing_and_it_counts_to_zero():
    ids, gates, hist = route.route(torch.empty(0, 8), torch.zeros(8), 2, mask=torch.empty(0, dtype=torch.bool))
    assert ids.shape == gates.shape == (0, 2) and hist.sum(0).tolist() == [0] * 8
    assert route.route_backward(gates, torch.empty(0, 8), ids, "softmax", True, 1.0).shape == (0, 8)


@pytest.mark.parametrize("scoring, norm, scaling", [("sigmoid", True, 2.5), ("softmax", False, 16.0)])
def test_the_kernel_is_the_router(agree, ops_path, scoring, norm, scaling):
    ops_path("torch")
    e, k, n_group, topk_group = 32, 4, 8, 3
    router = Router(e, e, k, n_group, topk_group, scoring, norm, scaling)
    router.weight.data.copy_(torch.eye(e))
    router.bias.copy_(torch.randn(e) * 0.3)
    x = clear_logits(40, e, router.bias, k, n_group, topk_group, scoring).requires_grad_()
    mask = torch.rand(40) < 0.8
    routing = router(x, mask=mask)
    ids, gates, hist = route.route(x.detach(), router.bias, k, n_group, topk_group, scoring, norm, scaling, mask)
    assert torch.equal(ids, routing.experts) and torch.equal(hist.sum(0), routing.counts)
    agree(gates, routing.gates, 1e-6)
    upstream = torch.randn(40, k)
    dlogits = route.route_backward(upstream, x.detach(), ids, scoring, norm, scaling)
    agree(dlogits, torch.autograd.grad(routing.gates, x, upstream)[0], 2e-6, scale=scaling)


def test_a_launch_asks_for_shapes_only():
    def launches(device, n):
        with launch.recording(90) as found:
            logits, mask = torch.empty(n, 64, device=device), torch.empty(n, dtype=torch.bool, device=device)
            ids, gates, _ = route.route(logits, logits[0] if n else logits.new_empty(64), 6, mask=mask)
            route.route_backward(gates, logits, ids, "softmax", True, 1.0)
        return [(f.kernel.__name__, f.grid, [tuple(a.shape) if torch.is_tensor(a) else a for a in f.args], f.options)
                for f in found]  # fmt: skip

    assert launches("meta", 21) == launches("cpu", 21) and len(launches("meta", 21)) == 2
    assert launches("meta", 0) == []


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(logits=torch.zeros(3, 8, dtype=F64)), "float64"),
        (dict(logits=torch.zeros(8)), "N, E"),
        (dict(bias=torch.zeros(7)), "bias (7,)"),
        (dict(bias=torch.zeros(8, dtype=F64)), "float64"),
        (dict(mask=torch.ones(3)), "mask (3,) torch.float32"),
        (dict(mask=torch.ones(4, dtype=torch.bool)), "mask (4,)"),
        (dict(scoring="tanh"), "tanh"),
        (dict(n_group=3), "n_group=3"),
        (dict(n_group=4, topk_group=5), "topk_group=5"),
        (dict(n_group=4, topk_group=1, k=3), "k=3"),
        (dict(k=9), "k=9"),
        (dict(k=0), "k=0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, words):
    arguments = dict(logits=torch.zeros(3, 8), bias=torch.zeros(8), k=2) | change
    with pytest.raises(ValueError) as error:
        route.route(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_gradients_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="dgates"):
        route.route_backward(
            torch.zeros(3, 2), torch.zeros(3, 8), torch.zeros(3, 3, dtype=torch.int64), "sigmoid", True, 1.0
        )
