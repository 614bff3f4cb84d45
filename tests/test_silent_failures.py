"""Faults that ran unnoticed in public projects, planted here one by one: a test of this suite must fail for each.

`caught(call, plant)` runs the real test of another file twice: as things are, where it passes, and with the fault.
"""

import functools
import importlib.util
import pathlib

import pytest
import torch
import torch.nn.functional as F

import moe
import moe.config.model
import moe.layers.attention
import moe.layers.balance
import moe.layers.router
import moe.model
import moe.objectives.pretraining
from moe.kernels import attention, eager, head
from moe.layers.balance import Counting, LossFree
from moe.layers.cache import LatentCache
from moe.layers.router import Router
from moe.ops import paths

HERE = pathlib.Path(__file__).parent


@functools.cache
def real(file):
    """The test module itself, so that the assertions tried here are the ones that guard the code."""
    spec = importlib.util.spec_from_file_location("planted_" + file.replace("/", "_"), HERE / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def caught(monkeypatch):
    def check(call, plant):
        call()
        with monkeypatch.context() as patch:
            plant(patch)
            with pytest.raises(AssertionError):
                call()

    return check


# -------------------------------------------------------------------------------------------------------------- router


def test_top_1_with_normalised_gates_leaves_the_router_dead(caught, small):
    """A constant gate: only rounding noise reaches the router. Refused by the configuration; here let through."""

    def plant(patch):
        patch.setattr(moe.config.model, "check_routing", lambda *a, **k: None)
        patch.setattr(moe.layers.router, "check_routing", lambda *a, **k: None)

    test = real("test_model").test_the_language_loss_alone_trains_every_router
    k = iter([2, 1])
    caught(lambda: test(small, next(k)), plant)


def test_gates_cut_off_from_the_graph(caught, small):
    forward = Router.forward

    def cut(self, *args, **kwargs):
        routing = forward(self, *args, **kwargs)
        return routing._replace(gates=routing.gates.detach())

    def call():
        try:
            real("test_model").test_the_language_loss_alone_trains_every_router(small, 2)
        except AttributeError as error:  # no gradient at all
            raise AssertionError from error

    caught(call, lambda patch: patch.setattr(Router, "forward", cut))


def regated(change):
    """Router.forward with its gates replaced by change(router, scores, routing)."""
    forward = Router.forward

    def wrong(self, x, mask=None, token_ids=None, replay=None, keep_scores=False):
        routing = forward(self, x, mask, token_ids, replay, True)
        return routing._replace(gates=change(self, routing.scores, routing))

    return wrong


def normalised(self, scores, routing):
    gates = scores.gather(-1, routing.experts)
    return gates / gates.sum(-1, keepdim=True) * self.scaling


@pytest.mark.parametrize(
    "change",
    [
        lambda self, s, r: normalised(self, s + self.bias, r),
        lambda self, s, r: normalised(self, (s.float() + 1e4 - 1e4), r),  # recovered as (s + b) - b
        lambda self, s, r: r.gates / self.scaling,
        lambda self, s, r: s.gather(-1, r.experts) * self.scaling,
    ],
    ids=["biased", "recovered from biased", "never scaled", "scaled instead of normalised"],
)
def test_gates_that_are_not_the_formula(caught, agree, change):
    test = real("layers/test_router").test_gates_are_unbiased_affinities_normalised_then_scaled
    caught(lambda: test(agree, "sigmoid", True, 2.5), lambda patch: patch.setattr(Router, "forward", regated(change)))


def choosing(group_strength, closed=float("-inf")):
    """Router.choose with another group score, or another score for experts of excluded groups."""

    def choose(self, s, bias):
        biased = s + bias
        groups = biased.view(len(s), self.n_group, -1)
        kept = group_strength(groups, s.view_as(groups)).topk(self.topk_group, -1).indices
        open_groups = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, kept, True)
        return groups.masked_fill(~open_groups.unsqueeze(-1), closed).view_as(s).topk(self.k, -1).indices

    return choose


