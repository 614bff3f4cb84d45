"""What counts as a document, how parts are chosen, and that bad input is counted, not raised."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest

from moe.config import UserError
from moe.data import sources
from moe.data.sources import Document, embedded, listing, local, sample


def texts(documents):
    return [d.text for d in documents]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------------ embedded


@pytest.mark.skipif(not version("torch").startswith("2.13.0"), reason="counts are those of torch 2.13.0")
def test_the_torch_corpus_is_the_documented_one():
    whole, half = embedded("torch"), embedded("torch", 0.5)
    assert (len(whole.train), len(whole.val), len(half.train)) == (1704, 77, 859)
    assert whole.fingerprint == half.fingerprint == "0c89eadb3ce5"
    assert sum(len(d.text.encode()) for d in half.train) == 14_678_549
    assert half.val == whole.val and all(d.hash // 25 % 2 == 0 for d in half.train)
    assert sorted(sample(whole.train, 16_000_000)) == sorted(texts(half.train)), "the tokenizer's half is the same half"


def test_smaller_fractions_are_subsets_of_about_the_asked_size():
    parts = {f: set(d.identity for d in embedded("stdlib", f).train) for f in (0.1, 0.25, 0.3, 0.7, 1.0)}
    sizes = list(parts)
    for small, large in zip(sizes, sizes[1:], strict=False):
        assert parts[small] <= parts[large]
        assert abs(len(parts[small]) / len(parts[1.0]) - small) < 0.08


def test_the_standard_library_splits_by_path_and_leaves_tests_out():
    docs = embedded("stdlib")
    assert docs.name.startswith("stdlib 3.") and len(docs.train) > 250 and len(docs.val) > 5
    assert all(d.hash % 25 == 0 for d in docs.val) and all(d.hash % 25 for d in docs.train)
    paths = [d.identity for d in docs.train + docs.val]
    assert not [p for p in paths if p.startswith(("test", "_sysconfig")) or "/test" in p or "site-packages" in p]
    assert texts(sources.unseen_code()) == texts(docs.val)


def test_unseen_english_is_prose():
    topics = sources.unseen_english()
    assert len(topics) > 50 and sum(len(d.text) for d in topics) > 300_000
    assert " the " in topics[0].text


def test_a_fraction_that_keeps_nothing_is_refused():
    with pytest.raises(UserError, match="data.fraction=1e-09 .*raise it"):
        embedded("stdlib", 1e-9)


@pytest.mark.parametrize("corpus, other", [("torch", "stdlib"), ("stdlib", "torch")])
def test_an_interpreter_without_source_files_names_the_alternatives(tmp_path, monkeypatch, corpus, other):
    with zipfile.ZipFile(tmp_path / "python.zip", "w") as archive:
        archive.writestr("os.py", "")
    inside = str(tmp_path / "python.zip" / "os.pyc")
    monkeypatch.setattr(os, "__file__", inside)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"data.corpus={corpus}.*data.corpus={other}, or use data.path"):
        embedded(corpus)


def test_finding_the_torch_corpus_imports_neither_torch_nor_tokenizers():
    code = """import importlib.util, os, sys, types
for name, path in (("moe", PATHS[0]), ("moe.data", PATHS[1])):
    sys.modules[name] = types.ModuleType(name)  # the packages' own __init__ may import torch
    sys.modules[name].__path__ = [path]
