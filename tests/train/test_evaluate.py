"""Held-out load: what is counted, what is not, over any number of passes and ranks; the bias stays where it is."""

import numpy as np
import pytest
import torch

from moe import Transformer
from moe.analysis.diagnostics import maxvio_floor
from moe.data.packing import Rows, evaluation
from moe.objectives import Pretraining
from moe.parallel import Ranks
from moe.train.evaluate import Score, evaluate

ALONE = Ranks(0, 1, torch.device("cpu"))


class Stream:
    """A store of one document after another."""

    def __init__(self, lengths, vocab):
        self.tokens = np.random.default_rng().integers(1, vocab, sum(lengths)).astype(np.uint16)
        self.offsets = np.cumsum([0, *lengths])


@pytest.fixture
def objective(small):
    model = Transformer(small())
    for _, buffer in model.named_buffers():
        if buffer.shape == (8,):
            buffer.normal_(0, 0.3)  # router biases
    return Pretraining(model).train()


def held_out(lengths=(40, 33, 2, 19), seq_len=11, vocab=37):
    rows = Rows(Stream(lengths, vocab), seq_len, pad=0)
    return evaluation(rows, np.ones(vocab, dtype=np.int64))


def test_counts_are_those_of_every_real_input_once(objective):
    whole = held_out()
    batch = whole.rows.rows(whole.indices)
    assert not batch.mask.all()  # the last row has padding
    model = objective.model.eval()
    want = {name: torch.zeros(8, dtype=torch.int64) for name in ("layers.1", "layers.2")}
    for tokens, segments, mask in zip(*batch):
        _, routings = model.encode(tokens[None, :-1], segments[None, :-1])
        for name, routing in routings.items():
            for expert in routing.experts[0][mask[:-1]].flatten():
                want[name][expert] += 1
    objective.train()
    for rows in (1, 3, 100):
        score = evaluate(objective, whole, rows, ALONE)
        assert score.counts == {name: load.tolist() for name, load in want.items()}  # MTP is no part of it
        assert score.k == 3 and all(sum(load) == 3 * int(batch.mask[:, :-1].sum()) for load in score.counts.values())
    assert objective.training


def test_ranks_together_count_as_one_alone(objective):
    whole = held_out()
    alone = evaluate(objective, whole, 2, ALONE)
    parts = []

    class Part(Ranks):
        def all_reduce(self, tensors):
            parts.append([t.clone() for t in tensors])

    for rank in range(4):  # 9 rows: three ranks get one of padding alone
        with pytest.raises(AssertionError):  # `evaluate` misses the targets of the others
            evaluate(objective, whole, 2, Part(rank, 4, ALONE.device))
    sums = [torch.stack(column).sum(0) for column in zip(*parts)]
    assert [t.tolist() for t in sums[1:]] == list(alone.counts.values())
    assert sums[0][0].item() / sums[0][1].item() == pytest.approx(alone.loss, rel=1e-5)


def test_no_bias_and_no_hook_is_left_changed(objective):
    before = {k: v.clone() for k, v in objective.model.state_dict().items()}
    evaluate(objective, held_out(), 4, ALONE)
    assert all(torch.equal(v, before[k]) for k, v in objective.model.state_dict().items())
    assert not any(module._forward_hooks for module in objective.model.modules())


def test_a_dense_model_has_a_loss_and_no_load(small):
    score = evaluate(Pretraining(Transformer(small(n_routed_experts=0))), held_out(), 4, ALONE)
    assert score.counts == {} and set(score.record()) == {"val/loss", "val/bpb"}


def test_the_record_by_hand():
    score = Score(2.0, 1.0, {"layers.1": [4, 2, 0, 2], "layers.2": [2, 2, 2, 2], "layers.9": [0, 0, 0, 0]}, 2)
    record = score.record()
    assert record == {
        "val/loss": 2.0, "val/bpb": 1.0, "val/maxvio": 0.5, "val/maxvio_worst": 1.0, "val/dead": 1.0,
        "val/maxvio_floor": maxvio_floor(4, 2, 4),
    }  # fmt: skip
    assert Score(2.0, 1.0).record() == {"val/loss": 2.0, "val/bpb": 1.0}