def two_best(groups, _):
    return groups.topk(2, -1).values.sum(-1)


def without_the_best_value(groups, _):
    best = groups.amax(-1, keepdim=True)
    return best.squeeze(-1) + groups.masked_fill(groups == best, float("-inf")).amax(-1)


def golden(bias):
    return lambda: real("layers/test_router").test_choices_are_those_of_the_loops(16, 4, 4, 2, "sigmoid", bias)


@pytest.mark.parametrize(
    "choose, bias",
    [
        (choosing(two_best, closed=0.0), "all negative"),
        (choosing(lambda g, s: g.amax(-1)), "small"),
        (choosing(lambda g, s: s.topk(2, -1).values.sum(-1)), "large"),
        (lambda self, s, bias: s.topk(self.k, -1).indices, "large"),
    ],
    ids=["closed groups score 0", "groups by their best", "groups without bias", "no bias and no groups"],
)
def test_choices_that_are_not_the_papers(caught, choose, bias):
    caught(golden(bias), lambda patch: patch.setattr(Router, "choose", choose))


def test_the_rewritten_choice_itself_is_right(monkeypatch):
    """So that the faults above are the fault named, not a slip of the rewriting."""
    monkeypatch.setattr(Router, "choose", choosing(two_best))
    golden("large")()


def test_a_group_tie_masked_by_value(caught):
    caught(
        real("layers/test_router").test_a_tie_inside_a_group_counts_twice,
        lambda patch: patch.setattr(Router, "choose", choosing(without_the_best_value)),
    )


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_bias_cast_with_the_model_loses_its_small_steps(caught, cast):
    caught(
        lambda: real("layers/test_router").test_no_cast_of_a_model_reaches_the_bias(cast),
        lambda patch: patch.setattr(Router, "_apply", torch.nn.Module._apply),
    )


def test_padding_that_is_routed_and_counted(caught, small):
    forward = Router.forward

    def unmasked(self, x, mask=None, **kwargs):
        return forward(self, x, None, **kwargs)

    for test in (
        real("layers/test_router").test_padding_has_no_expert_no_gate_and_no_count,
        lambda: real("layers/test_balance").test_padding_is_not_counted_main_or_mtp(small),
    ):
        caught(test, lambda patch: patch.setattr(Router, "forward", unmasked))


# ------------------------------------------------------------------------------------------------------- sequence loss


def sequence_loss(whole_batch=False, normalise=True, f_with_bias=False, detached=False):
    def loss(self, s, shape, mask):
        s = s.detach() if detached else s
        rows = s.view(*(shape[:-1] if len(shape) == 3 and not whole_batch else (1, len(s))), -1)
        valid = torch.ones(rows.shape[:2]) if mask is None else mask.view(rows.shape[:2])
        top = self.choose(s.detach(), self.bias) if f_with_bias else s.detach().topk(self.k, -1).indices
        hits = F.one_hot(top, self.n_experts).sum(1).view(rows.shape).to(s.dtype) * valid.unsqueeze(-1)
        length = valid.sum(1, keepdim=True)
        f = hits.sum(1) * self.n_experts / self.k / length
        p = rows / rows.sum(-1, keepdim=True) if normalise else rows
        return (f * ((p * valid.unsqueeze(-1)).sum(1) / length)).sum(-1).mean()

    return loss


def sequence_loss_test(agree):
    return lambda: real(
        "layers/test_router"
    ).test_sequence_loss_averages_rows_skips_padding_and_reaches_the_router_through_shares_only(agree, "sigmoid")


def test_the_rewritten_sequence_loss_itself_is_right(monkeypatch, agree):
    monkeypatch.setattr(Router, "_sequence_loss", sequence_loss())
    sequence_loss_test(agree)()


@pytest.mark.parametrize(
    "fault",
    [dict(whole_batch=True), dict(normalise=False), dict(f_with_bias=True)],
    ids=["over the batch", "raw sigmoid", "routed instead of best experts"],
)
def test_sequence_losses_that_are_not_the_papers(caught, agree, fault):
    caught(sequence_loss_test(agree), lambda patch: patch.setattr(Router, "_sequence_loss", sequence_loss(**fault)))