from moe.data import sources
assert len(sources.listing("torch", None)) > 1000
import moe.data.tokenizer
assert not {"torch", "tokenizers", "datasets"} & set(sys.modules)"""
    data = os.path.dirname(sources.__file__)
    code = code.replace("PATHS", repr([os.path.dirname(data), data]))
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------ your own text


def test_a_single_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path, words):
    text = words(20_000)
    (tmp_path / "book.txt").write_text(text)
    docs = local(str(tmp_path / "book.txt"), val_fraction=0.1)
    pieces = docs.train + docs.val
    assert docs.train and docs.val and all(len(d.text) <= sources.PIECE for d in pieces)
    assert all(d.text.endswith("\n") and d.text in text for d in pieces)
    assert sum(len(d.text) for d in pieces) == len(text)
    assert 0.02 < sum(len(d.text) for d in docs.val) / len(text) < 0.25


@pytest.mark.parametrize("length", [2, 37, 5_000, 300_000])
def test_a_text_without_line_ends_still_has_two_parts(tmp_path, rng, length):
    text = "".join(rng.choices("abc é你", k=length)).replace("  ", "ab") + "x"
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    docs = local(str(tmp_path / "one.txt"))
    assert docs.train and docs.val
    assert sum(len(d.text) for d in docs.train + docs.val) == len(text)


def test_a_single_huge_document_in_rows_is_cut_too(tmp_path, words):
    docs = local(write_rows(tmp_path / "a.jsonl", [{"text": words(5000)}]))
    assert len(docs.train) > 10 and docs.val


def test_one_character_is_too_little(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="x.txt holds too little text"):
        local(str(tmp_path / "x.txt"))


def test_a_folder_reads_every_text_file_in_order_and_only_those(tmp_path, words):
    for name in ("b.txt", "a/z.md", "a/b.py", "c.unknown"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n" + words(3))
    write_rows(tmp_path / "a" / "rows.jsonl", [{"text": f"row {i}"} for i in range(60)])
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "late.bin").write_bytes(b"a" * 10_000 + b"\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    docs = local(str(tmp_path), val_fraction=0.1)
    found = texts(docs.train + docs.val)
    assert len(found) == 64 and not [t for t in found if "secret" in t]
    assert docs.skipped == {"binary file": 2, "file not UTF-8": 1, "empty file": 1}
    names = [name for name, _, _ in listing(None, str(tmp_path))[1:]]
    relative = [os.path.relpath(n, tmp_path).replace(os.sep, "/") for n in names]
    assert relative == sorted(relative) and "a/rows.jsonl" in relative


def test_bad_rows_are_counted_by_reason_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW", 2_000)
    good = [json.dumps({"text": f"document number {i}"}).encode() for i in range(50)]
    bad = {
        "invalid JSON": [b"{oops", b"[" * 1_900, b'{"text": "cut'],
        "row not an object": [b"[1, 2]", b'"text"', b"null"],
        "no column 'text'": [b'{"txt": "x"}'],
        "null text": [b'{"text": null}'],
        "text not a string": [b'{"text": 3}', b'{"text": ["a"]}'],
        "empty text": [b'{"text": ""}', b'{"text": " \\n"}'],
        "row not UTF-8": [b'{"text": "\xff"}'],
        "invalid unicode": [b'{"text": "half \\ud83d"}'],
        "row over 0 MB": [b'{"text": "' + b"x" * 7_000 + b'"}', b"y" * 2_001],
    }
    lines = [line for group in bad.values() for line in group] + good
    (tmp_path / "rows.jsonl").write_bytes(b"\n\n".join(lines))  # blank lines are no rows
    docs = local(str(tmp_path / "rows.jsonl"))
    assert docs.skipped == {reason: len(group) for reason, group in bad.items()}
    assert sorted(texts(docs.train + docs.val)) == sorted(json.loads(g)["text"] for g in good)


def test_a_missing_column_names_the_columns_that_exist(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"content": "a", "id": i} for i in range(5)])
    with pytest.raises(UserError, match=r"data.text_column='text' is in no row .*content, id; set data.text_column="):
        local(path)
    assert len(local(path, text_column="content").train) >= 1


def test_sources_without_a_usable_document_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="none does not exist"):
        local(str(tmp_path / "none"))
    with pytest.raises(UserError, match="folder is an empty folder"):
        local(str(tmp_path / "folder"))
    (tmp_path / "folder" / "x.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"folder holds no usable text \(1 binary file\)"):
        local(str(tmp_path / "folder"))
    with pytest.raises(UserError, match=r"\(2 null text, 1 empty text\)"):
        local(write_rows(tmp_path / "n.jsonl", [{"text": None}, {"text": ""}, {"text": None}]))
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(UserError, match=r"e.jsonl holds no usable text \(nothing there\)"):
        local(str(tmp_path / "e.jsonl"))


def test_the_split_depends_on_text_alone(tmp_path, words, rng):
    rows = [{"text": words(2)} for _ in range(400)]
    first = local(write_rows(tmp_path / "a.jsonl", rows), val_fraction=0.2)
    rng.shuffle(rows)
    second = local(write_rows(tmp_path / "b.jsonl", rows + rows[:50]), val_fraction=0.2)
    assert set(texts(first.val)) == set(texts(second.val)) and not set(texts(second.val)) & set(texts(second.train))
    assert 40 < len(first.val) < 130


def test_identical_documents_only_still_give_two_parts(tmp_path):
    docs = local(write_rows(tmp_path / "same.jsonl", [{"text": "same"}] * 40))
    assert docs.train and docs.val and len(docs.train + docs.val) == 40


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path):
    (tmp_path / "w.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n" * 1 + b"three\r\n" * 400)
    docs = local(str(tmp_path / "w.txt"), val_fraction=0.5)
    text = "".join(texts(docs.train + docs.val))
    assert "\ufeff" not in text and text.count("\r\n") == 402


def test_fingerprint_and_listing_notice_a_change(tmp_path, words):
    path = tmp_path / "a.txt"
    path.write_text(words(500))
    before, stats = local(str(path)).fingerprint, listing(None, str(path))
    assert local(str(path)).fingerprint == before and listing(None, str(path)) == stats
    path.write_text(path.read_text() + "one more line\n")
    assert local(str(path)).fingerprint != before and listing(None, str(path)) != stats


def test_a_sample_fits_its_limit_and_is_never_empty(documents):
    many = documents(300)
    total = sum(len(d.text) for d in many)
    assert sample(many, total) == texts(many)
    assert 0 < sum(map(len, sample(many, total // 3))) < total / 2
    assert sample([Document("one", "x" * 100)], 10)
