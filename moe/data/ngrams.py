"""What counting achieves: unigram and bigram cross-entropy on exactly the targets a model is scored on.

    unigram   p(b)     = (c(b) + 1) / (N + V)
    bigram    p(b | a) = max(c(a, b) - D, 0) / c(a) + D * kinds(a) / c(a) * q(b)

A model that does not beat the bigram has not learned to look further than one token back.
Source: interpolated Kneser-Ney, in the notation of Chen and Goodman, 1999; D = n1 / (n1 + 2 n2) from the training
counts, q the share of contexts in which b was seen. Nothing is tuned on the validation text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LONGEST, BLOCK = 32_000_000, 4096  # tokens: sorting that many pairs takes about 5 s and 1 GB


class Baselines(NamedTuple):
    unigram: float
    """nats a token"""
    bigram: float
    unigram_bpb: float
    """bits a byte of text; nan where the targets stand for no byte"""
    bigram_bpb: float


def ngram_baselines(
    train: np.ndarray, inputs: np.ndarray, targets: np.ndarray, vocab_size: int, text_bytes: int
) -> Baselines:
    """Fit on the stream `train` [N], score the pairs (inputs, targets) [n] (`Evaluation.pairs`) of `text_bytes` bytes.

    Pairs across document borders are few and stay in the counts. Of a stream longer than LONGEST, evenly spaced
    blocks are counted.
    """
    V = vocab_size
    if len(train) > LONGEST:
        blocks = train[: len(train) // BLOCK * BLOCK].reshape(-1, BLOCK)
        train = blocks[:: -(-len(train) // LONGEST)].ravel()
    train = np.asarray(train).astype(np.int64)
    inputs, targets = np.asarray(inputs, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    count = np.bincount(train, minlength=V)
    unigram = -np.log((count[targets] + 1) / (len(train) + V))

    pairs, pair_count = np.unique(train[:-1] * V + train[1:], return_counts=True)  # [P] keys a * V + b, sorted
    first, second = pairs // V, pairs % V
    context = np.bincount(first, weights=pair_count, minlength=V)  # c(a)
    kinds = np.bincount(first, minlength=V)  # different tokens seen after a
    after = np.bincount(second, minlength=V)  # different tokens seen before b
    q = (after + 1) / (len(pairs) + V)  # + 1: a token never seen still has a price

    once, twice = np.count_nonzero(pair_count == 1), np.count_nonzero(pair_count == 2)
    discount = once / (once + 2 * twice) if once else 0.5  # the estimate needs pairs seen once
    wanted = inputs * V + targets
    if len(pairs):
        place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        seen = np.where(pairs[place] == wanted, pair_count[place], 0)
    else:
        seen = np.zeros(len(wanted))
    total = np.maximum(context[inputs], 1)
    spare = np.where(context[inputs] > 0, discount * kinds[inputs] / total, 1.0)  # an unseen context: q alone
    bigram = -np.log(np.maximum(seen - discount, 0) / total + spare * q[targets])
    nats = [float(x.sum()) for x in (unigram, bigram)]
    a_token = [n / len(targets) if len(targets) else math.nan for n in nats]
    a_byte = [n / math.log(2) / text_bytes if text_bytes else math.nan for n in nats]
    return Baselines(*a_token, *a_byte)
