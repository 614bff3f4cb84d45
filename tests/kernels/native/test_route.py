"""Native choice of experts against loops in float64, by every level: choices, ties, groups, gates, counts, masks and
gradients; and the sequence-wise loss."""

import pytest
import torch

from moe.kernels import reference
from moe.kernels.native import library
from moe.layers.router import Router
from tests.op_cases import with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
native = pytest.importorskip("moe.kernels.native.route")

LEVELS = library.levels() if not library.status() else []
SHAPES = [  # tokens, experts, choices, groups, groups used, affinity
    (37, 256, 8, 8, 4, "sigmoid"), (11, 64, 6, 1, 1, "softmax"), (9, 60, 3, 5, 2, "sigmoid"), (21, 24, 4, 3, 1, "softmax"),
    (3, 1024, 16, 8, 4, "sigmoid"), (3, 40, 30, 1, 1, "softmax"), (2, 300, 20, 1, 1, "sigmoid"), (0, 8, 2, 2, 1, "sigmoid"),
    (1, 16, 2, 4, 1, "sigmoid"), (4, 12, 12, 3, 3, "sigmoid"), (6, 8, 8, 4, 4, "softmax"), (5, 1, 1, 1, 1, "sigmoid"),
    (10, 6, 3, 6, 3, "softmax"), (200, 33, 5, 3, 2, "sigmoid"),
]  # fmt: skip
BIASES = {
    "none": lambda e: torch.zeros(e),
    "small": lambda e: torch.randn(e) * 0.1,
    "all negative": lambda e: -3 - torch.rand(e),  # excluded groups scored 0 would win
}


@pytest.fixture(params=LEVELS)
def level(request):
    library.use_level(request.param)
    yield request.param
    library.use_level("")


def affinities(logits, scoring):
    return torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, -1)


def choices(s, bias, k, groups, kept, scoring):
    chosen = reference.route(s, bias.double(), k, groups, kept, 2 if scoring == "sigmoid" else 1)
    return torch.tensor(chosen, dtype=torch.int64).view(len(s), k)


def gates_of(logits, ids, scoring, norm, scaling):
    """In float64, differentiable; an id outside [0, E) has no part."""
    live = (ids >= 0) & (ids < logits.shape[1])
    s = affinities(logits, scoring).gather(1, torch.where(live, ids, 0)) * live
    return s / (s.sum(-1, keepdim=True) + 1e-20) * scaling if norm else s * scaling


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", BIASES)
def test_choices_gates_and_counts_agree_with_the_loops(agree, level, shape, bias):
    n, e, k, groups, kept, scoring = shape
    logits, bias, norm = torch.randn(n, e) * 1.5, BIASES[bias](e), bool(torch.rand(()) < 0.5)
    mask = torch.rand(n) < 0.7 if torch.rand(()) < 0.5 else torch.ones(n, dtype=torch.bool)
    exact = affinities(logits.double(), scoring)
    right = choices(exact, bias, k, groups, kept, scoring)
    noisy = exact * (1 + 1e-5 * torch.randn(n, e)), bias * (1 + 1e-6 * torch.randn(e))
    sure = (choices(*noisy, k, groups, kept, scoring) == right).all(1)  # elsewhere rounding decides
    assert sure.float().mean() > 0.5 or n < 10

    gates, ids, counts, s = native.route(logits, bias, mask, k, groups, kept, scoring, norm, 2.5, True)
    assert ids.dtype == counts.dtype == torch.int64 and gates.dtype == torch.float32
    assert torch.equal(ids[sure & mask], right[sure & mask])
    assert ids[~mask].eq(e).all() and gates[~mask].eq(0).all()
    assert torch.equal(counts, torch.bincount(ids[mask].flatten(), minlength=e))
    agree(gates, gates_of(logits.double(), ids, scoring, norm, 2.5), 2e-6)
    agree(s, exact, 2e-6)
    alone = native.route(logits, bias, mask, k, groups, kept, scoring, norm, 2.5, False)
    assert all(torch.equal(a, b) for a, b in zip(alone[:3], (gates, ids, counts))) and alone[3].shape == (0, e)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_records_hold_the_order_that_pytorch_would_choose(level, shape):
    n, e, k, groups, kept, scoring = shape
    if e // groups < 2:
        return
    router, logits = Router(e, e, k, groups, kept, scoring, norm_topk_prob=False), torch.randn(n, e)
    router.bias.copy_(torch.randn(e) * 0.1)
    _, ids, _, s = native.route(logits, router.bias, None, k, groups, kept, scoring, False, 1.0, True)
    assert torch.equal(ids, router.choose(s, router.bias))


@pytest.mark.parametrize("values", [1, 3, 40])
def test_the_lower_id_wins_a_tie(level, values):
    """One value: more ties than are ranked one against the other."""
    for e, k, groups, kept in ((256, 8, 8, 4), (256, 8, 1, 1), (70, 5, 7, 3), (24, 4, 6, 3), (9, 9, 1, 1)):
        logits, bias = torch.randint(0, values, (20, e)).float() / values, torch.zeros(e)
        _, ids, _, s = native.route(logits, bias, None, k, groups, kept, "sigmoid", True, 1.0, True)
        assert torch.equal(ids, choices(s.double(), bias, k, groups, kept, "sigmoid"))


