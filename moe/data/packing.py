"""A stream of tokens cut into rows, and the rows that are training batches or evaluations.

    stream     tokens [N] and offsets [documents + 1] of a store (store.py)
    row i      tokens[i * T : i * T + T + 1], so neighbours share one token and every token but the first of the
               stream is a target exactly once
    Batch      tokens [B, T+1] int64, segment_ids [B, T+1] int32 or None, mask [B, T+1] bool or None

Row order is a pure function of (seed, epoch), so the whole state of the data is one integer, `rows_seen`, valid for
any number of ranks.

Border rule: with segment_ids, a target whose segment differs from its input's is no target (it would ask for the BOS
of an unrelated document). Whoever computes a loss applies that, as `Batch.scored` does.
Source: concatenate-and-cut packing, as in DeepSeek-V3, arXiv 2412.19437, section 4.1 (which does not mask documents).
Not here: best-fit packing, streaming, fill-in-the-middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.data.store import Store


class Batch(NamedTuple):
    tokens: Tensor
    """[B, T+1] int64: inputs are [:, :-1], targets [:, 1:]."""
    segment_ids: Tensor | None = None
    """[B, T+1] int32, number of the document within its row, from 0; padding is a segment of its own."""
    mask: Tensor | None = None
    """[B, T+1] bool; False: this token is padding, never a target."""

    @property
    def scored(self) -> Tensor:
        """[B, T] bool, the targets that count: neither padding nor across a document border."""
        keep = torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)
        if self.mask is not None:
            keep = keep & self.mask[:, 1:]
        if self.segment_ids is not None:
            keep = keep & (self.segment_ids[:, 1:] == self.segment_ids[:, :-1])
        return keep


class Rows:
    """Fixed rows over one stream of tokens.

    seed: None keeps the natural order (evaluation); a number shuffles, differently each epoch.
    pad: None drops the tail that fills no row (training); an id fills the last row with it, under a mask, so that
        every token of the stream but the first is a target (evaluation).
    """

    def __init__(self, store: Store, seq_len: int, *, seed: int | None = None, pad: int | None = None,
                 mask_documents: bool = True):  # fmt: skip
        self.tokens, self.offsets = np.asarray(store.tokens), np.asarray(store.offsets)
        self.seq_len, self.seed, self.pad, self.mask_documents = seq_len, seed, pad, mask_documents
        targets = max(0, len(self.tokens) - 1)
        self.count = targets // seq_len if pad is None else -(-targets // seq_len)
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Rows of one epoch."""
        return self.count

    def order(self, epoch: int) -> np.ndarray:
        """[rows] int64 permutation, a pure function of (seed, epoch): the rows sorted by a hash of all three.

        A hash and not numpy's generator, whose stream may change between versions.
        """
        if self.seed is None:
            return np.arange(self.count)
        if epoch not in self._orders:
            start = _mix(np.array([self.seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
            start = _mix(start + np.uint64(epoch))
            keys = _mix(start + np.arange(self.count, dtype=np.uint64))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}  # a batch may span two epochs
            self._orders[epoch] = np.argsort(keys, kind="stable")
        return self._orders[epoch]

    def take(self, rows_seen: int, count: int) -> Batch:
        """The `count` rows that follow the first `rows_seen` of the run, across epochs."""
        assert self.count > 0, "Rows of an empty stream"
        position = np.arange(rows_seen, rows_seen + count)
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(position // self.count):
            here = position // self.count == epoch
            rows[here] = self.order(int(epoch))[position[here] % self.count]
        return self.rows(rows)

    def share(self, rows_seen: int, count: int, rank: int = 0, world: int = 1) -> Batch:
        """Rank's contiguous part of `take(rows_seen, count)`; all ranks get equally many rows."""
        assert count % world == 0, (count, world)  # parallel.Ranks.check_rows tells the user
        return self.take(rows_seen + rank * (count // world), count // world)

    def rows(self, indices: np.ndarray) -> Batch:
        """[B] row numbers in natural order -> Batch; -1 is a row of padding alone."""
        indices = np.asarray(indices, dtype=np.int64)
        assert self.pad is not None or (indices >= 0).all(), "a row of padding needs a padding id"
        position = indices[:, None] * self.seq_len + np.arange(self.seq_len + 1)  # [B, T+1]
        position[indices < 0] = len(self.tokens)
        real = position < len(self.tokens)
        tokens = self.tokens[np.minimum(position, len(self.tokens) - 1)].astype(np.int64)
        mask = segments = None
        if self.pad is not None:
            tokens[~real] = self.pad
            mask = torch.from_numpy(real)
        if self.mask_documents:
            document = np.searchsorted(self.offsets, position, side="right")
            segments = torch.from_numpy((document - document[:, :1]).astype(np.int32))
        return Batch(torch.from_numpy(tokens), segments, mask)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64, modulo 2**64: neighbouring numbers in, unrelated ones out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    """A fixed set of rows and what their scored targets amount to."""

    rows: Rows
    indices: np.ndarray
    """[R] int64 row numbers, rising."""
    tokens: int
    """Scored targets: bits per token = nats / tokens / ln 2."""
    bytes: int
    """Bytes of text those targets stand for: bits per byte = nats / bytes / ln 2."""

    def batches(self, size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every row once over all ranks, at most `size` at a time.

        All ranks get batches equal in number and shape, so that collectives inside a model meet; rows of padding
        alone, which score nothing, make up for what is missing.
        """
        slots = -(-len(self.indices) // world)
        mine = np.full(slots, -1, dtype=np.int64)
        part = self.indices[rank::world]
        mine[: len(part)] = part
        for start in range(0, slots, size):
            yield self.rows.rows(mine[start : start + size])

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(input, target) of every scored target, both [tokens] int64."""
        inputs, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for batch in self.batches(256):
            keep = batch.scored
            inputs.append(batch.tokens[:, :-1][keep].numpy())
            targets.append(batch.tokens[:, 1:][keep].numpy())
        return np.concatenate(inputs), np.concatenate(targets)


def evaluation(rows: Rows, token_bytes: np.ndarray, tokens: int | None = None) -> Evaluation:
    """About `tokens` tokens in whole rows spread evenly over the stream, the same ones every time; None: all rows.

    An EOS is a target of no bytes, as its nats are part of the price of the text.
    """
    count = len(rows) if tokens is None else min(len(rows), max(1, round(tokens / rows.seq_len)))
    indices = ((np.arange(count) * 2 + 1) * len(rows)) // (2 * max(1, count))
    whole = Evaluation(rows, indices, 0, 0)
    _, targets = whole.pairs()
    return whole._replace(tokens=len(targets), bytes=int(token_bytes[targets].sum(dtype=np.int64)))
