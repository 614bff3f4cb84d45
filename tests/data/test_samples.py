"""Packed samples are as good as alone, every epoch holds each once, and only answers are scored."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moe
from moe.config import DataConfig, SftConfig, TaskConfig, UserError
from moe.data import samples as module
from moe.data.chat import Sample
from moe.data.packing import Evaluation
from moe.data.samples import SampleRows, prepare_samples, read_samples, task_sample
from moe.data.tasks import TASKS, Problem
from moe.data.tokenizer import Tokenizer
from moe.objectives.pretraining import Finetuning
from moe.parallel import Ranks
from moe.train.evaluate import evaluate

PAD = 36


@pytest.fixture
def made(rng):
    """made(n, longest): n samples of random length and ids; the first id of each is its number where it fits."""

    def make(n, longest=12, first=None):
        found = []
        for i in range(n):
            length = rng.randint(2, longest)
            ids = [rng.randrange(36) for _ in range(length)]
            cut = rng.randint(1, length - 1)
            found.append(Sample([i if first else ids[0], *ids[1:]], [False] * cut + [True] * (length - cut)))
        return found

    return make


def unpacked(batch):
    """The samples of a batch, in order."""
    found = []
    for tokens, segments, mask in zip(*batch):
        for segment in range(int(segments.max()) + 1):
            at = segments == segment
            found.append(Sample(tokens[at].tolist(), mask[at].tolist()))
    return found


# --------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("n, T", [(1, 12), (7, 12), (60, 12), (60, 40), (300, 17)])
def test_rows_hold_whole_samples_side_by_side_then_padding(made, n, T, rng):
    many = made(n)
    rows = SampleRows(many, T, PAD, rng.randrange(2**40))
    batch = rows.take(0, len(rows))
    assert [tuple(t.shape) for t in batch] == [(len(rows), T + 1)] * 3
    assert [t.dtype for t in batch] == [torch.int64, torch.int32, torch.bool]
    assert sorted(unpacked(batch)) == sorted(many), "each sample once, its answers marked exactly"
    for tokens, segments, mask in zip(*batch):
        count = int((segments >= 0).sum())
        steps = segments[:count].diff()
        assert segments[0] == 0 and ((steps == 0) | (steps == 1)).all()
        assert (segments[count:] == -1).all() and (tokens[count:] == PAD).all() and not mask[count:].any()


def test_targets_are_exactly_the_answers(made):
    many = made(50)
    batch = SampleRows(many, 20, PAD, 1).take(0, 50)
    whole = sorted(unpacked(batch))
    assert int(batch.scored.sum()) == sum(sum(s.answer) for s in whole)
    want = [i for s in unpacked(batch) for i, is_answer in zip(*s) if is_answer]
    assert batch.tokens[:, 1:][batch.scored].tolist() == want


def test_a_sample_as_long_as_a_row_fits_and_a_longer_one_is_our_own_fault():
    full = Sample([1] * 8, [False] + [True] * 7)
    assert SampleRows([full], 8, PAD, 0).take(0, 1).mask.sum() == 7
    with pytest.raises(AssertionError):
        SampleRows([full], 7, PAD, 0)


def test_first_fit_by_hand():
    """T + 1 = 10 places; lengths in the order given: 6 opens row 0, 7 row 1, 3 fits row 0, 4 opens row 2, ..."""
    lengths = [6, 7, 3, 4, 3, 6]
    rows = SampleRows([Sample([i] * n, [True] * n) for i, n in enumerate(lengths)], 9, PAD, None)
    assert rows.packing(0) == [[0, 2], [1, 4], [3, 5]]


@pytest.mark.parametrize("open_rows", [1, 3, 10**9])
def test_first_fit_among_the_last_open_rows(made, open_rows, monkeypatch, rng):
    """Against the rule written out: of the rows with room for anything at all, the last `open_rows` are looked at."""
    monkeypatch.setattr(module, "OPEN_ROWS", open_rows)
    many = made(150)
    rows = SampleRows(many, 20, PAD, rng.randrange(99))
    lengths, want, still = [len(s.ids) for s in many], [], []
    for i in rows.order(0):
        at = next((r for r in still if sum(lengths[j] for j in want[r]) + lengths[i] <= 21), None)
        if at is None:
            at = len(want)
            want.append([])
            still.append(at)
        want[at].append(int(i))
        still = [r for r in still if sum(lengths[j] for j in want[r]) + min(lengths) <= 21][-open_rows:]
    assert rows.packing(0) == want


def test_little_room_is_left_empty(made):
    many = made(2000, 30)
    rows = SampleRows(many, 100, PAD, 3)
    used = sum(len(s.ids) for s in many)
    assert used <= len(rows) * 101 and used / (len(rows) * 101) > 0.97


# ---------------------------------------------------------------------------------------------------------------- order


def test_the_packing_is_a_function_of_seed_and_epoch(made, rng):
    many, seed = made(200), rng.randrange(2**40)
    one, two, other = (SampleRows(many, 24, PAD, s) for s in (seed, seed, seed + 1))
    two.take(1000, 3)  # whatever was asked before
    assert one.packing(3) == two.packing(3) != other.packing(3)
    assert one.packing(0) != one.packing(1) and one.packing(0) == two.packing(0)
    natural = SampleRows(many, 24, PAD, None)
    assert natural.packing(0) == natural.packing(1)


def test_the_first_row_never_changes():
    """A run resumes in the same order after any update: the samples' order is the hash of packing.py."""
    many = [Sample([i, i, i], [False, True, True]) for i in range(10)]
    assert SampleRows(many, 8, PAD, 5).packing(0) == [[1, 5, 9], [3, 4, 2], [0, 7, 8], [6]]