@pytest.mark.parametrize(
    "scoring, norm", [("sigmoid", True), ("sigmoid", False), ("softmax", True), ("softmax", False)]
)
@pytest.mark.parametrize("n, e, k", [(9, 24, 4), (5, 37, 3), (70, 256, 8), (1, 2, 2), (0, 8, 2)])
@pytest.mark.parametrize("scored", [True, False])
def test_gradients_agree_with_float64(agree, level, scoring, norm, n, e, k, scored):
    logits, ids = torch.randn(n, e) * 2, torch.rand(n, e).topk(k).indices
    ids[torch.rand(n, k) < 0.2] = e
    dgates, ds = torch.randn(n, k), torch.randn(n, e) if scored else torch.empty(0, e)

    def total(x):
        t = (gates_of(x, ids, scoring, norm, 2.5) * dgates.double()).sum()
        return t + (affinities(x, scoring) * ds.double()).sum() if scored else t

    _, (right,) = with_gradients(total, (logits.double(),), torch.tensor(1.0), (0,))
    agree(native.route_backward(dgates, ds, logits, ids, scoring, norm, 2.5), right, scale=0.3)


def test_a_token_that_was_masked_may_hold_anything(level):
    logits, mask = torch.randn(3, 8), torch.tensor([True, False, True])
    logits[1] = float("nan")
    gates, ids, counts, _ = native.route(logits, torch.zeros(8), mask, 2, 2, 1, "softmax", True, 1.0, False)
    assert ids[1].eq(8).all() and gates[1].eq(0).all() and counts.sum() == 4
    gradient = native.route_backward(torch.ones(3, 2), torch.empty(0, 8), logits, ids, "softmax", True, 1.0)
    assert gradient[1].eq(0).all() and not gradient.isnan().any()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_logit_that_is_no_number_shows(level, scoring):
    logits = torch.randn(2, 24)
    logits[1, 5] = float("nan")
    gates, ids, _, s = native.route(logits, torch.zeros(24), None, 3, 4, 2, scoring, True, 1.0, True)
    assert not gates[0].isnan().any() and gates[1].isnan().all() and s[1, 5].isnan()
    assert ids.min() >= 0 and ids.max() < 24 and (scoring == "softmax" or ids[1, 0] == 5)


def test_saturated_affinities_give_finite_gates_and_gradients(level):
    logits = torch.full((3, 16), -200.0)
    logits[1] = 200
    gates, ids, _, _ = native.route(logits, torch.zeros(16), None, 4, 4, 2, "sigmoid", True, 1.0, False)
    gradient = native.route_backward(torch.randn(3, 4), torch.empty(0, 16), logits, ids, "sigmoid", True, 1.0)
    assert gates.isfinite().all() and gradient.isfinite().all()


# ------------------------------------------------------------------------------------------------- sequence-wise loss


@pytest.mark.parametrize("b, t, e, k", [(1, 1, 2, 1), (2, 9, 24, 4), (3, 5, 37, 3), (1, 90, 16, 2), (2, 3, 300, 20)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_agrees_with_loops_in_value_and_gradient(agree, level, b, t, e, k, masked):
    s = torch.sigmoid(torch.randn(b, t, e))
    mask = (torch.rand(b, t) < 0.6) if masked else None
    right, (gradient,) = with_gradients(
        lambda s: reference.sequence_loss(s, k, mask), (s.double(),), torch.tensor(0.7), (0,)
    )
    loss, *kept = native.sequence_loss(s, mask, k)
    assert loss.shape == () and loss.dtype == torch.float32
    agree(loss, right, scale=0.1)
    agree(native.sequence_loss_backward(torch.tensor(0.7), *kept), gradient, scale=1e-3)


def test_padding_has_no_part_in_the_loss_whatever_it_holds(level):
    s, mask = torch.rand(2, 4, 9), torch.tensor([[True, True, False, False], [False] * 4])
    first = native.sequence_loss(s, mask, 3)
    s[~mask] = float("nan")
    loss, *kept = native.sequence_loss(s, mask, 3)
    assert torch.equal(loss, first[0]) and loss > 0
    gradient = native.sequence_loss_backward(torch.ones(()), *kept)
    assert gradient[mask].isfinite().all() and gradient[~mask].eq(0).all()


def test_any_number_of_threads_gives_the_same_bits(level):
    logits, bias, found = torch.randn(300, 70), torch.randn(70) * 0.1, []
    mask, dgates, upstream = torch.rand(300) < 0.8, torch.randn(300, 5), torch.ones(())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            gates, ids, counts, s = native.route(logits, bias, mask, 5, 7, 3, "sigmoid", True, 1.5, True)
            loss, *kept = native.sequence_loss(s.view(3, 100, 70), mask.view(3, 100), 5)
            ds = native.sequence_loss_backward(upstream, *kept)
            dlogits = native.route_backward(dgates, ds.view(300, 70), logits, ids, "sigmoid", True, 1.5)
            found.append((gates, ids, counts, s, loss, *kept, ds, dlogits))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_what_does_not_fit_is_refused():
    logits, bias = torch.randn(3, 8), torch.zeros(8)
    for wrong in (
        lambda: native.route(logits.double(), bias, None, 2, 2, 1, "sigmoid", True, 1.0, False),
        lambda: native.route(logits, bias[:4], None, 2, 2, 1, "sigmoid", True, 1.0, False),
        lambda: native.route(logits, bias, torch.ones(2, dtype=torch.bool), 2, 2, 1, "sigmoid", True, 1.0, False),
        lambda: native.route(logits, bias, None, 5, 2, 1, "sigmoid", True, 1.0, False),
        lambda: native.route(logits, bias, None, 2, 3, 1, "sigmoid", True, 1.0, False),
        lambda: native.route(logits, bias, None, 2, 2, 1, "tanh", True, 1.0, False),
        lambda: native.route_backward(torch.ones(3, 2), logits, logits, torch.ones(2, 2), "sigmoid", True, 1.0),
        lambda: native.sequence_loss(logits, None, 2),
        lambda: native.sequence_loss(logits.unsqueeze(0), None, 9),
    ):
        with pytest.raises(ValueError):
            wrong()
