"""From a configuration to rows of tokens: `prepare` is the one call that recipes make.

    corpus = prepare(cfg.data, cfg.model.vocab_size, rank, barrier, seed)
    corpus.train.share(rows_seen, rows, rank, world) -> Batch          corpus.val -> evaluation(...)

The first call reads the text, trains the tokenizer and fills `data.cache`; later ones find everything there:

    index-<hash of names, sizes and times of all source files, and of the settings>.json   what the fast path looks up
    tokenizer-<fingerprint>.json                                                           trained tokenizers
    <corpus>-<part>-<hash of corpus fingerprint, tokenizer fingerprint and split>/         token stores (store.py)

A touched but unchanged file costs a second reading, never a second tokenisation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.config import DataConfig, UserError
from moe.data import sources
from moe.data.ngrams import Baselines, ngram_baselines
from moe.data.packing import Batch, Evaluation, Rows, evaluation
from moe.data.store import FORMAT, Store, digest, read_store, stored, tokenise, write_text
from moe.data.tokenizer import Tokenizer, check_fits, token_bytes

__all__ = [
    "Baselines",
    "Batch",
    "Corpus",
    "Evaluation",
    "Rows",
    "Tokenizer",
    "evaluation",
    "ngram_baselines",
    "prepare",
]

TOKENIZER_TEXT = 16_000_000  # bytes a tokenizer is trained on: half of torch's sources, which compress as well as all


class Corpus(NamedTuple):
    tokenizer: Tokenizer
    train: Rows
    val: Rows
    card: dict[str, Any]
    """name, fingerprint, tokenizer (its fingerprint), vocab_size, skipped; docs, bytes and tokens of train and val."""
    token_bytes: np.ndarray
    """[V] bytes of text that each id stands for."""

    def rows(self, documents: list[sources.Document]) -> Rows:
        """Other text, such as `sources.unseen_english()`, as evaluation rows of the same shape."""
        return _validation(
            tokenise(documents, self.tokenizer), self.tokenizer, self.val.seq_len, self.val.mask_documents
        )

    def evaluation(self, tokens: int | None = None, rows: Rows | None = None) -> Evaluation:
        """About `tokens` tokens (None: all) of the validation rows, or of `rows`."""
        return evaluation(self.val if rows is None else rows, self.token_bytes, tokens)

    def baselines(self, evaluation: Evaluation) -> Baselines:
        """Unigram and bigram of the training text on the same targets."""
        inputs, targets = evaluation.pairs()
        return ngram_baselines(self.train.tokens, inputs, targets, self.tokenizer.vocab_size, evaluation.bytes)


def prepare(
    cfg: DataConfig, vocab_size: int, rank: int = 0, barrier: Callable[[], None] = lambda: None, seed: int = 0
) -> Corpus:
    """Rank 0 builds what the cache lacks while the others wait at `barrier`; then everyone reads.

    A rank that finds nothing after the barrier (no shared file system, or rank 0 failed) does the work itself, and so
    ends with the same corpus or the same error. `seed` orders the training rows.
    """
    if rank == 0:
        try:
            found = _find(cfg, vocab_size)
        finally:
            barrier()  # also when the user has something to mend: nobody is left waiting
        if found.card["skipped"]:
            reasons = sources.describe(found.card["skipped"])
            warnings.warn(f"{found.card['name']}: left out {reasons}", stacklevel=2)
    else:
        barrier()
        found = _find(cfg, vocab_size)
    train = Rows(found.train, cfg.seq_len, seed=seed, mask_documents=cfg.mask_documents)
    if len(train) == 0:
        raise UserError(
            f"data.seq_len={cfg.seq_len} is longer than the training text, {len(found.train.tokens)} tokens; "
            "lower it or name a larger source"
        )
    val = _validation(found.val, found.tokenizer, cfg.seq_len, cfg.mask_documents)
    return Corpus(found.tokenizer, train, val, found.card, token_bytes(found.tokenizer))


class _Found(NamedTuple):
    tokenizer: Tokenizer
    train: Store
    val: Store
    card: dict[str, Any]


def _find(cfg: DataConfig, vocab_size: int) -> _Found:
    given = None
    if cfg.tokenizer != "train":
        given = Tokenizer.load(cfg.tokenizer)
        check_fits(given, vocab_size, cfg.tokenizer)
    split = {"fraction": cfg.fraction} if cfg.path is None else {"val_fraction": cfg.val_fraction}
    settings = {
        **split,
        "corpus": cfg.corpus if cfg.path is None else None,
        "column": cfg.text_column if cfg.path is not None else None,
        "tokenizer": given.fingerprint if given else ["train", vocab_size],
        "format": FORMAT,
    }
    files = sources.listing(cfg.corpus, cfg.path)
    index = Path(cfg.cache) / f"index-{digest([settings, files])}.json"
    return _warm(index, given) or _cold(cfg, vocab_size, split, given, index)


def _warm(index: Path, given: Tokenizer | None) -> _Found | None:
    """What the index points to, if all of it is there and whole."""
    try:
        entry = json.loads(index.read_text(encoding="utf-8"))
        card, folder = entry["card"], index.parent
        tokenizer = given or Tokenizer.load(folder / f"tokenizer-{card['tokenizer']}.json")
        stores = [read_store(folder / entry[part], warn=False) for part in ("train", "val")]  # `_cold` warns
    except (OSError, ValueError, KeyError, TypeError):  # a UserError is a ValueError
        return None
    if tokenizer.fingerprint != card["tokenizer"] or any(store is None for store in stores):
        return None
    return _Found(tokenizer, stores[0], stores[1], card)


def _cold(cfg: DataConfig, vocab_size: int, split: dict, given: Tokenizer | None, index: Path) -> _Found:
    """Read the source, train the tokenizer if none is given, tokenise what no store holds yet, write the index."""
    if cfg.path is None:
        docs = sources.embedded(cfg.corpus, cfg.fraction)
    else:
        docs = sources.local(cfg.path, cfg.text_column, cfg.val_fraction)
    # The standard mark of a cache folder: backups skip it, and so do we where data.path contains data.cache.
    write_text(index.parent / sources.CACHE_MARK, "Signature: 8a477f597d28d172789f06886806bc55\n")
    tokenizer = given or Tokenizer.train(sources.sample(docs.train, TOKENIZER_TEXT), vocab_size)
    if given is None:
        tokenizer_file = index.parent / f"tokenizer-{tokenizer.fingerprint}.json"
        write_text(tokenizer_file, tokenizer.text)
    key = {"corpus": docs.fingerprint, "tokenizer": tokenizer.fingerprint, **split}
    name = "local" if cfg.path is not None else cfg.corpus
    entry: dict[str, Any] = {}
    stores = {}
    for part, documents in (("train", docs.train), ("val", docs.val)):
        folder, stores[part] = stored(cfg.cache, f"{name}-{part}", {**key, "part": part}, documents, tokenizer)
        entry[part] = folder.name
    counts = {what: {part: stores[part].card[what] for part in stores} for what in ("docs", "bytes", "tokens")}
    card = {"name": docs.name, "fingerprint": docs.fingerprint, "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, **counts, "skipped": dict(docs.skipped)}  # fmt: skip
    write_text(index, json.dumps({**entry, "card": card}, indent=1, ensure_ascii=False))
    return _Found(tokenizer, stores["train"], stores["val"], card)


def _validation(store: Store, tokenizer: Tokenizer, seq_len: int, mask_documents: bool) -> Rows:
    return Rows(store, seq_len, pad=tokenizer.pad, mask_documents=mask_documents)
