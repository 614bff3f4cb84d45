"""The token store: a tokenised corpus on disk, written once and memory-mapped ever after.

    tokens.npy   [N] uint16 (uint32 above 65,535 ids): BOS, document, EOS, BOS, document, EOS, ...
    offsets.npy  [documents + 1] int64, where each document starts; the last is N
    card.json    fingerprints of corpus and tokenizer, counts, bytes of text, versions, checksum

A store appears by the rename of a finished folder, so a reader finds a whole one or none, and two processes that build
the same one both end well. A damaged one is rebuilt with a warning. Nothing is unpickled.
Not here: what decides a store's name (`moe.data.prepare`), rows (packing.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.config import UserError
from moe.data.sources import Document
from moe.data.tokenizer import Tokenizer
from moe.files import replace, sync

FORMAT = 1  # raise when the store's layout or meaning changes: old ones are then simply not found


class Store(NamedTuple):
    tokens: np.ndarray
    offsets: np.ndarray
    card: dict


def tokenise(documents: list[Document], tokenizer: Tokenizer) -> Store:
    """Documents -> one stream in memory; each is closed by EOS and, where the tokenizer has one, opened by BOS."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    before, after = ([] if tokenizer.bos is None else [tokenizer.bos]), [tokenizer.eos]
    parts, lengths = [np.empty(0, dtype)], []
    for texts in _batches(documents):
        for ids in tokenizer.encode_batch(texts):
            parts.append(np.array(before + ids + after, dtype=dtype))
            lengths.append(len(parts[-1]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    text_bytes = sum(len(d.text.encode()) for d in documents)
    card = {"docs": len(documents), "bytes": text_bytes, "tokens": int(offsets[-1])}
    return Store(np.concatenate(parts), offsets, card)


def stored(
    cache: str | os.PathLike,
    name: str,
    key: dict[str, Any],
    documents: list[Document],
    tokenizer: Tokenizer,
) -> tuple[Path, Store]:
    """(folder, store) of `documents`; `key` holds everything that determines them and names the folder."""
    folder = Path(cache) / f"{name}-{digest({**key, 'format': FORMAT})}"
    store = read_store(folder)
    if store is None:
        fresh = tokenise(documents, tokenizer)
        versions = {m: version(m) for m in ("tokenizers", "numpy")} | {"python": platform.python_version()}
        store = _write_store(folder, fresh._replace(card={**key, **fresh.card, "versions": versions}))
    return folder, store


def read_store(folder: Path, warn: bool = True) -> Store | None:
    """Memory-mapped store; None where there is none, and None with a warning where it is damaged."""
    if not folder.exists():
        return None
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        fits = len(offsets) == card["docs"] + 1 and len(tokens) == card["tokens"] == offsets[-1]
        if not fits or card["checksum"] != _checksum(tokens, offsets):
            raise ValueError("its content does not match its card")
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
        if warn and folder.exists():  # gone: another process is replacing it right now
            warnings.warn(f"token cache {folder} is damaged and will be rebuilt: {error}", stacklevel=2)
        return None
    return Store(tokens, offsets, card)


def _write_store(folder: Path, store: Store) -> Store:
    """Build beside the target, then rename: a reader finds a whole store or none, whoever else is writing."""
    card = {**store.card, "checksum": _checksum(store.tokens, store.offsets)}
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        os.chmod(temporary, 0o755)  # mkdtemp's folder is private; a shared cache is for everyone
        np.save(temporary / "tokens.npy", store.tokens, allow_pickle=False)
        np.save(temporary / "offsets.npy", store.offsets, allow_pickle=False)
        (temporary / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        _publish(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        raise _unwritable(folder.parent, error) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return read_store(folder, warn=False) or store._replace(card=card)


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place. A good store that appeared meanwhile stays; a damaged one is moved out of the way."""
    for _ in range(10):  # each round lost means that another process moved something in between
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            failure = error
        if read_store(folder, warn=False) is not None:
            return
        aside = tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent)
        try:
            os.rename(folder, Path(aside) / "store")
        except FileNotFoundError:
            pass  # another process moved it first
        shutil.rmtree(aside, ignore_errors=True)
    raise failure


def write_text(path: Path, text: str) -> None:
    """A small file of the cache, whole or not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(cache: Path, error: OSError) -> UserError:
    why = error.strerror or error
    return UserError(f"data.cache={cache} cannot be written ({why}); free space there or set data.cache elsewhere")


def digest(values: Any) -> str:
    """16 hex digits over plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _checksum(*arrays: np.ndarray) -> int:
    """CRC of up to 256 blocks of 256 kB spread over each array: all of a small store, a constant price for a large."""
    crc, block = 0, 1 << 18
    for array in arrays:
        raw = np.ascontiguousarray(array).view(np.uint8) if array.size else np.empty(0, np.uint8)
        count = min(256, -(-len(raw) // block))
        starts = np.linspace(0, max(0, len(raw) - block), count).astype(np.int64)
        for start in starts:
            crc = zlib.crc32(raw[start : start + block], crc)
    return crc


def _batches(documents: list[Document], size: int = 4_000_000) -> Iterator[list[str]]:
    """Texts in groups of about `size` characters, so that a large corpus is never in memory as Python lists of ids."""
    texts, length = [], 0
    for document in documents:
        texts.append(document.text)
        length += len(document.text)
        if length >= size:
            yield texts
            texts, length = [], 0
    if texts:
        yield texts
