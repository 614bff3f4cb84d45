"""Fine-tuning data: samples packed into rows, of which only the answers are targets.

    sample    ids and which of them are answers (chat.py for files, tasks.py for embedded tasks)
    row       samples of segment 0, 1, 2, ... side by side, then padding of segment -1, T+1 places in all
    Batch     tokens [B, T+1], segment_ids [B, T+1], mask [B, T+1]: True exactly at answers

A sample neither sees its neighbours nor is cut. The packing is a pure function of (seed, epoch): samples in a hashed
order, each into the first row with room among the last OPEN_ROWS begun. So one integer, `rows_seen`, is the whole state,
valid for any number of ranks; epochs may differ by a few rows.

Source: DeepSeek-V3, arXiv 2412.19437, section 5.1: packed samples that are mutually invisible.
Not here: mixtures, weights of samples, cutting long ones (they are left out and counted).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.config import DataConfig, SftConfig, UserError
from moe.data import chat
from moe.data.chat import Sample
from moe.data.ngrams import Baselines, ngram_baselines
from moe.data.packing import Batch, Evaluation, Rows, evaluation
from moe.data.store import Store
from moe.data.tasks import Problem, Task, encode_answer, encode_prompt
from moe.data.tokenizer import Tokenizer, token_bytes

OPEN_ROWS = 64  # leaves 0.6 % of the places empty (rows of 1,024, log-normal lengths, median 150)
TOO_LONG = "longer than data.seq_len"


class SampleRows(Rows):
    """Rows of packed samples. seed: None packs in the given order, always alike (evaluation)."""

    def __init__(self, samples: list[Sample], seq_len: int, pad: int, seed: int | None) -> None:
        lengths = [len(s.ids) for s in samples]
        assert max(lengths, default=0) <= seq_len, (max(lengths), seq_len)
        stream = np.array([i for s in samples for i in s.ids], dtype=np.int64)
        super().__init__(Store(stream, np.cumsum([0, *lengths]), {}), seq_len, seed=seed, pad=pad)
        self.answers = np.array([a for s in samples for a in s.answer], dtype=bool)
        self.count = len(samples)  # what `order` is a permutation of
        self._packings: dict[int, list[list[int]]] = {}
        self._starts = [0]  # first row of each epoch, counted from the beginning of the run

    def __len__(self) -> int:
        """Rows of the first epoch."""
        return len(self.packing(0))

    def packing(self, epoch: int) -> list[list[int]]:
        """Numbers of the samples in each row."""
        if epoch not in self._packings:
            near = {e: p for e, p in self._packings.items() if e in (0, epoch - 1)}  # a batch may span two epochs
            self._packings = {**near, epoch: self._pack(self.order(epoch))}
        return self._packings[epoch]

    def _pack(self, order: Iterable[int]) -> list[list[int]]:
        lengths = np.diff(self.offsets).tolist()
        least = min(lengths, default=0)
        rows: list[list[int]] = []
        free: dict[int, int] = {}  # open row -> places left, oldest first
        for i in order:
            row = next((r for r, places in free.items() if places >= lengths[i]), len(rows))
            if row == len(rows):
                rows.append([])
                free[row] = self.seq_len + 1
            rows[row].append(int(i))
            free[row] -= lengths[i]
            if free[row] < least:
                del free[row]
            elif len(free) > OPEN_ROWS:
                del free[next(iter(free))]
        return rows

    def take(self, rows_seen: int, count: int) -> Batch:
        """The `count` rows that follow the first `rows_seen` of the run, across epochs."""
        assert self.count > 0, "no samples"
        while self._starts[-1] < rows_seen + count:
            self._starts.append(self._starts[-1] + len(self.packing(len(self._starts) - 1)))
        rows = []
        for place in range(rows_seen, rows_seen + count):
            epoch = int(np.searchsorted(self._starts, place, side="right")) - 1
            rows.append(self.packing(epoch)[place - self._starts[epoch]])
        return self._batch(rows)

    def rows(self, indices: np.ndarray) -> Batch:
        """[B] row numbers of the first epoch -> Batch; -1 is a row of padding alone."""
        return self._batch([self.packing(0)[i] if i >= 0 else [] for i in indices])

    def _batch(self, rows: list[list[int]]) -> Batch:
        shape = len(rows), self.seq_len + 1
        tokens = np.full(shape, self.pad, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int32)
        mask = np.zeros(shape, dtype=bool)
        for b, row in enumerate(rows):
            end = 0
            for segment, i in enumerate(row):
                sample = slice(self.offsets[i], self.offsets[i + 1])
                start, end = end, end + int(self.offsets[i + 1] - self.offsets[i])
                tokens[b, start:end], mask[b, start:end] = self.tokens[sample], self.answers[sample]
                segments[b, start:end] = segment
        return Batch(*(torch.from_numpy(a) for a in (tokens, segments, mask)))


# -------------------------------------------------------------------------------------------------- from a file or task


class SampleCorpus(NamedTuple):
    """What `moe.data.Corpus` is for pretraining, with answers in the place of text."""

    tokenizer: Tokenizer
    train: SampleRows
    val: SampleRows
    card: dict[str, Any]
    """name, fingerprint, tokenizer (its fingerprint), vocab_size, skipped; docs (samples), bytes and tokens of each
    part, prompts and control tokens included."""
    task: Task | None
    token_bytes: np.ndarray
    """[V] bytes of text that each id stands for."""

    def evaluation(self, tokens: int | None = None) -> Evaluation:
        """Answers of about `tokens` places of held-out rows; None: of all."""
        return evaluation(self.val, self.token_bytes, tokens)

    def baselines(self, evaluation: Evaluation) -> Baselines:
        """Unigram and bigram of the training samples, prompts included, on the same answers."""
        inputs, targets = evaluation.pairs()
        return ngram_baselines(self.train.tokens, inputs, targets, self.tokenizer.vocab_size, evaluation.bytes)


def prepare_samples(
    task: Task | None, data: DataConfig, sft: SftConfig, tokenizer: Tokenizer, seed: int = 0, rank: int = 0
) -> SampleCorpus:
    """The task's demonstrations with its held-out problems, or `data.path` with a part of it held out.

    `seed` draws the demonstrations and orders the rows. Rank 0 says what was left out.
    """
    found = _of_file(data, sft, tokenizer, rank == 0) if task is None else _of_task(task, data, sft, tokenizer, seed)
    lengths, parts = token_bytes(tokenizer), {"train": found.train, "val": found.val}
    card = {
        "name": found.name,
        "fingerprint": hashlib.sha256(json.dumps(found.source).encode()).hexdigest()[:12],
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "docs": {part: len(samples) for part, samples in parts.items()},
        "bytes": {part: sum(int(lengths[s.ids].sum()) for s in samples) for part, samples in parts.items()},
        "tokens": {part: sum(len(s.ids) for s in samples) for part, samples in parts.items()},
        "skipped": {TOO_LONG: found.skipped} if found.skipped else {},
    }
    train = SampleRows(found.train, data.seq_len, tokenizer.pad, seed)
    val = SampleRows(found.val, data.seq_len, tokenizer.pad, None)
    return SampleCorpus(tokenizer, train, val, card, task, lengths)


def read_samples(path: str, tokenizer: Tokenizer, template: str, seq_len: int) -> list[Sample]:
    """Samples of a .jsonl file or a folder of them; those longer than seq_len are left out with one warning."""
    read = _read(path, tokenizer, template)
    return [sample for _, sample in _fitting(path, read, seq_len, warn=True)]


def task_sample(problem: Problem, tokenizer: Tokenizer) -> Sample:
    """BOS prompt answer EOS."""
    return chat.pair(encode_prompt(problem, tokenizer), encode_answer(problem, tokenizer))


class _Found(NamedTuple):
    name: str
    source: Any
    """Plain values that the fingerprint is taken of."""
    train: list[Sample]
    val: list[Sample]
    skipped: int = 0


def _of_task(task: Task, data: DataConfig, sft: SftConfig, tokenizer: Tokenizer, seed: int) -> _Found:
    if sft.template == "chat":
        raise UserError("sft.template=chat: a task has a template of its own; use sft.template=auto, or data.path")
    parts = task.demonstrations(seed), task.held_out()
    train, val = ([task_sample(p, tokenizer) for p in part] for part in parts)
    longest = max(len(s.ids) for s in train + val)
    if longest > data.seq_len:  # an error and not left out: the task's settings ask for these problems
        raise UserError(
            f"data.seq_len={data.seq_len} is shorter than a problem with its answer, {longest} tokens; raise it or "
            "lower task.max_length"
        )
    return _Found(f"task {task.cfg.name}", [asdict(task.cfg), parts], train, val)


def _of_file(data: DataConfig, sft: SftConfig, tokenizer: Tokenizer, warn: bool) -> _Found:
    read = _read(data.path, tokenizer, "chat" if sft.template == "auto" else sft.template)
    kept = _fitting(data.path, read, data.seq_len, warn)
    held = _held_out({key for key, _ in kept}, data.val_fraction)
    if not held:
        raise UserError(f"data.path={data.path} holds one sample that fits; training and validation need two")
    train, val = ([s for key, s in kept if (key in held) == side] for side in (False, True))
    return _Found(data.path, [key for key, _ in read], train, val, len(read) - len(kept))


def _read(path: str, tokenizer: Tokenizer, template: str) -> list[tuple[str, Sample]]:
    """(hash of the conversation, sample) of every line."""
    encode = chat.TEMPLATES[template]
    return [(c.hash, encode(c, tokenizer)) for c in chat.read_conversations(path)]


def _fitting(path: str, read: list[tuple[str, Sample]], seq_len: int, warn: bool) -> list[tuple[str, Sample]]:
    kept = [(key, sample) for key, sample in read if len(sample.ids) <= seq_len]
    if not kept:
        shortest = min(len(sample.ids) for _, sample in read)
        raise UserError(f"data.seq_len={seq_len}: the shortest sample of {path} has {shortest} tokens; raise it")
    if warn and len(kept) < len(read):
        warnings.warn(
            f"{path}: left out {len(read) - len(kept)} of {len(read)} samples, {TOO_LONG}={seq_len}", stacklevel=4
        )
    return kept


def _held_out(keys: set[str], fraction: float) -> set[str]:
    """Those whose hash falls below `fraction`; at least one on each side, none held out where there is only one."""
    ordered = sorted(keys)
    held = [key for key in ordered if int(key, 16) < fraction * 16 ** len(key)] or ordered[:1]
    return set(held[: len(ordered) - 1])
