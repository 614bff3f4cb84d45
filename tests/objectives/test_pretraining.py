"""The losses: targets by hand, masks and borders, and accumulation that equals the one big batch."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import moe
from moe.config import UserError
from moe.model import Transformer
from moe.objectives import OBJECTIVES, Pretraining, count_targets, cross_entropy_sum, targets_ahead

TOKENS = torch.tensor([[10, 11, 12, 13, 14, 15]])


def test_targets_are_the_tokens_so_many_places_later():
    assert targets_ahead(TOKENS, 1).tolist() == [[11, 12, 13, 14, 15]]
    assert targets_ahead(TOKENS, 3).tolist() == [[13, 14, 15]]


def test_targets_in_another_document_are_none():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2]])
    assert targets_ahead(TOKENS, 1, segments).tolist() == [[11, 12, -1, 14, -1]]
    assert targets_ahead(TOKENS, 2, segments).tolist() == [[12, -1, -1, -1]]


def test_masked_tokens_are_no_targets_but_still_inputs():
    mask = torch.tensor([[0, 0, 1, 1, 0, 1]], dtype=torch.bool)
    assert targets_ahead(TOKENS, 1, None, mask).tolist() == [[-1, 12, 13, -1, 15]]
    assert targets_ahead(TOKENS, 2, None, mask).tolist() == [[12, 13, -1, 15]]
    assert count_targets(TOKENS, None, mask) == 3
    assert count_targets(TOKENS, torch.tensor([[0, 0, 0, 1, 1, 1]]), mask) == 2
    assert TOKENS.tolist() == [[10, 11, 12, 13, 14, 15]]  # nothing written into the inputs


def test_cross_entropy_is_a_sum_in_nats(agree):
    hidden, head = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.tensor([[1, -1, 8], [0, 2, -1]])
    expected = F.cross_entropy((hidden @ head.t()).view(-1, 9), targets.view(-1), ignore_index=-1, reduction="sum")
    agree(cross_entropy_sum(hidden, head, targets), expected)


@pytest.fixture
def batch():
    """Rows with unequal numbers of targets, two documents in some."""
    tokens = torch.randint(0, 37, (6, 10))
    segments = torch.sort(torch.randint(0, 2, (6, 10)), -1).values
    mask = torch.arange(10) < torch.tensor([[10], [3], [10], [5], [2], [8]])
    return tokens, segments, mask


def gradients_of(model, objective, pieces, divisor, rows, **options):
    model.zero_grad()
    outs, first = [], 0
    for piece in pieces:
        out = objective(*piece, divisor, first_row=first, rows=rows, **options)
        out.loss.backward()
        first += len(piece[0])
        outs.append(out)
    return outs, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_main_loss_is_the_mean_over_all_targets(small, agree, batch):
    model = moe.Transformer(small(seq_aux_alpha=0.0)).double()
    tokens, segments, mask = batch
    divisor = count_targets(*batch).item()
    out = Pretraining(model)(*batch, divisor)
    logits = model(tokens[:, :-1], segments[:, :-1]).logits
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(6):
        for i in range(9):
            if mask[b, i + 1] and segments[b, i] == segments[b, i + 1]:
                total -= logits[b, i].log_softmax(-1)[tokens[b, i + 1]]
                count += 1
    assert out.sums["tokens"] == count == divisor
    agree(out.sums["loss"], total)
    agree(out.loss, total / count)


@pytest.mark.parametrize("pieces", [[1, 2, 3], [1] * 6])
@pytest.mark.parametrize("mtp_rows", [1.0, 0.3])
def test_micro_batches_add_up_to_the_one_big_batch(small, agree, batch, pieces, mtp_rows):
    model = moe.Transformer(small(seq_aux_alpha=0.3, mtp_rows=mtp_rows)).double()
    objective, divisor = Pretraining(model), count_targets(*batch).item()
    (whole,), expected = gradients_of(model, objective, [batch], divisor, 6, mtp_weight=0.4)
    split = list(zip(*(x.split(pieces) for x in batch)))
    parts, gradients = gradients_of(model, objective, split, divisor, 6, mtp_weight=0.4)
    agree(sum(p.loss.detach() for p in parts), whole.loss)
    for name, value in whole.sums.items():
        assert value.requires_grad is False
        total = sum(p.sums[name] for p in parts)
        agree(total, value, what=name) if value.is_floating_point() else None
        assert value.is_floating_point() or total == value
    for name, g in expected.items():
        agree(gradients[name], g, what=name)
    for name, state in whole.balance.items():
        assert torch.equal(sum(p.balance[name]["counts"] for p in parts), state["counts"])
    # the mean of the parts' means is another number: unequal rows would be weighted wrongly
    wrong = sum(p.sums["loss"] / p.sums["tokens"].clamp_min(1) for p in parts) / len(parts)
    assert (wrong - whole.sums["loss"] / divisor).abs() > 1e-6


def test_loss_is_the_sum_of_its_named_parts(small, agree, batch):
    model = moe.Transformer(small(num_nextn_predict_layers=2, seq_aux_alpha=0.2)).double()
    out = Pretraining(model)(*batch, 20.0, rows=6, mtp_weight=0.3)
    s = out.sums
    agree(out.loss, s["loss"] / 20 + 0.3 * s["mtp"] / 2 / 20 + s["balance"])
    tokens, segments, _ = batch
    routings = model(tokens[:, :-1], segments[:, :-1]).routings
    agree(s["balance"], sum(r.losses["seq_aux"] for r in routings.values()))
    assert set(out.balance) == set(out.health) == set(routings)


def test_evaluation_has_the_main_loss_alone(small, agree, batch):
    model = moe.Transformer(small()).double()
    objective = Pretraining(model)
    train = objective(*batch, 7.0, mtp_weight=0.3)
    val = objective.eval()(*batch, 7.0, mtp_weight=0.3)
    assert set(val.sums) == {"loss", "tokens"}
    agree(val.sums["loss"], train.sums["loss"])
    agree(val.loss, val.sums["loss"] / 7)


def test_mtp_on_a_share_of_rows_is_scaled_up_and_right_on_average(small, agree, batch):
    torch.manual_seed(0)
    full = moe.Transformer(small(seq_aux_alpha=0.0)).double()
    part = moe.Transformer(small(seq_aux_alpha=0.0, mtp_rows=1 / 3)).double()
    part.load_state_dict(full.state_dict())
    whole = Pretraining(full)(*batch, 9.0, mtp_weight=0.3)
    turns = [Pretraining(part)(*(x.roll(i, 0) for x in batch), 9.0, mtp_weight=0.3) for i in range(3)]
    first = Pretraining(full)(*(x[[2, 5]] for x in batch), 9.0, mtp_weight=0.3)  # every third row
    agree(turns[0].sums["mtp"], first.sums["mtp"])
    assert turns[0].sums["mtp_tokens"] == first.sums["mtp_tokens"] < whole.sums["mtp_tokens"]
    agree(turns[0].loss, whole.sums["loss"] / 9 + 0.3 * 3 * first.sums["mtp"] / 9)
    agree(sum(t.loss for t in turns) / 3, whole.loss)
    (sum(t.loss for t in turns) / 3).backward()
    whole.loss.backward()
    for (name, p), q in zip(full.named_parameters(), part.parameters()):
        agree(q.grad, p.grad, what=name)


def test_mtp_weight_zero_computes_no_mtp(small, batch):
    model = moe.Transformer(small())
    out = Pretraining(model)(*batch, 7.0, mtp_weight=0.0)
    assert "mtp" not in out.sums and "mtp.0" not in out.balance


def test_a_batch_without_targets_has_a_finite_loss_and_gradient(small):
    model = moe.Transformer(small())
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    out = Pretraining(model)(torch.randint(0, 37, (2, 6)), None, nothing, 5.0, mtp_weight=1.0)
    out.loss.backward()
    assert out.sums["loss"] == 0 and out.sums["tokens"] == 0 and out.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_is_a_pure_function(small, agree, batch):
    model = moe.Transformer(small()).double()
    copies = [x.clone() for x in batch]
    first, again = (Pretraining(model)(*batch, 9.0, mtp_weight=0.3).loss for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(batch, copies))


def test_an_unknown_balance_rule_is_named(small):
    with pytest.raises(UserError, match="model.balance='bais' is not one of .*did you mean 'bias'"):
        Pretraining(moe.Transformer(small()), "bais")


def test_balance_statistics_carry_no_graph(small, batch):
    out = Pretraining(moe.Transformer(small()))(*batch, 9.0, mtp_weight=0.3)
    for state in (*out.balance.values(), *out.health.values()):
        assert all(not v.requires_grad for v in state.values())
    assert OBJECTIVES["pretrain"] is Pretraining and "tokens" in inspect.signature(Pretraining.forward).parameters


def test_fine_tuning_neither_routes_nor_learns_from_padding(small, agree):
    """Two samples in one padded row against each alone: same gradients, MTP included; padding is not counted."""
    model = Transformer(small(seq_aux_alpha=0.0)).double()
    objective = OBJECTIVES["sft"](model)
    a, b = torch.randint(0, 37, (7,)), torch.randint(0, 37, (5,))
    row = torch.cat([a, b, torch.randint(0, 37, (6,))]).unsqueeze(0)
    segments = torch.tensor([[0] * 7 + [1] * 5 + [-1] * 6], dtype=torch.int32)
    mask = torch.tensor([[i in (4, 5, 6, 10, 11) for i in range(18)]])
    targets = float(count_targets(row, segments, mask))
    assert targets == 5
    packed = objective(row, segments, mask, targets, mtp_weight=0.3)
    packed.loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for sample, answers in ((a, (4, 5, 6)), (b, (3, 4))):
        own = torch.tensor([[i in answers for i in range(len(sample))]])
        objective(sample.unsqueeze(0), None, own, targets, mtp_weight=0.3).loss.backward()
    for name, p in model.named_parameters():
        agree(p.grad, expected[name], 1e-9, name, scale=1e-6)
    for name in ("layers.1", "layers.2"):
        assert int(packed.balance[name]["counts"].sum()) == 12 * model.config.num_experts_per_tok
