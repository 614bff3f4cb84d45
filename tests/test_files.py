"""A small file is whole or not there."""

import os
import threading

import pytest

from moe import files


def test_replace_writes_exactly_the_text_and_leaves_nothing_else(tmp_path):
    for text in ("one\r\n", "two \u00e9\n", ""):
        files.replace(tmp_path / "file", text)
        assert (tmp_path / "file").read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_failure_before_the_rename_keeps_the_old_content(tmp_path, monkeypatch):
    files.replace(tmp_path / "file", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        files.replace(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_readers_and_racing_writers_never_see_half_a_file(tmp_path):
    texts = [letter * 200_000 for letter in "ab"]
    files.replace(tmp_path / "file", texts[0])
    writers = [threading.Thread(target=lambda t=t: [files.replace(tmp_path / "file", t) for _ in range(20)]) for t in texts]
    for w in writers:
        w.start()
    while any(w.is_alive() for w in writers):
        assert (tmp_path / "file").read_text() in texts
    for w in writers:
        w.join()


def test_sync_takes_files_and_folders(tmp_path):
    files.replace(tmp_path / "file", "x")
    files.sync(tmp_path / "file")
    files.sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.sync(tmp_path / "absent")
