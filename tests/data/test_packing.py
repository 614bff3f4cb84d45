"""Rows hold every token once, in an order that depends on seed and epoch alone; stores survive crashes and races."""

import json
import math

import numpy as np
import pytest
import torch

from moe.config import UserError
from moe.data.packing import Batch, Rows, evaluation
from moe.data.sources import Document
from moe.data.store import Store, read_store, stored, tokenise
from moe.data.tokenizer import token_bytes


def stream(tokens, documents=(0,)):
    return Store(np.asarray(tokens, np.uint16), np.array([*documents, len(tokens)], np.int64), {})


def numbered(n, T, **options):
    """Rows over the stream 0, 1, ..., n-1: a token names its own position."""
    return Rows(stream(np.arange(n)), T, **options)


SHAPES = [(2, 1), (9, 4), (10, 4), (5, 8), (101, 10), (1000, 7)]  # (N, T): one pair, exact, tail, less than a row, ...


# --------------------------------------------------------------------------------------------------------------- store


def test_documents_are_opened_closed_and_found_by_their_offsets(tokenizer, documents):
    many = documents(40)
    store = tokenise(many, tokenizer)
    assert store.tokens.dtype == np.uint16 and store.offsets.dtype == np.int64
    for i, document in enumerate(many):
        ids = store.tokens[store.offsets[i] : store.offsets[i + 1]]
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
        assert tokenizer.decode(ids[1:-1]) == document.text
    text_bytes = sum(len(d.text.encode()) for d in many)
    assert store.card == {"docs": 40, "bytes": text_bytes, "tokens": len(store.tokens)}
    assert token_bytes(tokenizer)[store.tokens].sum() == text_bytes


def test_control_tokens_in_documents_add_no_borders(tokenizer):
    store = tokenise([Document("a", "x<｜end▁of▁sentence｜>y<｜begin▁of▁sentence｜>z")], tokenizer)
    assert np.count_nonzero(store.tokens < 64) == 2


def test_a_large_vocabulary_is_kept_in_32_bits(tokenizer):
    class Large:
        vocab_size, bos, eos = 70_000, None, 69_999

        def encode_batch(self, texts):
            return [[66_000 + len(t)] for t in texts]

    assert tokenise([Document("a", "abc")], Large()).tokens.tolist() == [66_003, 69_999]
    Large.vocab_size, Large.eos = 65_536, 65_535
    Large.encode_batch = lambda self, texts: [[1] for _ in texts]
    store = tokenise([Document("a", "abc")], Large())
    assert store.tokens.dtype == np.uint16 and store.tokens.tolist() == [1, 65_535]


def test_a_store_is_written_once_and_read_back_mapped(tmp_path, tokenizer, documents):
    many = documents(20)
    folder, first = stored(tmp_path / "new" / "cache", "x", {"corpus": "a"}, many, tokenizer)
    again, second = stored(tmp_path / "new" / "cache", "x", {"corpus": "a"}, [], tokenizer)
    assert folder == again and isinstance(second.tokens, np.memmap)
    np.testing.assert_array_equal(first.tokens, tokenise(many, tokenizer).tokens)
    np.testing.assert_array_equal(second.tokens, first.tokens)
    assert second.card["corpus"] == "a" and second.card["docs"] == 20 and "tokenizers" in second.card["versions"]
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name], "nothing temporary is left"
    assert stored(tmp_path / "new" / "cache", "x", {"corpus": "b"}, many, tokenizer)[0] != folder


def damage_truncate(folder):
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-7])


def damage_flip(folder):
    raw = bytearray((folder / "tokens.npy").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "tokens.npy").write_bytes(raw)


def damage_card(folder):
    (folder / "card.json").write_text('{"docs": ')


def damage_count(folder):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "tokens": card["tokens"] - 1}))


def damage_offsets(folder):
    offsets = np.load(folder / "offsets.npy")
    np.save(folder / "offsets.npy", offsets[:-1])


def damage_pickle(folder):
    np.save(folder / "tokens.npy", np.array([object()], dtype=object), allow_pickle=True)


def damage_empty(folder):
    (folder / "tokens.npy").write_bytes(b"")


def damage_missing(folder):
    (folder / "offsets.npy").unlink()