def test_a_balance_loss_on_detached_scores(caught, agree):
    def call():
        try:
            sequence_loss_test(agree)()
        except RuntimeError as error:  # "does not require grad"
            raise AssertionError from error

    caught(call, lambda patch: patch.setattr(Router, "_sequence_loss", sequence_loss(detached=True)))


def test_balance_loss_that_leaks_into_the_validation_loss(caught, small, agree):
    forward = Router.forward

    def always(self, *args, **kwargs):
        before, self.training = self.training, True
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.training = before

    tokens = torch.randint(0, 37, (6, 10))
    batch = tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    caught(
        lambda: real("objectives/test_pretraining").test_evaluation_has_the_main_loss_alone(small, agree, batch),
        lambda patch: patch.setattr(Router, "forward", always),
    )


# ------------------------------------------------------------------------------------------------------------- balance


def signs():
    for counts, expected in (([[5, 1, 3, 3]], [-1, 1, 0, 0]), ([[1, 1, 1, 2]], [1, 1, 1, -1])):
        real("layers/test_balance").test_bias_moves_one_step_against_the_load(counts, expected)


@pytest.mark.parametrize(
    "update",
    [
        lambda self, state, bias, speed: bias - LossFree_update(self, state, bias, speed) + bias,
        lambda self, state, bias, speed: bias + speed * (state["counts"].double().mean() - state["counts"]).float(),
        lambda self, state, bias, speed: bias + speed * torch.sign(state["counts"].sum() // 4 - state["counts"]),
        lambda self, state, bias, speed: LossFree_update(self, state, bias.bfloat16(), speed).float(),
    ],
    ids=["wrong direction", "proportional", "integer mean", "bf16"],
)
def test_bias_rules_that_are_not_the_papers(caught, update):
    caught(signs, lambda patch: patch.setattr(LossFree, "update", update))


LossFree_update = LossFree.update


def test_a_bias_from_the_last_micro_batch_only(caught, small):
    def plant(patch):
        patch.setattr(Counting, "observe", lambda self, state, routing: {"counts": routing.counts})

    caught(lambda: real("layers/test_balance").test_bias_moves_one_step_against_the_load(
        [[4, 0, 0, 0], [0, 4, 4, 4]], [0, 0, 0, 0]), plant)  # fmt: skip
    caught(lambda: real("layers/test_balance").test_bias_moves_one_step_against_the_load(
        [[3, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 2]], [-1, 1, 1, -1]), plant)  # fmt: skip


def test_a_bias_moved_at_every_micro_batch(caught, small):
    def plant(patch):
        once = moe.update_balance

        def each(model, routings, **options):
            for record in routings if isinstance(routings, list) else [routings]:
                once(model, record, **options)

        patch.setattr(moe, "update_balance", each)

    # counts of one micro-batch nearly always disagree with the sum somewhere among 24 experts of 3 layers
    torch.manual_seed(0)
    caught(lambda: real("layers/test_balance").test_micro_batches_count_as_the_one_big_batch(small), plant)


def test_a_bias_update_that_forgets_the_mtp_router(caught, small):
    every = moe.layers.balance.routers
    caught(
        lambda: real("layers/test_balance").test_update_balance_moves_every_router_by_its_own_counts_mtp_too(small),
        lambda patch: patch.setattr(
            moe.layers.balance, "routers", lambda m: {k: v for k, v in every(m).items() if "mtp" not in k}
        ),
    )


def test_evaluation_that_moves_the_bias(caught, small):
    forward = Router.forward

    def counting(self, *args, **kwargs):
        routing = forward(self, *args, **kwargs)
        with torch.no_grad():
            self.bias += 1e-3 * torch.sign(routing.counts.double().mean() - routing.counts).float()
        return routing

    caught(
        lambda: real("layers/test_balance").test_evaluation_between_steps_changes_nothing(small),
        lambda patch: patch.setattr(Router, "forward", counting),
    )


# ----------------------------------------------------------------------------------------------------------------- mtp


def test_mtp_fed_its_own_target(caught, small):
    """One token further: loss falls to nothing by copying (0.024 in a public project before anybody looked)."""
    ahead = moe.Transformer.look_ahead

    def copying(self, hidden, tokens, *args, **kwargs):
        return ahead(self, hidden, torch.cat((tokens[:, 1:], tokens[:, -1:]), 1), *args, **kwargs)

    caught(
        lambda: real("layers/test_mtp").test_depth_k_reads_up_to_token_i_plus_k_and_no_further(small, 1),
        lambda patch: patch.setattr(moe.Transformer, "look_ahead", copying),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda real, tokens, ahead, segments, mask: real(tokens, ahead - 1, segments, mask)[:, :-1],
        lambda real, tokens, ahead, segments, mask: real(tokens, ahead, None, mask),
        lambda real, tokens, ahead, segments, mask: real(tokens, ahead, segments, None),
    ],
    ids=["the token it was fed", "across documents", "masked tokens too"],
)
def test_mtp_targets_that_are_not_the_papers(caught, small, agree, wrong):
    targets = moe.objectives.pretraining.targets_ahead

    def planted(tokens, ahead, segment_ids=None, mask=None):
        if ahead == 1:
            return targets(tokens, ahead, segment_ids, mask)
        return wrong(targets, tokens, ahead, segment_ids, mask)

    torch.manual_seed(0)  # some masked target in every draw
    caught(
        lambda: real("layers/test_mtp").test_mtp_loss_is_the_papers_in_value_and_every_gradient(small, agree, 1, False),
        lambda patch: patch.setattr(moe.objectives.pretraining, "targets_ahead", planted),
    )


