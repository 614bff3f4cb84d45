"""One call gives tokenizer, rows and card; the second call is quick, notices changes, and agrees with the first."""

import json
import os
import random
import time
import warnings

import numpy as np
import pytest
import torch

from moe.config import DataConfig, UserError
from moe.data import prepare, sources, tokenizer
from moe.data.packing import Rows


@pytest.fixture
def config(tmp_path, words, rng):
    """config(**changes): a small jsonl corpus of this test's own."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": words(rng.randint(1, 8))}) + "\n" for _ in range(200)))
    values = dict(path=str(path), val_fraction=0.1, seq_len=32, cache=str(tmp_path / "cache"))
    return lambda **changes: DataConfig(**{**values, **changes})


@pytest.fixture
def work(monkeypatch):
    """Names of the expensive steps, in the order in which they were taken."""
    done = []
    for owner, name in ((sources, "local"), (tokenizer.Tokenizer, "train"), (tokenizer.Tokenizer, "encode_batch")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, f=original, **k: (done.append(n), f(*a, **k))[1])
    return done


def same(a, b):
    return np.array_equal(a.train.tokens, b.train.tokens) and np.array_equal(a.val.tokens, b.val.tokens)


def test_a_corpus_holds_what_a_recipe_needs(config):
    corpus = prepare(config(), 512, seed=3)
    assert isinstance(corpus.train, Rows) and corpus.train.seq_len == 32 and corpus.token_bytes.shape == (512,)
    card = corpus.card
    assert card["docs"]["train"] + card["docs"]["val"] == 200 and card["docs"]["val"] > 3
    assert card["tokens"] == {"train": len(corpus.train.tokens), "val": len(corpus.val.tokens)}
    assert card["tokenizer"] == corpus.tokenizer.fingerprint and card["vocab_size"] == 512 and card["skipped"] == {}
    assert card["name"].endswith("corpus.jsonl") and len(card["fingerprint"]) == 12
    batch = corpus.train.share(0, 8, rank=1, world=2)
    assert batch.tokens.shape == (4, 33) and batch.segment_ids is not None and batch.mask is None
    whole = corpus.evaluation()
    assert whole.bytes == card["bytes"]["val"]
    baselines = corpus.baselines(whole)
    assert 0 < baselines.bigram_bpb < baselines.unigram_bpb < 8
    other = corpus.rows([sources.Document("x", "some other text\n" * 30)])
    assert corpus.evaluation(None, other).bytes == 480


def test_a_second_call_reads_the_cache_and_agrees(config, work):
    first = prepare(config(), 512, seed=3)
    assert work[:2] == ["local", "train"]
    work.clear()
    second = prepare(config(), 512, seed=3)
    assert work == [] and same(first, second) and first.card == second.card
    assert first.tokenizer.text == second.tokenizer.text
    assert torch.equal(first.train.take(5, 9).tokens, second.train.take(5, 9).tokens)


def test_a_touched_file_is_read_again_but_not_tokenised_again(config, work):
    first = prepare(config(), 512)
    os.utime(config().path, ns=(1, 1))
    work.clear()
    assert same(first, prepare(config(), 512)) and work == ["local", "train"]


def test_changed_text_and_changed_settings_are_noticed(config, work):
    first = prepare(config(), 512)
    for changes, vocab in (({}, 400), ({"val_fraction": 0.3}, 512), ({"mask_documents": False, "seq_len": 8}, 512)):
        other = prepare(config(**changes), vocab)
        assert same(first, other) == ("seq_len" in changes)
    with open(config().path, "a") as file:
        file.write(json.dumps({"text": "a new document"}) + "\n")
    changed = prepare(config(), 512)
    assert changed.card["fingerprint"] != first.card["fingerprint"]
    assert sum(changed.card["docs"].values()) == 201


def test_the_order_of_rows_follows_the_seed_and_the_text_does_not(config):
    one, two = prepare(config(), 512, seed=1), prepare(config(), 512, seed=2)
    assert same(one, two) and not torch.equal(one.train.take(0, 20).tokens, two.train.take(0, 20).tokens)
    assert torch.equal(one.val.take(0, 5).tokens, two.val.take(0, 5).tokens)


def test_bad_rows_are_reported_in_one_warning_every_time(config):
    with open(config().path, "a") as file:
        file.write('{"text": null}\n{"text": 4}\n{"text": null}\n')
    for _ in range(2):
        with pytest.warns(UserWarning, match="corpus.jsonl: left out 2 null text, 1 text not a string") as seen:
            corpus = prepare(config(), 512)
        assert len(seen) == 1 and corpus.card["skipped"] == {"null text": 2, "text not a string": 1}


@pytest.mark.parametrize("what", ["tokens.npy", "card.json", "tokenizer", "index"])
def test_a_damaged_cache_is_rebuilt(config, tmp_path, what):
    first = prepare(config(), 512)
    pattern = {"tokenizer": "tokenizer-*.json", "index": "index-*.json"}.get(what, f"local-train-*/{what}")
    [file] = (tmp_path / "cache").glob(pattern)
    raw, want = file.read_bytes(), np.array(first.train.tokens)
    file.write_bytes(raw[: len(raw) // 2])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = prepare(config(), 512)
    assert len([w for w in seen if "damaged and will be rebuilt" in str(w.message)]) == ("." in what)
    assert np.array_equal(again.train.tokens, want) and again.card == first.card
    assert file.stat().st_size == len(raw), "mended on disk, too"


def test_other_ranks_wait_then_read(config, work):
    order = []
    prepare(config(), 512, rank=0, barrier=lambda: order.append(list(work)))
    assert order == [["local", "train", "encode_batch", "encode_batch"]], "rank 0 builds before the barrier"
    work.clear()
    prepare(config(), 512, rank=3, barrier=lambda: order.append(list(work)))
    assert order[1] == [] and work == []


def test_an_error_on_rank_0_leaves_nobody_waiting(config, tmp_path):
    for rank in (0, 1):
        waited = []
        with pytest.raises(UserError, match="nowhere does not exist"):
            prepare(config(path=str(tmp_path / "nowhere")), 512, rank=rank, barrier=lambda w=waited: w.append(1))
        assert waited == [1]


BUILD = """
from moe.config import DataConfig
from moe.data import prepare
corpus = prepare(DataConfig(**values), 512)
print(json.dumps([corpus.tokenizer.fingerprint, int(corpus.train.tokens.sum(dtype="int64")), len(corpus.val)]))
"""


def test_two_processes_that_prepare_at_once_agree(config, at_once):
    answers = at_once(BUILD, vars(config()))
    corpus = prepare(config(), 512)
    want = [corpus.tokenizer.fingerprint, int(corpus.train.tokens.sum(dtype=np.int64)), len(corpus.val)]
    assert answers == [[want], [want]]


def test_a_given_tokenizer_is_used_and_checked(config, tmp_path, work, tokenizer):
    tokenizer.save(tmp_path / "mine.json")
    given = config(tokenizer=str(tmp_path / "mine.json"))
    for _ in range(2):
        corpus = prepare(given, tokenizer.vocab_size)
        assert corpus.tokenizer.fingerprint == tokenizer.fingerprint and "train" not in work
    with pytest.raises(UserError, match=rf"mine.json has {tokenizer.vocab_size} ids .*set model.vocab_size="):
        prepare(given, 100)


def test_text_shorter_than_a_row_is_refused_with_its_length(config, tmp_path):
    (tmp_path / "short.txt").write_text("two words\nand more\n")
    with pytest.raises(UserError, match=r"data.seq_len=512 is longer than the training text, \d+ tokens"):
        prepare(config(path=str(tmp_path / "short.txt"), seq_len=512), 512)


def test_one_large_text_file_gives_both_parts(config, tmp_path):
    rng = random.Random(0)  # the same text each time: a hash deals its few pieces out, and some texts get unlike shares
    (tmp_path / "book.txt").write_text(
        "".join(f"    x_{rng.randint(0, 99)} = f({rng.random()})\n" for _ in range(8000))
    )
    corpus = prepare(config(path=str(tmp_path / "book.txt")), 512)
    assert len(corpus.val) > 10 and len(corpus.train) > 5 * len(corpus.val)


def test_a_cache_inside_the_text_folder_is_not_text(config, tmp_path, work):
    for _ in range(2):
        corpus = prepare(config(path=str(tmp_path)), 512)
        assert sum(corpus.card["docs"].values()) == 200
    assert work.count("local") == 1


def test_the_embedded_corpus_is_prepared_and_found_again(tmp_path):
    config = DataConfig(corpus="stdlib", fraction=0.1, seq_len=64, cache=str(tmp_path))
    cold = prepare(config, 512)
    start = time.perf_counter()
    warm = prepare(config, 512)
    assert time.perf_counter() - start < 2, "0.05 s on an idle core"
    assert same(cold, warm) and cold.card == warm.card and cold.card["name"].startswith("stdlib 3.")