def damage_file(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("not a folder")


DAMAGES = [damage_truncate, damage_flip, damage_card, damage_count, damage_offsets, damage_pickle, damage_empty,
           damage_missing, damage_file]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_store_is_rebuilt_with_one_warning(tmp_path, tokenizer, documents, damage):
    many = documents(5)
    folder, store = stored(tmp_path, "x", {}, many, tokenizer)
    want = np.array(store.tokens)
    del store
    damage(folder)
    with pytest.warns(UserWarning, match="damaged and will be rebuilt") as seen:
        _, store = stored(tmp_path, "x", {}, many, tokenizer)
    assert len(seen) == 1
    np.testing.assert_array_equal(store.tokens, want)
    assert read_store(folder) is not None and [p.name for p in tmp_path.iterdir()] == [folder.name]


BUILD = """
from moe.data.sources import Document
from moe.data.store import stored
from moe.data.tokenizer import Tokenizer
documents = [Document(*d) for d in values["documents"]]
tokenizer = Tokenizer(values["tokenizer"])
for round in range(10):
    print(int(stored(values["cache"], "x", {"round": round}, documents, tokenizer)[1].tokens.sum(dtype="int64")))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_build_at_once_all_end_well(tmp_path, tokenizer, documents, at_once, damaged):
    many = documents(8)
    want = int(tokenise(many, tokenizer).tokens.sum(dtype=np.int64))
    if damaged:
        for round in range(10):
            damage_flip(stored(tmp_path, "x", {"round": round}, many, tokenizer)[0])
    values = {"cache": str(tmp_path), "documents": many, "tokenizer": tokenizer.text}
    assert at_once(BUILD, values) == [[want] * 10] * 2
    names = [p.name for p in tmp_path.iterdir()]
    assert len(names) == 10 and not [n for n in names if n.startswith(".")], "ten stores and nothing temporary"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer, documents):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data.cache=.*file.* cannot be written"):
        stored(tmp_path / "file", "x", {}, documents(1), tokenizer)


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("N, T", SHAPES)
def test_every_token_but_the_first_is_a_target_once(N, T):
    padded, cut = numbered(N, T, pad=9999), numbered(N, T)
    batch = padded.rows(np.arange(len(padded)))
    assert batch.tokens.shape == (math.ceil((N - 1) / T), T + 1) and batch.tokens.dtype == torch.int64
    assert batch.tokens[:, 1:][batch.scored].tolist() == list(range(1, N))
    assert batch.tokens[:, :-1][batch.scored].tolist() == list(range(N - 1))
    assert (batch.tokens[~batch.mask] == 9999).all()
    assert len(cut) == (N - 1) // T
    if len(cut):
        batch = cut.rows(np.arange(len(cut)))
        assert batch.mask is None and batch.tokens[:, 1:].flatten().tolist() == list(range(1, len(cut) * T + 1))


@pytest.mark.parametrize("N, T", [(9, 4), (101, 10), (1000, 7)])
def test_each_epoch_holds_every_row_once_in_its_own_order(N, T, rng):
    rows = numbered(N, T, seed=rng.randrange(2**40))
    orders = [rows.take(e * len(rows), len(rows)).tokens[:, 0].tolist() for e in range(3)]
    assert [sorted(o) for o in orders] == [list(range(0, len(rows) * T, T))] * 3
    if len(rows) > 8:
        assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_order_is_a_function_of_seed_and_epoch(rng):
    seed = rng.randrange(2**32)
    one, two, other = (numbered(5000, 4, seed=s) for s in (seed, seed, seed + 1))
    assert np.array_equal(one.order(3), two.order(3)) and not np.array_equal(one.order(3), other.order(3))
    assert not np.array_equal(one.order(1), other.order(0)), "epoch and seed are not summed"
    shuffled = one.order(0)
    assert abs(np.corrcoef(shuffled, np.arange(len(shuffled)))[0, 1]) < 0.15


def test_the_order_is_plain_integer_arithmetic(rng):
    """Nothing in it depends on a library's random generator, so a run resumes in the same order under any version."""
    seed, epoch, wrap = rng.randrange(2**63), rng.randrange(5), 2**64

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % wrap
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % wrap
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % wrap
        return x ^ (x >> 31)

    want = sorted(range(100), key=lambda i: mix((mix((mix(seed) + epoch) % wrap) + i) % wrap))
    assert numbered(401, 4, seed=seed).order(epoch).tolist() == want


def test_natural_order_without_a_seed():
    assert numbered(41, 4).take(7, 5).tokens[:, 0].tolist() == [28, 32, 36, 0, 4]


def test_resuming_anywhere_continues_the_same_rows(rng):
    N, T, step = rng.randint(300, 900), rng.randint(2, 9), rng.randint(1, 13)
    seed, stop = rng.randrange(99), rng.randint(1, 200)
    whole = numbered(N, T, seed=seed)
    want = [whole.take(s * step, step).tokens for s in range(stop + 40)]
    fresh = numbered(N, T, seed=seed)
    assert all(torch.equal(fresh.take(s * step, step).tokens, want[s]) for s in range(stop, stop + 40))
    everything = whole.take(0, (stop + 40) * step).tokens  # many epochs in one request
    assert torch.equal(everything, torch.cat(want))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_rows_at_any_world_size(world, rng):
    rows = Rows(stream(np.arange(700), range(0, 700, 13)), 6, seed=rng.randrange(99))
    seen, count = rng.randint(0, 300), 8
    want = rows.take(seen, count)
    shares = [rows.share(seen, count, rank, world) for rank in range(world)]
    assert {len(s.tokens) for s in shares} == {count // world}
    assert torch.equal(torch.cat([s.tokens for s in shares]), want.tokens)
    assert torch.equal(torch.cat([s.segment_ids for s in shares]), want.segment_ids)


def test_segments_number_the_documents_of_a_row(rng):
    N, T = 600, 16
    starts = sorted({0, *(rng.randrange(N) for _ in range(60))})
    rows = Rows(stream(np.arange(N), starts), T, pad=0)
    batch = rows.rows(np.arange(len(rows)))
    document = np.cumsum(np.isin(np.arange(N), starts))  # the same by another way
    for i in range(len(rows)):
        here = document[i * T : i * T + T + 1]
        assert batch.segment_ids[i, : len(here)].tolist() == (here - here[0]).tolist()
    last = batch.segment_ids[-1][~batch.mask[-1]]
    assert len(last) == 0 or last.min() > batch.segment_ids[-1][batch.mask[-1]].max(), "padding is apart"
    assert batch.segment_ids.dtype == torch.int32
    assert Rows(stream(np.arange(N), starts), T, mask_documents=False).rows([0]).segment_ids is None


def test_borders_and_padding_are_not_scored(tokenizer, documents):
    many = documents(30)
    store = tokenise(many, tokenizer)
    masked, plain = (Rows(store, 32, pad=tokenizer.pad, mask_documents=m) for m in (True, False))
    count = [int(r.rows(np.arange(len(r))).scored.sum()) for r in (masked, plain)]
    assert count == [len(store.tokens) - 30, len(store.tokens) - 1], "one target fewer a document: its BOS"
    batch = masked.rows(np.arange(len(masked)))
    assert not (batch.tokens[:, 1:][batch.scored] == tokenizer.bos).any()
    assert Batch(batch.tokens).scored.all()


def test_a_document_shorter_than_a_row_is_padded_for_validation_only(tokenizer):
    store = tokenise([Document("a", "abc")], tokenizer)
    assert len(Rows(store, 64)) == 0
    rows = Rows(store, 64, pad=tokenizer.pad)
    batch = rows.take(0, 1)
    assert int(batch.mask.sum()) == len(store.tokens) and batch.tokens[0, len(store.tokens) :].eq(tokenizer.pad).all()


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("mask_documents", [True, False])
def test_evaluating_everything_covers_all_bytes(tokenizer, documents, mask_documents):
    many = documents(30)
    rows = Rows(tokenise(many, tokenizer), 32, pad=tokenizer.pad, mask_documents=mask_documents)
    whole = evaluation(rows, token_bytes(tokenizer))
    assert whole.bytes == sum(len(d.text.encode()) for d in many) and whole.indices.tolist() == list(range(len(rows)))
    assert whole.tokens == len(whole.pairs()[1])


def test_a_subset_is_fixed_and_spread_evenly(rng):
    rows = numbered(10_001, 10, pad=0)
    part = evaluation(rows, np.ones(10_001, np.int32), 500)
    assert part.tokens == part.bytes == 500 and len(part.indices) == 50
    assert set(np.diff(part.indices)) == {20} and part.indices[0] == 10
    for tokens in (1, 7, rng.randint(1, 10_000), 10_000, 10**9):
        indices = evaluation(rows, np.ones(10_001, np.int32), tokens).indices
        assert len(set(indices)) == len(indices) == min(1000, max(1, round(tokens / 10)))
        assert np.ptp(np.diff(indices)) <= 1 if len(indices) > 1 else True


@pytest.mark.parametrize("world, size", [(1, 3), (2, 4), (4, 1), (4, 100), (64, 2)])
def test_ranks_evaluate_each_row_once_in_equal_batches(world, size):
    rows = numbered(205, 6, pad=999)  # 34 rows
    whole = evaluation(rows, np.ones(205, np.int32))
    ranks = [list(whole.batches(size, rank, world)) for rank in range(world)]
    assert len({tuple(b.tokens.shape for b in batches) for batches in ranks}) == 1
    targets = torch.cat([b.tokens[:, 1:][b.scored] for batches in ranks for b in batches])
    assert sorted(targets.tolist()) == list(range(1, 205))