def test_mtp_that_is_built_but_never_trained(caught, small):
    forward = moe.objectives.Pretraining.forward

    def without(self, tokens, segment_ids, mask, divisor, first_row=0, rows=None, mtp_weight=0.0):
        return forward(self, tokens, segment_ids, mask, divisor, first_row, rows)

    caught(
        lambda: real("test_model").test_every_parameter_has_a_gradient_that_is_not_zero(small),
        lambda patch: patch.setattr(moe.objectives.Pretraining, "forward", without),
    )


# ----------------------------------------------------------------------------------------------------------------- ops


def grouped(empty, rows_of):
    """eager.rows_by_rows as a loop, with a fault in the rows it sums or in what idle experts hold."""

    def product(left, right, ends):
        out = empty(left, ends.shape[0], left.shape[1], right.shape[1])
        for e, start, end in eager._groups(ends):
            rows = rows_of(start, end)
            out[e] = left[rows].t() @ right[rows]
        return out

    return product


def expert_test(agree, case="few"):
    return lambda: real("ops/test_grouped").test_experts_agree_with_the_loops_in_value_and_every_gradient(
        agree, case, torch.float64, 11, 5, 2, 9, 7
    )


def zeros(left, *shape):
    return left.new_zeros(*shape)


def test_the_rewritten_weight_gradient_itself_is_right(monkeypatch, agree):
    monkeypatch.setattr(eager, "rows_by_rows", grouped(zeros, slice))
    expert_test(agree)()


def test_expert_weight_gradients_that_miss_a_row_while_outputs_are_perfect(caught, agree):
    """A truncated sort did this for months elsewhere: values and input gradients right, weight gradients 140 % off."""
    caught(
        expert_test(agree),
        lambda patch: patch.setattr(eager, "rows_by_rows", grouped(zeros, lambda a, b: slice(a, max(a + 1, b - 1)))),
    )


def test_weight_gradients_of_idle_experts_that_were_never_written(caught, agree):
    def unwritten(left, *shape):
        return left.new_empty(*shape)

    caught(expert_test(agree), lambda patch: patch.setattr(eager, "rows_by_rows", grouped(unwritten, slice)))


