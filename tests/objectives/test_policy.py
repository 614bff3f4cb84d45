"""Policy losses: hand-computed cases, plain loops as the reference, exact enumeration, invariance, a bandit."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import UserError
from moe.objectives import LOSSES, group_advantages, live_groups, pass_at_k, policy_loss, token_logprobs
from moe.objectives.policy import CORRECTIONS, KLS

INVARIANT = [name for name in LOSSES if name != "bnpo"]  # bnpo's divisor is the micro-batch's, by definition
NAN, INF = math.nan, math.inf


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def run(logp, *rest, **options):
    """-> loss, its gradient by logp, figures."""
    leaf = logp.detach().clone().requires_grad_()
    loss, figures = policy_loss(leaf, *rest, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, figures


def one_token(ratio, advantage, **options):
    """Loss, gradient and figures of a single token at this ratio."""
    logp = doubles([math.log(ratio) - 1])
    loss, grad, figures = run(logp, doubles([-1.0]), doubles(advantage), torch.ones(1, 1).bool(), **options)
    return loss.item(), grad.item(), figures


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("loss", "value", "first", "second"),
    [
        ("grpo", 0.0, -1 / 4, 1 / 8),
        ("dapo", 1 / 3, -1 / 6, 1 / 6),
        ("bnpo", 1 / 3, -1 / 6, 1 / 6),
        ("dr_grpo", 1 / 8, -1 / 16, 1 / 16),
        ("gspo", 0.0, -1 / 4, 1 / 8),
        ("sapo", 2 / 1.05 / 2 - 1, -1 / 4, 1 / 8),  # the gate's height is 2/tau
    ],
)
def test_lengths_two_and_four_by_hand(agree, loss, value, first, second):
    logp = torch.randn(2, 5, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    got, grad, figures = run(logp, logp, doubles(1.0, -1.0), mask, loss, max_length=8)
    agree(got, doubles(value)[0], scale=1)
    agree(grad, torch.where(mask, doubles([first], [second]), 0))
    assert figures["tokens"] == 6 and figures["sequences"] == 2 and figures["max_ratio"] == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "value", "slope"),
    [
        (1.5, 1.0, {}, -1.28, 0.0),
        (0.5, 1.0, {}, -0.5, -0.5),
        (0.5, -1.0, {}, 0.8, 0.0),
        (1.5, -1.0, {}, 1.5, 1.5),
        (1.5, -1.0, {"dual_clip": 1.4}, 1.4, 0.0),
        (1.5, 1.0, {"dual_clip": 1.4}, -1.28, 0.0),
        (1.3, -1.0, {"dual_clip": 1.4}, 1.3, 1.3),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, options, value, slope):
    for loss in ("grpo", "dapo", "dr_grpo", "bnpo", "gspo"):
        got, grad, figures = one_token(
            ratio, advantage, loss=loss, clip_low=0.2, clip_high=0.28, max_length=1, **options
        )
        assert got == pytest.approx(value, abs=1e-12) and grad == pytest.approx(slope, abs=1e-12), loss
        assert figures["clip_low"] + figures["clip_high"] == (slope == 0), loss


def test_cispo_by_hand():
    got, grad, figures = one_token(1.5, 1.0, loss="cispo", clip_high=0.28)
    assert grad == pytest.approx(-1.28, abs=1e-12)
    assert got == pytest.approx(-1.28 * (math.log(1.5) - 1), abs=1e-12) and figures["clip_high"] == 1
    assert one_token(4.9, 1.0, loss="cispo")[1] == pytest.approx(-4.9, abs=1e-12)
    _, grad, figures = one_token(5.1, -1.0, loss="cispo")
    assert grad == pytest.approx(5.0, abs=1e-12) and figures["clip_high"] == 1
    assert one_token(0.1, -1.0, loss="cispo")[1] == pytest.approx(0.1, abs=1e-12)  # no lower bound


def test_sequence_ratio_by_hand(agree):
    logp, old, mask = doubles([-1.0, -2.0, NAN]), doubles([-1.1, -2.3, 7.0]), torch.tensor([[1, 1, 0]]).bool()
    s = math.exp(0.2)
    for advantage in (1.0, -1.0):
        loss, grad, _ = run(logp, old, doubles(advantage), mask, "gspo", 0.2, 0.28)
        agree(loss, doubles(-advantage * s)[0])
        agree(grad, doubles([-advantage * s / 2, -advantage * s / 2, 0.0]))
    loss, grad, figures = run(logp, old, doubles(1.0), mask, "gspo")  # its own clip is four ten-thousandths
    agree(loss, doubles(-1.0004)[0])
    assert not grad.any() and figures["clip_high"] == 2


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [
        ("k1", -0.5, 1.0),
        ("k2", 0.125, -0.5),
        ("k3", 0.148721270700128, -0.648721270700128),
        ("k1_ratio", -0.5, 0.5),
        ("k3_ratio", 0.148721270700128, -0.5),  # 0.148721 - 0.648721
    ],
)
def test_kl_forms_by_hand(kl, value, slope):
    loss, grad, figures = one_token(1.0, 0.0, logp_ref=doubles([-0.5]), beta=0.1, kl=kl)
    assert loss == pytest.approx(0.1 * value, abs=1e-12) and grad == pytest.approx(0.1 * slope, abs=1e-12)
    assert figures["kl"].item() == pytest.approx(value, abs=1e-12)


def test_kl_is_reported_without_weight():
    loss, grad, figures = one_token(1.0, 0.0, logp_ref=doubles([-0.5]))
    assert loss == 0 and grad == 0 and figures["kl"] > 0.1


def test_clip_takes_effect_beyond_its_border():
    e = 1e-6
    for ratio, advantage, alive in [
        (1.28 - e, 1.0, True), (1.28 + e, 1.0, False), (1.28 + e, -1.0, True),
        (0.8 + e, -1.0, True), (0.8 - e, -1.0, False), (0.8 - e, 1.0, True),
    ]:  # fmt: skip
        for loss in ("grpo", "dapo", "dr_grpo", "bnpo", "gspo"):
            grad, figures = one_token(ratio, advantage, loss=loss, clip_low=0.2, clip_high=0.28, max_length=1)[1:]
            assert grad == pytest.approx(-advantage * ratio if alive else 0.0, abs=1e-12), (loss, ratio, advantage)
            assert figures["clip_high"] == (not alive and advantage > 0), (loss, ratio, advantage)
            assert figures["clip_low"] == (not alive and advantage < 0), (loss, ratio, advantage)
        for loss in ("cispo", "sapo"):
            assert one_token(ratio, advantage, loss=loss)[1] * advantage < -0.5, "these never stop a token"


def test_losses_own_clips():
    for loss, low, high in [("grpo", 0.2, 0.2), ("dapo", 0.2, 0.28), ("dr_grpo", 0.2, 0.2), ("gspo", 3e-4, 4e-4)]:
        assert one_token(3.0, 1.0, loss=loss, max_length=1)[0] == pytest.approx(-1 - high, abs=1e-12)
        assert one_token(0.3, -1.0, loss=loss, max_length=1)[0] == pytest.approx(1 - low, abs=1e-12)


# ------------------------------------------------------------------------------------- against loops, written by hand


def slope_and_loss(loss, r, lp, a, low, high, dual):
    """Loss of one token at ratio r, and its derivative by the log of that ratio (cispo: by lp)."""
    if loss == "cispo":
        return -min(r, 1 + high) * a * lp, -min(r, 1 + high) * a
    if loss == "sapo":
        tau = 1.0 if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * r * a
    if a >= 0:
        return (-(1 + high) * a, 0.0) if r > 1 + high else (-r * a, -r * a)
    if r < 1 - low:
        return -(1 - low) * a, 0.0
    return (-dual * a, 0.0) if r > dual else (-r * a, -r * a)


def kl_and_slope(kl, lp, ref, r):
    d = ref - lp
    value, slope = {"k1": (-d, 1.0), "k2": (d * d / 2, -d), "k3": (math.exp(d) - d - 1, 1 - math.exp(d))}[kl[:2]]
    return (r * value, r * value + r * slope) if kl.endswith("ratio") else (value, slope)


def weight_of(correction, gaps, at, bounds):
    low, high = bounds or {"token_tis": (0, 2), "token_mis": (0.5, 2), "seq_mis": (0, 3)}.get(correction, (0, INF))
    w = math.exp(sum(gaps) if correction == "seq_mis" else gaps[at])
    if correction == "off":
        return 1.0
    if correction in ("token_tis", "detached"):
        return min(max(w, low), high)
    return w if low <= w <= high else 0.0


def looped(case, loss, kl, correction, beta, low, high, dual, bounds, max_length):
    """-> loss and gradient, one token at a time, in Python numbers."""
    logp, old, rollout, ref = (case[k].tolist() for k in ("logp", "logp_old", "logp_rollout", "logp_ref"))
    places = [[t for t, on in enumerate(row) if on] for row in case["mask"].tolist()]
    n, m = sum(1 for p in places if p), sum(len(p) for p in places)
    value, grad = 0.0, [[0.0] * len(row) for row in logp]
    for i, (a, at) in enumerate(zip(case["advantages"].tolist(), places)):
        share = {"grpo": n * len(at), "gspo": n * len(at), "sapo": n * len(at), "dr_grpo": n * max_length}.get(loss, m)
        gaps = [old[i][t] - rollout[i][t] for t in at]
        whole = sum(logp[i][t] - old[i][t] for t in at) / max(len(at), 1)
        for j, t in enumerate(at):
            own = math.exp(logp[i][t] - old[i][t])
            r = math.exp(whole) if loss == "gspo" else own
            w = weight_of(correction, gaps, j, bounds) / share
            each, slope = slope_and_loss(loss, r, logp[i][t], a, low, high, dual)
            penalty, pull = kl_and_slope(kl, logp[i][t], ref[i][t], own)
            value += w * (each + beta * penalty)
            grad[i][t] += w * beta * pull
            for u in at if loss == "gspo" else [t]:
                grad[i][u] += w * slope / (len(at) if loss == "gspo" else 1)
    return doubles(value)[0], doubles(*grad)


@pytest.fixture
def case():
    """case(S, T): random tensors of a minibatch; garbage outside the mask, one sequence without tokens, one full."""

    def make(s=5, t=6):
        logp = -3 * torch.rand(s, t, dtype=torch.float64)
        near = {k: logp + 0.5 * torch.randn_like(logp) for k in ("logp_old", "logp_ref")}
        made = {"logp": logp, **near, "logp_rollout": near["logp_old"] + 0.5 * torch.randn_like(logp)}
        mask = torch.rand(s, t) < 0.6
        mask[0], mask[-1] = False, True
        for key, x in made.items():
            garbage = torch.tensor([NAN, INF, -INF, 1e30, 0.0], dtype=torch.float64)[torch.randint(0, 5, x.shape)]
            made[key] = torch.where(mask, x, garbage)
        return {**made, "advantages": torch.randn(s, dtype=torch.float64), "mask": mask}

    return make


@pytest.mark.parametrize("loss", LOSSES)
def test_every_combination_equals_the_loops(agree, case, loss):
    rule = LOSSES[loss]
    for correction, kl in itertools.product(CORRECTIONS, KLS):
        given = case()
        low, high = (None if own is None else torch.rand(()).item() / 2 for own in (rule.clip_low, rule.clip_high))
        dual = 1.6 if loss not in ("cispo", "sapo") and torch.rand(()) < 0.5 else None
        bounds = (0.7, 1.5) if torch.rand(()) < 0.5 else None
        got, grad, _ = run(
            **given, loss=loss, kl=kl, correction=correction, beta=0.3, clip_low=low, clip_high=high, dual_clip=dual,
            correction_bounds=bounds, max_length=9,
        )  # fmt: skip
        expected = looped(given, loss, kl, correction, 0.3, low, high, dual or INF, bounds, 9)
        agree(got, expected[0], what=f"{correction} {kl}", scale=0.1)
        agree(grad, expected[1], what=f"gradient {correction} {kl}", scale=0.1)


def test_figures_equal_counts_by_hand(case):
    given = case(7, 9)
    mask, lp, old, sampler, ref = (given[k] for k in ("mask", "logp", "logp_old", "logp_rollout", "logp_ref"))
    figures = policy_loss(**given, loss="dapo", correction="token_mis")[1]
    r, gap, w = (lp - old)[mask].exp(), (lp - sampler)[mask], (old - sampler)[mask].exp()
    a = given["advantages"].unsqueeze(1).expand_as(mask)[mask]
    used = [x for x in w.tolist() if 0.5 <= x <= 2]
    expected = {
        "tokens": mask.sum(), "sequences": 7 - 1 - sum(not row.any() for row in mask[1:]), "max_ratio": r.max(),
        "clip_low": sum(x < 0.8 and y < 0 for x, y in zip(r, a)),
        "clip_high": sum(x > 1.28 and y > 0 for x, y in zip(r, a)),
        "kl": sum(math.exp(x - y) * (math.exp(z - x) - (z - x) - 1) for x, y, z in zip(lp[mask], old[mask], ref[mask])),
        "mismatch": sum(abs(x) for x in gap.tolist()), "mismatch_k3": sum(math.exp(x) - x - 1 for x in gap.tolist()),
        "max_mismatch": max(abs(x) for x in gap.tolist()), "weights": sum(used), "rejected": len(w) - len(used),
        "weights_squared": sum(x * x for x in used),
    }  # fmt: skip
    assert figures.keys() == expected.keys()
    for key, value in expected.items():
        assert figures[key].shape == () and not figures[key].requires_grad
        assert float(figures[key]) == pytest.approx(float(value), abs=1e-10), key
    assert policy_loss(lp, old, given["advantages"], mask)[1].keys() == {
        "tokens", "sequences", "max_ratio", "clip_low", "clip_high",
    }  # fmt: skip


def test_equal_policies_have_no_mismatch_and_full_weights(case):
    given = case()
    given["logp"] = given["logp_rollout"] = given["logp_old"]
    for correction in ("token_tis", "token_mis", "seq_mis", "detached"):
        figures = policy_loss(**given, correction=correction)[1]
        assert figures["mismatch"] == figures["mismatch_k3"] == figures["max_mismatch"] == figures["rejected"] == 0
        assert figures["weights"] == figures["weights_squared"] == figures["tokens"] > 0


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("kl", KLS)
def test_expected_kl_and_its_gradient_by_enumeration(kl):
    """Every outcome of a five-way categorical, weighed by its probability."""
    logits, ref = (
        torch.randn(5, dtype=torch.float64).requires_grad_(),
        torch.randn(5, dtype=torch.float64).log_softmax(0),
    )
    logp = logits.log_softmax(0)
    p, one = logp.detach().exp(), torch.ones(1, 1).bool()
    estimate, value = torch.zeros((), dtype=torch.float64), 0.0
    for x in range(5):
        lp, lf = logp[x].view(1, 1), ref[x].view(1, 1)
        loss, figures = policy_loss(lp, lp.detach(), doubles(0.0), one, logp_ref=lf, beta=1.0, kl=kl)
        estimate, value = estimate + p[x] * loss, value + p[x] * figures["kl"]
    (grad,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    forward = (logp.exp() * (logp - ref)).sum()  # KL(policy || ref)
    (right,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (other,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)
    expected = {"k1": torch.zeros_like(right), "k3": other}.get(kl, right)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert (abs(value - forward.detach()) < 1e-12) == (kl != "k2"), "k2 alone is another quantity"


def test_surrogates_share_one_gradient_on_policy(agree, case):
    given = case()
    logp, mask, a = given["logp"], given["mask"], given["advantages"]
    tokens, sequences = mask.sum().double(), mask.any(1).sum().double()
    by_token, by_sequence = 1 / tokens, 1 / (sequences * mask.sum(1, keepdim=True).clamp_min(1))
    for loss in LOSSES:
        share = {"dr_grpo": 1 / (sequences * 9)}.get(
            loss, by_sequence if loss in ("grpo", "gspo", "sapo") else by_token
        )
        grad = run(logp, logp, a, mask, loss, max_length=9)[1]
        agree(grad, torch.where(mask, -a.unsqueeze(1) * share, 0), what=loss)


@pytest.mark.parametrize("loss", INVARIANT)
def test_cuts_padding_and_order_change_nothing(agree, case, loss):
    given = case(7, 6)
    totals = {"total_tokens": float(given["mask"].sum()), "total_sequences": given["mask"].any(1).sum()}
    options = dict(loss=loss, beta=0.2, correction="seq_mis", max_length=9)
    whole, grad, figures = run(**given, **options)
    order = torch.randperm(7)
    wide = {
        k: torch.cat([x, torch.full_like(x, 0 if k == "mask" else NAN)[:, :4]], 1)
        for k, x in given.items()
        if x.ndim == 2
    }
    for name, batch, rows in [
        ("cut", given, torch.arange(7)), ("shuffled", given, order), ("padded", given | wide, torch.arange(7))
    ]:  # fmt: skip
        pieces = [run(**{k: x[at] for k, x in batch.items()}, **options, **totals) for at in rows.split([1, 4, 2])]
        agree(sum(p[0] for p in pieces), whole, what=name, scale=0.1)
        again = torch.empty_like(pieces[0][1]).new_zeros(7, batch["mask"].shape[1])
        again[rows] = torch.cat([p[1] for p in pieces])
        agree(again[:, :6], grad, what=name)
        assert not again[:, 6:].any()
        for key, value in figures.items():
            parts = torch.stack([p[2][key].double() for p in pieces])
            joined = parts.amax() if key.startswith("max_") else parts.sum()
            agree(joined, value.double(), what=f"{name} {key}", tolerance=1e-10)


def test_bnpo_divides_by_its_own_tokens_whatever_the_totals(case):
    given = case()
    assert run(**given, loss="bnpo", total_tokens=1e6)[0] == run(**given, loss="bnpo")[0] == run(**given, loss="dapo",
           clip_high=0.2)[0]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_learn_is_exactly_zero(case, loss):
    given = case()
    dead = dict(loss=loss, max_length=9, correction="token_tis")
    nothing = {k: x for k, x in given.items() if k != "mask"} | {"mask": torch.zeros_like(given["mask"])}
    empty = {k: x[:0] for k, x in given.items()}
    short = {k: x[:, :0] if x.ndim == 2 else x for k, x in given.items()}
    flat = given | {"advantages": torch.zeros(5, dtype=torch.float64)}
    for options, batch in [({"beta": 0.1}, nothing), ({"beta": 0.1}, empty), ({"beta": 0.1}, short), ({}, flat)]:
        value, grad, figures = run(**batch, **dead, **options)
        assert value == 0 and not grad.any() and grad.shape == batch["logp"].shape
        assert all(x.isfinite() for x in figures.values()) and figures["clip_low"] == figures["clip_high"] == 0
    value, grad, _ = run(**(nothing | {"advantages": torch.full((5,), NAN, dtype=torch.float64)}), **dead)
    assert value == 0 and not grad.any()


def test_one_sequence_of_one_token(agree):
    for loss in LOSSES:
        grad = run(doubles([-2.0]), doubles([-2.0]), doubles(1.5), torch.ones(1, 1).bool(), loss, max_length=1)[1]
        agree(grad, doubles([-1.5]), what=loss)


def test_enormous_ratios_stay_finite():
    """fp32, log-ratios of a hundred either way, weights and KL included."""
    far = torch.tensor([[-200.0, 0.0, -100.0, -1.0]])
    one, mask = torch.ones(1), torch.ones(1, 4).bool()
    for loss, kl, correction, sign in itertools.product(LOSSES, KLS, CORRECTIONS, (1, -1)):
        value, grad, figures = run(
            far, far.flip(1), sign * one, mask, loss, logp_rollout=far.roll(1, 1), logp_ref=far.roll(2, 1), beta=0.1,
            max_length=4, kl=kl, correction=correction,
        )  # fmt: skip
        assert value.isfinite() and grad.isfinite().all() and all(x.isfinite() for x in figures.values())


def test_only_the_current_policy_has_a_gradient(case):
    given = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in case().items()}
    for loss, correction in itertools.product(LOSSES, CORRECTIONS):
        value, _ = policy_loss(**given, loss=loss, correction=correction, beta=0.1, max_length=9)
        others = [x for k, x in given.items() if k not in ("logp", "mask")]
        assert all(g is None for g in torch.autograd.grad(value, others, allow_unused=True))


def test_wrong_calls_are_told():
    x, a, mask = torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3).bool()
    for options, told in [
        (dict(loss="dapoo"), r"grpo.loss='dapoo' .* did you mean 'dapo'\?"),
        (dict(kl="k4"), "grpo.kl='k4'"),
        (dict(correction="tis"), "grpo.correction='tis'"),
        (dict(loss="dr_grpo"), "give max_length"),
        (dict(correction="token_tis"), "give logp_rollout"),
        (dict(beta=0.1), "give logp_ref"),
        (dict(beta=-0.1), "beta=-0.1 must be at least 0"),
        (dict(loss="dr_grpo", max_length=0), "max_length=0 must be at least 1"),
        (dict(clip_low=-0.2), "grpo.clip_low=-0.2 must be above 0"),
        (dict(loss="cispo", clip_low=0.2), "grpo.clip_low=0.2: .* no such clip"),
        (dict(loss="sapo", clip_high=0.2), "grpo.clip_high=0.2: .* no such clip"),
        (dict(dual_clip=1.28), "dual_clip=1.28"),
        (dict(loss="cispo", dual_clip=9.0), "dual_clip=9.0"),
        (dict(logp_ref=torch.zeros(2, 4)), r"logp_ref \(2, 4\)"),
    ]:
        with pytest.raises(UserError, match=told):
            policy_loss(x, x, a, mask, **options)
    for wrong in ((x, x[:1], a, mask), (x, x, a[:1], mask), (x, x, a.view(2, 1), mask), (x, x, a, mask[:, :1])):
        with pytest.raises(UserError, match=r"must all be \[S, T\]"):
            policy_loss(*wrong)


# ---------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    assert group_advantages(doubles([1, 0, 0, 1]))[0].tolist() == pytest.approx(
        [0.86588, -0.86588, -0.86588, 0.86588], abs=1e-5
    )
    one = group_advantages(doubles([1] + [0] * 7))[0].tolist()
    assert one == pytest.approx([2.4742] + [-0.35345] * 7, abs=1e-4)
    assert group_advantages(doubles([1, 0, 0, 1]), "none")[0].tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("how", ["group", "batch", "none"])
def test_advantages_equal_the_formula(agree, how):
    rewards = torch.randn(4, 5, dtype=torch.float64)
    by = {"group": rewards.std(1, keepdim=True) + 0.01, "batch": rewards.std() + 0.01, "none": 1}[how]
    found = group_advantages(rewards, how, std_epsilon=0.01)
    agree(found, (rewards - rewards.mean(1, keepdim=True)) / by)
    assert found.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("how", ["group", "batch", "none"])
def test_unscored_answers_stay_out_of_the_baseline(agree, how):
    whole, holes = torch.randn(2, 4, dtype=torch.float64), torch.full((2, 3), NAN, dtype=torch.float64)
    found = group_advantages(torch.cat([whole, holes], 1)[:, [0, 5, 1, 4, 2, 6, 3]], how)
    agree(found[:, [0, 2, 4, 6]], group_advantages(whole, how))
    assert not found[:, [1, 3, 5]].any()


def test_groups_without_a_signal():
    rewards = torch.tensor([[0.1] * 3, [NAN] * 3, [NAN, 5.0, NAN], [2.0, NAN, 2.0], [0.0, 1.0, NAN], [1.0, 0.0, 0.0]])
    assert live_groups(rewards).tolist() == [False] * 4 + [True] * 2
    for dtype, how in itertools.product((torch.float32, torch.float64), ("group", "batch", "none")):
        found = group_advantages(rewards.to(dtype), how)
        assert found.dtype == dtype and found.isfinite().all() and not found[:4].any() and found[4:].any(1).all()
    for how in ("group", "batch", "none"):
        assert not group_advantages(torch.rand(100, 1).expand(100, 7), how).any(), "means of equal numbers round"
    assert not group_advantages(torch.ones(3, 1)).any() and not live_groups(torch.ones(3, 1)).any()
    assert group_advantages(torch.ones(0, 4)).shape == (0, 4) and live_groups(torch.ones(0, 4)).shape == (0,)
    assert group_advantages(torch.tensor([[1, 0]]), "none").tolist() == [[0.5, -0.5]]


def test_bad_rewards_are_told():
    with pytest.raises(UserError, match="1 of 4 rewards are infinite"):
        group_advantages(torch.tensor([[0.0, INF], [1.0, 2.0]]))
    with pytest.raises(UserError, match="grpo.advantage='std'"):
        group_advantages(torch.ones(1, 2), "std")


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(agree):
    n = 6
    for k in range(1, n + 1):
        expected = []
        for c in range(n + 1):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            expected.append(sum(any(s) for s in subsets) / len(subsets))
        agree(pass_at_k(n, torch.arange(n + 1), k), doubles(*expected))
    agree(pass_at_k(torch.tensor([4, 9]), torch.tensor([[1], [2]]), 2), doubles([1 / 2, 2 / 9], [5 / 6, 5 / 12]))
    assert pass_at_k(500, 3, 500) == 1 and pass_at_k(500, 0, 500) == 0
    for wrong in ((4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(UserError, match="pass_at_k"):
            pass_at_k(*wrong)


# --------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_log_probabilities_equal_the_whole_softmax(agree, chunk):
    hidden, head = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(13, 4, dtype=torch.float64)
    targets, weights = torch.randint(0, 13, (2, 5)), torch.randn(2, 5, dtype=torch.float64)
    exact = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    every = (exact[0] @ exact[1].t() / 0.7).log_softmax(-1)
    expected = torch.stack([every[b, t, targets[b, t]] for b in range(2) for t in range(5)]).view(2, 5)
    slopes = torch.autograd.grad((expected * weights).sum(), exact)
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, head)]
        logp, entropy = token_logprobs(*leaves, targets, 0.7, chunk)
        agree(logp, expected)
        agree(entropy, -(every.exp() * every).sum(-1))
        assert logp.dtype == entropy.dtype == dtype and not entropy.requires_grad
        for found, slope in zip(torch.autograd.grad((logp * weights.to(dtype)).sum(), leaves), slopes, strict=True):
            agree(found, slope)
        logits = (hidden @ head.t()).to(dtype).requires_grad_()
        again = token_logprobs(logits, None, targets, 0.7, chunk)
        agree(again[0], expected)
        agree(again[1], entropy)
        (found,) = torch.autograd.grad((again[0] * weights.to(dtype)).sum(), logits)
        agree(found @ head.to(dtype), slopes[0])


def test_half_precision_is_scored_in_fp32(agree):
    hidden, head, targets = torch.randn(6, 8).bfloat16(), torch.randn(9, 8).bfloat16(), torch.randint(0, 9, (6,))
    logp, entropy = token_logprobs(hidden.requires_grad_(), head.requires_grad_(), targets)
    assert logp.dtype == entropy.dtype == torch.float32
    agree(logp, token_logprobs(hidden.double(), head.double(), targets)[0])
    grads = torch.autograd.grad(logp.sum(), [hidden, head])
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2 and all(g.any() for g in grads)


def test_impossible_tokens_and_no_tokens():
    logits = torch.tensor([[0.0, -INF, 0.0]], requires_grad=True)
    logp, entropy = token_logprobs(logits, None, torch.tensor([2]))
    logp.sum().backward()
    assert logp.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))
    assert logits.grad.tolist() == [[-0.5, 0.0, 0.5]]
    hidden, head = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    logp, entropy = token_logprobs(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert hidden.grad.shape == (0, 4) and not head.grad.any()


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation returns, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_logits_of_all_tokens_never_exist():
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    targets = torch.randint(0, 100, (64,))
    for chunk, most in [(800, 800), (10**6, 6400)]:
        with Largest() as seen:
            token_logprobs(hidden, head, targets, chunk=chunk)[0].sum().backward()
        assert seen.numel == most, "the second case shows that the first can fail"


def test_logits_are_not_kept_for_the_backward_pass():
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    for chunk, few in [(800, True), (10**6, False)]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            token_logprobs(hidden, head, torch.zeros(64, dtype=torch.int64), chunk=chunk)
        assert (sum(kept) < 6400) == few


# ------------------------------------------------------------------------------------------------------------ learning


def trained_bandit(sign, loss, steps=50):
    """Probability of the best of four arms after `steps` groups of 16 pulls, two updates each."""
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(steps):
        arms = torch.multinomial(logits.detach().softmax(0), 64, replacement=True)
        advantages = group_advantages(sign * (arms == 2).float().view(4, 16)).view(-1)
        old = token_logprobs(logits.detach().expand(64, 1, 4), None, arms.view(64, 1))[0]
        for _ in range(2):
            logp = token_logprobs(logits.expand(64, 1, 4), None, arms.view(64, 1))[0]
            value, _ = policy_loss(logp, old, advantages, torch.ones(64, 1).bool(), loss, max_length=1)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return logits.detach().softmax(0)[2].item()


@pytest.mark.parametrize("loss", LOSSES)
def test_bandit_learns_the_better_arm(loss):
    assert trained_bandit(1, loss) > 0.95


def test_flipped_rewards_unlearn_it():
    assert trained_bandit(-1, "dapo") < 0.05