def test_each_epoch_holds_every_sample_once(made, rng):
    many = made(36, first=True)
    rows = SampleRows(many, 16, PAD, rng.randrange(2**40))
    start, orders = 0, []
    for epoch in range(4):
        count = len(rows.packing(epoch))
        found = unpacked(rows.take(start, count))
        assert sorted(found) == sorted(many)
        orders.append([s.ids[0] for s in found])
        start += count
    assert orders[0] != orders[1] != orders[2]


def test_resuming_anywhere_continues_the_same_rows(made, rng):
    many, seed, step, stop = made(30), rng.randrange(99), rng.randint(1, 9), rng.randint(1, 60)
    whole = SampleRows(many, 16, PAD, seed)
    want = [whole.take(s * step, step) for s in range(stop + 20)]
    fresh = SampleRows(many, 16, PAD, seed)
    for s in range(stop, stop + 20):
        assert all(torch.equal(a, b) for a, b in zip(fresh.take(s * step, step), want[s]))
    everything = SampleRows(many, 16, PAD, seed).take(0, (stop + 20) * step)  # many epochs in one request
    assert torch.equal(everything.tokens, torch.cat([b.tokens for b in want]))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_rows_at_any_world_size(made, world, rng):
    rows = SampleRows(made(80), 16, PAD, rng.randrange(99))
    seen, count = rng.randint(0, 100), 8
    want = rows.take(seen, count)
    shares = [rows.share(seen, count, rank, world) for rank in range(world)]
    assert all(len(s.tokens) == count // world for s in shares)
    for i, part in enumerate(want):
        assert torch.equal(torch.cat([s[i] for s in shares]), part)


# ------------------------------------------------------------------------------------------------------------- training


def summed(model, sample):
    """Nats of a sample's answers, from the logits of the sample alone."""
    ids = torch.tensor([sample.ids])
    logits = model(ids[:, :-1]).logits[0]
    nats = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    return (nats * torch.tensor(sample.answer[1:])).sum()


def test_a_packed_sample_is_as_good_as_alone(made, small, agree):
    """Loss and every gradient of packed rows, against samples one by one."""
    model = moe.Transformer(small(seq_aux_alpha=0.0, num_nextn_predict_layers=0))
    many = made(9)
    batch = SampleRows(many, 20, PAD, 2).take(0, len(SampleRows(many, 20, PAD, 2)))
    assert len(batch.tokens) < 9 and (batch.segment_ids < 0).any()
    count = sum(sum(s.answer) for s in many)
    losses = Finetuning(model)(*batch, divisor=count)
    losses.loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = sum(summed(model, s) for s in many) / count
    alone.backward()
    agree(losses.loss, alone, 1e-5)
    assert int(losses.sums["tokens"]) == count
    largest = max(p.grad.abs().max().item() for p in model.parameters())
    for name, p in model.named_parameters():
        agree(packed[name], p.grad, 1e-5, name, scale=largest)


def test_each_sample_of_a_row_has_its_own_loss(made, small, agree):
    model = moe.Transformer(small()).eval()
    rows = SampleRows(made(12), 24, PAD, 2)
    tokens, segments, mask = rows.take(0, len(rows))
    valid = segments[:, :-1] >= 0
    logits = model(tokens[:, :-1], segments[:, :-1], mask=valid).logits
    nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(mask[:, 1:].shape)
    nats = nats * mask[:, 1:]
    packed = [
        nats[b][segments[b, 1:] == s].sum() for b in range(len(tokens)) for s in range(int(segments[b].max()) + 1)
    ]
    alone = [summed(model, s) for s in unpacked((tokens, segments, mask))]
    agree(torch.stack(packed), torch.stack(alone), 1e-5)


def test_what_a_prompt_or_neighbour_says_never_counts(small, agree):
    """By hand: a model that says every id alike pays ln V for each answer token and nothing for the rest."""
    model = moe.Transformer(small(num_nextn_predict_layers=0, seq_aux_alpha=0.0))
    with torch.no_grad():
        model.head.weight.zero_()
    many = [Sample([1, 2, 3, 4, 5], [False, False, True, False, True]), Sample([6, 7], [False, True])]
    losses = Finetuning(model)(*SampleRows(many, 9, PAD, None).take(0, 1), divisor=1.0)
    agree(losses.loss, torch.tensor(3 * np.log(37.0), dtype=torch.float32), 1e-6)
    assert int(losses.sums["tokens"]) == 3


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def task():
    return TASKS["sort"](TaskConfig(min_length=4, max_length=6, demonstrations=30, held_out=40))


@pytest.fixture
def digits(task):
    return Tokenizer.characters(task.alphabet)


def test_held_out_answers_are_counted_in_tokens_and_bytes(task, digits):
    corpus = prepare_samples(task, DataConfig(seq_len=32), SftConfig(), digits, 3)
    whole, held = corpus.evaluation(), task.held_out()
    assert isinstance(whole, Evaluation)
    assert whole.bytes == sum(len(p.answer) for p in held) and whole.tokens == whole.bytes + len(held)
    part = corpus.evaluation(64)
    assert len(part.indices) == 2 and 0 < part.tokens < whole.tokens
    floor = corpus.baselines(whole)
    assert 0 < floor.bigram < floor.unigram


@pytest.mark.parametrize("world, size", [(1, 3), (2, 4), (4, 1), (32, 2)])
def test_ranks_evaluate_each_sample_once_in_equal_batches(task, digits, world, size):
    whole = prepare_samples(task, DataConfig(seq_len=32), SftConfig(), digits).evaluation()
    ranks = [list(whole.batches(size, rank, world)) for rank in range(world)]
    assert len({tuple(b.tokens.shape for b in batches) for batches in ranks}) == 1
    found = [s for batches in ranks for b in batches for s in unpacked(b)]
    assert sorted(found) == sorted(task_sample(p, digits) for p in task.held_out())


def test_the_held_out_loss_is_the_mean_over_answers(task, digits, small, agree):
    corpus = prepare_samples(task, DataConfig(seq_len=32), SftConfig(), digits)
    model = moe.Transformer(small(vocab_size=24)).eval()
    score = evaluate(Finetuning(model), corpus.evaluation(), 5, Ranks(0, 1, torch.device("cpu")))
    many = [task_sample(p, digits) for p in task.held_out()]
    with torch.no_grad():
        nats = sum(summed(model, s) for s in many)
    agree(torch.tensor(score.loss), nats / sum(sum(s.answer) for s in many), 1e-5)
    agree(torch.tensor(score.bpb), nats / np.log(2) / sum(len(p.answer) for p in task.held_out()), 1e-5)


def test_a_batch_of_padding_alone_scores_nothing(made, small):
    rows = SampleRows(made(3), 12, PAD, None)
    batch = rows.rows(np.array([-1, -1]))
    assert (batch.tokens == PAD).all() and (batch.segment_ids == -1).all() and not batch.scored.any()
    losses = Finetuning(moe.Transformer(small()).eval())(*batch, divisor=1.0)
    assert float(losses.sums["loss"]) == 0.0 and int(losses.sums["tokens"]) == 0


# ---------------------------------------------------------------------------------------------------- a task as samples


def test_a_task_sample_is_bos_prompt_answer_eos(digits, tokenizer):
    ids, answer = task_sample(Problem("31>", "13", 2), digits)
    assert digits.decode(ids[1:-1]) == "31>13" and (ids[0], ids[-1]) == (0, 1) and answer == [False] * 4 + [True] * 3
    joining = Tokenizer.train(["31 13 131313 " * 300], 400)
    ids, answer = task_sample(Problem("31>", "13", 2), joining)
    assert joining.decode(ids[1:-1]) == "3 1 >1 3" and sum(answer) == len(joining.encode("1 3")) + 1


def test_demonstrations_train_and_held_out_problems_validate(task, digits):
    corpus = prepare_samples(task, DataConfig(seq_len=32), SftConfig(), digits, seed=3)
    parts = {"train": task.demonstrations(3), "val": task.held_out()}
    for part, problems in parts.items():
        rows = getattr(corpus, part)
        assert sorted(unpacked(rows.take(0, len(rows)))) == sorted(task_sample(p, digits) for p in problems)
    card = corpus.card
    assert card["docs"] == {"train": 30, "val": 40} and card["skipped"] == {} and card["name"] == "task sort"
    texts = {part: sum(len(p.prompt + p.answer) for p in problems) for part, problems in parts.items()}
    assert card["bytes"] == texts and card["tokens"] == {"train": texts["train"] + 60, "val": texts["val"] + 80}
    assert (card["tokenizer"], card["vocab_size"]) == (digits.fingerprint, 24) and len(card["fingerprint"]) == 12
    assert corpus.task is task and corpus.tokenizer is digits and json.dumps(card)
    again, other = (prepare_samples(task, DataConfig(seq_len=32), SftConfig(), digits, seed=s) for s in (3, 4))
    assert again.card == card and other.card["fingerprint"] != card["fingerprint"]


def test_a_task_that_does_not_fit_or_has_another_template_is_refused(task, digits):
    with pytest.raises(UserError, match=r"data.seq_len=14 .* 15 tokens; raise it or lower task.max_length"):
        prepare_samples(task, DataConfig(seq_len=14), SftConfig(), digits)
    with pytest.raises(UserError, match=r"sft.template=chat: .*use sft.template=auto"):
        prepare_samples(task, DataConfig(seq_len=32), SftConfig(template="chat"), digits)
    assert prepare_samples(task, DataConfig(seq_len=15), SftConfig(template="plain"), digits).card["docs"]["val"] == 40


# ---------------------------------------------------------------------------------------------------- a file as samples


@pytest.fixture
def written(tmp_path):
    """written([(prompt, response), ...]): a .jsonl file of them."""

    def write(pairs):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
        return str(path)

    return write


def prepared(path, tokenizer, template="auto", **changes):
    values = dict(path=path, seq_len=64, val_fraction=0.2)
    return prepare_samples(None, DataConfig(**{**values, **changes}), SftConfig(template=template), tokenizer)


def test_a_file_is_split_by_content(written, words, tokenizer, rng):
    pairs = [(f"question {i} {words(1)}", f"answer {i}") for i in range(100)]
    corpus = prepared(written(pairs), tokenizer)
    docs = corpus.card["docs"]
    assert docs["train"] + docs["val"] == 100 and 4 <= docs["val"] <= 40 and corpus.task is None
    held = sorted(unpacked(corpus.val.take(0, len(corpus.val))))
    assert not set(map(str, held)) & set(map(str, unpacked(corpus.train.take(0, len(corpus.train)))))
    rng.shuffle(pairs)
    again = prepared(written([*pairs, *pairs[:50]]), tokenizer)
    assert set(map(str, held)) == set(map(str, unpacked(again.val.take(0, len(again.val)))))
    assert again.card["docs"]["train"] + again.card["docs"]["val"] == 150, "copies stay on their side"
    assert set(map(str, unpacked(again.train.take(0, len(again.train))))).isdisjoint(map(str, held))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_of_the_split_has_a_sample(written, tokenizer, fraction):
    pairs = [("a", "b"), ("c", "d"), ("a", "b")]
    docs = prepared(written(pairs), tokenizer, val_fraction=fraction).card["docs"]
    assert sorted(docs.values()) == [1, 2]
    with pytest.raises(UserError, match=r"pairs.jsonl holds one .* need two"):
        prepared(written(pairs[:1] * 3), tokenizer, val_fraction=fraction)


def test_templates_of_a_file(written, tokenizer):
    path = written([("what", "this"), ("and", "that")])
    user = tokenizer.id("<｜User｜>")
    for template, has_roles in (("auto", True), ("chat", True), ("plain", False)):
        corpus = prepared(path, tokenizer, template)
        assert bool((corpus.train.tokens == user).any()) == has_roles
    letters = Tokenizer.characters("adhinstw")
    with pytest.raises(UserError, match="use sft.template=plain"):
        prepared(path, letters)
    assert prepared(path, letters, "plain").card["docs"] == {"train": 1, "val": 1}


def test_long_samples_are_left_out_and_told_once(written, tokenizer, words):
    path = written([("short", "one"), ("long " * 99, "two"), ("short", "three"), ("long", "four " * 99)])
    with pytest.warns(UserWarning, match=r"pairs.jsonl: left out 2 of 4 samples, longer than data.seq_len=64") as seen:
        corpus = prepared(path, tokenizer)
    assert len(seen) == 1 and corpus.card["skipped"] == {"longer than data.seq_len": 2}
    assert corpus.card["docs"] == {"train": 1, "val": 1}
    with pytest.warns(UserWarning, match="left out 2 of 4"):
        found = read_samples(path, tokenizer, "plain", 64)
    assert [tokenizer.decode(s.ids[1:-1]) for s in found] == ["shortone", "shortthree"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_samples(path, tokenizer, "chat", 1000)) == 4
        prepare_samples(None, DataConfig(path=path, seq_len=64), SftConfig(), tokenizer, rank=1)


def test_a_file_of_long_samples_alone_is_refused(written, tokenizer):
    path = written([("long " * 99, "two")] * 2)
    shortest = len(tokenizer.encode("long " * 99)) + len(tokenizer.encode("two")) + 4
    with pytest.raises(
        UserError, match=rf"data.seq_len=64: the shortest sample of .*pairs.jsonl has {shortest} tokens"
    ):
        prepared(path, tokenizer)
