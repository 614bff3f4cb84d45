"""The counting baselines are proper distributions, agree with a dictionary, and beat each other as they should."""

import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from moe.data import ngrams
from moe.data.ngrams import ngram_baselines
from moe.data.packing import Rows, evaluation
from moe.data.sources import Document
from moe.data.store import tokenise
from moe.data.tokenizer import token_bytes


def dictionary(train, V):
    """unigram(b) and bigram(a, b) by the formulas, one count at a time."""
    count, pair = Counter(train), Counter(zip(train, train[1:], strict=False))
    follows, preceded = defaultdict(set), Counter()
    for a, b in pair:
        follows[a].add(b)
        preceded[b] += 1
    n1, n2 = sum(c == 1 for c in pair.values()), sum(c == 2 for c in pair.values())
    D = n1 / (n1 + 2 * n2) if n1 else 0.5
    seen = Counter(train[:-1])

    def bigram(a, b):
        q = (preceded[b] + 1) / (len(pair) + V)
        if not seen[a]:
            return q
        return max(pair[a, b] - D, 0) / seen[a] + D * len(follows[a]) / seen[a] * q

    return lambda b: (count[b] + 1) / (len(train) + V), bigram


@pytest.mark.parametrize("N, V", [(1, 3), (2, 2), (50, 7), (3000, 40)])
def test_agrees_with_counting_by_hand(N, V, rng):
    train = [min(V - 1, int(rng.expovariate(0.3))) for _ in range(N)]
    inputs, targets = ([rng.randrange(V) for _ in range(200)] for _ in range(2))
    unigram, bigram = dictionary(train, V)
    got = ngram_baselines(np.array(train, np.uint16), np.array(inputs), np.array(targets), V, text_bytes=500)
    want = [-sum(math.log(p) for p in ps) / 200 for ps in (
        [unigram(b) for b in targets], [bigram(a, b) for a, b in zip(inputs, targets, strict=True)])]  # fmt: skip
    assert got.unigram == pytest.approx(want[0], rel=1e-12) and got.bigram == pytest.approx(want[1], rel=1e-12)
    assert got.bigram_bpb == pytest.approx(want[1] * 200 / math.log(2) / 500, rel=1e-12)


def test_probabilities_sum_to_one_in_every_context(rng):
    V = 12
    train = np.array([rng.randrange(V - 2) for _ in range(60)])  # two ids never seen
    for a in range(V):
        scores = [ngram_baselines(train, np.array([a]), np.array([b]), V, 1) for b in range(V)]
        assert sum(math.exp(-s.bigram) for s in scores) == pytest.approx(1, rel=1e-9)
        assert sum(math.exp(-s.unigram) for s in scores) == pytest.approx(1, rel=1e-9)


def test_a_chain_is_learned_by_the_bigram_only():
    train = np.tile(np.arange(10), 500)
    got = ngram_baselines(train, train[:100], train[1:101], 10, 100)
    assert got.bigram < 0.05 and got.unigram == pytest.approx(math.log(10), rel=1e-3)


def test_real_rows_are_scored_on_exactly_the_models_targets(tokenizer, words):
    train = tokenise([Document(str(i), words(40)) for i in range(60)], tokenizer)
    rows = Rows(tokenise([Document(str(i), words(9)) for i in range(20)], tokenizer), 32, pad=tokenizer.pad)
    whole = evaluation(rows, token_bytes(tokenizer))
    got = ngram_baselines(train.tokens, *whole.pairs(), tokenizer.vocab_size, whole.bytes)
    assert 0 < got.bigram < got.unigram < math.log(tokenizer.vocab_size)
    assert got.bigram_bpb == pytest.approx(got.bigram * whole.tokens / whole.bytes / math.log(2))


def test_a_long_stream_is_counted_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(ngrams, "LONGEST", 10_000)
    monkeypatch.setattr(ngrams, "BLOCK", 64)
    train = np.array([rng.randrange(20) for _ in range(35_001)], np.uint16)
    pairs = np.array([rng.randrange(20) for _ in range(50)]), np.array([rng.randrange(20) for _ in range(50)])
    kept = train[:34_944].reshape(-1, 64)[::4].ravel()
    assert 8_000 < len(kept) <= 10_000
    assert ngram_baselines(train, *pairs, 20, 9) == ngram_baselines(kept, *pairs, 20, 9)


def test_no_target_and_no_byte_give_nan():
    got = ngram_baselines(np.arange(5), np.array([]), np.array([]), 5, 0)
    assert all(math.isnan(x) for x in got)


def test_four_million_tokens_are_quick(rng):
    numbers = np.random.default_rng(rng.randrange(2**32))
    train = (numbers.pareto(1.0, 4_000_000) * 10).clip(0, 4095).astype(np.uint16)
    start = time.process_time()
    ngram_baselines(train, train[:400_000].astype(np.int64), train[1:400_001].astype(np.int64), 4096, 10**6)
    assert time.process_time() - start < 6, "2 s on an idle core"