def test_attention_that_lets_documents_see_each_other(caught, agree):
    forward = attention.attention_forward
    caught(
        lambda: real("ops/test_attend").test_attention_longer_than_a_block_agrees_with_whole_scores(agree, True, 129),
        lambda patch: patch.setattr(attention, "attention_forward", lambda q, k, v, s, _: forward(q, k, v, s, None)),
    )


def test_a_head_loss_that_counts_masked_targets(caught, agree):
    forward = head.linear_cross_entropy_forward
    torch.manual_seed(0)
    caught(
        lambda: real("ops/test_head").test_head_loss_agrees_with_cross_entropy_in_value_and_every_gradient(
            agree, torch.float64, 13, 4
        ),
        lambda patch: patch.setattr(
            head, "linear_cross_entropy_forward", lambda h, w, t, *rest: forward(h, w, t.clamp_min(0), *rest)
        ),
    )


# ----------------------------------------------------------------------------------------------------------- attention


def half_layout(x, cos, sin):
    """Llama's rotation: right for its own weights, wrong for DeepSeek's."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def paper_test(agree):
    return lambda: real("layers/test_attention").test_mla_is_the_papers_attention_in_value_and_every_gradient(
        agree, 6, real("layers/test_attention").YARN, 3, False
    )


def test_rotary_halves_instead_of_pairs(caught, agree):
    caught(paper_test(agree), lambda patch: patch.setattr(moe.layers.attention, "rotate", half_layout))


def test_yarn_without_its_factor_on_the_logits(caught):
    class Forgetful(moe.layers.attention.Rotary):
        def __init__(self, *args):
            super().__init__(*args)
            self.softmax_factor = 1.0

    caught(
        real("layers/test_attention").test_softmax_scale_of_v3_with_and_without_yarn,
        lambda patch: patch.setattr(moe.layers.attention, "Rotary", Forgetful),
    )


def test_a_cache_whose_latent_is_not_the_normalised_one(caught, agree):
    store = LatentCache.write

    def raw(self, layer, c_kv, k_rope):
        return store(self, layer, c_kv * 1.1, k_rope)

    caught(
        lambda: real("layers/test_attention").test_absorbed_decoding_equals_the_expanded_form_token_by_token(
            agree, None, None
        ),
        lambda patch: patch.setattr(LatentCache, "write", raw),
    )


def test_a_cache_that_takes_padding_for_tokens(caught, agree):
    advance = LatentCache.advance

    def longest(self, tokens):
        advance(self, tokens if isinstance(tokens, int) else int(tokens.max()))

    caught(
        lambda: real("layers/test_attention").test_ragged_caches_give_each_sequence_its_own_past(agree),
        lambda patch: patch.setattr(LatentCache, "advance", longest),
    )


# --------------------------------------------------------------------------------------------------------------- model


def test_experts_that_stay_zero_after_initialisation(caught, small):
    """62,500 steps went by in a public project, the shared expert learning alone."""
    init = moe.model.init_weights

    def forgetful(model, std):
        init(model, std)
        for name, p in model.named_parameters():
            if ".experts." in name:
                p.data.zero_()

    caught(
        lambda: real("test_model").test_every_parameter_has_a_gradient_that_is_not_zero(small),
        lambda patch: patch.setattr(moe.model, "init_weights", forgetful),
    )


def test_replay_that_is_accepted_and_ignored(caught, small, agree):
    forward = Router.forward

    def deaf(self, x, mask=None, token_ids=None, replay=None, keep_scores=False):
        return forward(self, x, mask, token_ids, None, keep_scores)

    caught(
        lambda: real("test_model").test_recorded_choices_replay_the_whole_model(small, agree),
        lambda patch: patch.setattr(Router, "forward", deaf),
    )


def test_a_path_of_ops_that_is_asked_for_and_not_taken(caught, agree, ops_path):
    def call():
        with pytest.MonkeyPatch.context() as patch:
            real("ops/test_paths").test_reference_path_answers_when_the_environment_asks(ops_path, patch, agree)

    caught(call, lambda patch: patch.setattr(paths, "selected", lambda: "torch"))
