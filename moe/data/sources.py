"""Where documents come from, and which of them are held out for validation.

    embedded("torch" | "stdlib", fraction)      Python sources that are already installed; nothing is downloaded
    local(path, text_column, val_fraction)      a text file, a .jsonl file, or a folder of both
    unseen_code(), unseen_english()             evaluation text that no default training run has seen

Each split is a pure function of a document's own hash, never of position or of a random generator: embedded files by
their path, local documents by their text, so that identical documents never stand on both sides. Documents are held
in memory, which suits corpora of up to a few gigabytes.

Bad input is skipped and counted by reason, not raised; only a source without one usable document is an error.
`listing` describes a source by names, sizes and times without opening a file: the key of the warm start.
Not here: Hugging Face datasets, parquet, mixtures.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from moe.config import UserError

MAX_ROW = 10_000_000  # bytes of one jsonl line; a longer one is far more often a broken file than a document
PIECE = 65_536  # largest piece of a text that must be cut to have two parts
CACHE_MARK = "CACHEDIR.TAG"
ROW_FILES = (".jsonl", ".ndjson")
INSTEAD = "use data.path=FOLDER_OR_FILE with your own text"


class Document(NamedTuple):
    identity: str
    """What the split hashes: a path for embedded files, the sha256 of the text for local ones."""
    text: str

    @property
    def hash(self) -> int:
        return int(hashlib.sha256(self.identity.encode()).hexdigest(), 16)


class Documents(NamedTuple):
    name: str
    fingerprint: str
    """12 hex digits over identity and text of every document, whichever part or fraction is used."""
    train: list[Document]
    val: list[Document]
    skipped: Counter[str]
    """reason -> number of rows or files left out."""


class _Filter(NamedTuple):
    """Which files of an installed source tree are text worth learning."""

    top: tuple[str, ...]  # leading folders or files, as prefixes of the POSIX relative path
    anywhere: tuple[str, ...]
    shortest: int
    longest: int = 150_000


_TORCH = _Filter(
    top=("testing/", "utils/benchmark/", "_vendor/", "_inductor/fx_passes/serialized_patterns/",
         "sparse/_triton_ops_meta.py", "version.py"),
    anywhere=("/_generated",), shortest=400,
)  # fmt: skip
_STDLIB = _Filter(  # _sysconfigdata holds the paths of the machine that built the interpreter
    top=("test", "idlelib/", "lib2to3/", "tkinter/", "turtledemo/", "distutils/", "ensurepip/", "encodings/",
         "pydoc_data/", "config-", "site-packages/", "dist-packages/", "_sysconfigdata"),
    anywhere=("/test",), shortest=200,
)  # fmt: skip
_FILTERS = {"torch": _TORCH, "stdlib": _STDLIB}


# ------------------------------------------------------------------------------------------------------- embedded text


def embedded(corpus: str, fraction: float = 1.0) -> Documents:
    """Python sources of the installed torch, or of the interpreter's standard library.

    A file whose path hashes to 0 modulo 25 is validation. Of the rest, `fraction` keeps those whose remaining hash,
    read as a binary fraction with its lowest bit first, is below it: 0.5 keeps even quotients, and a smaller fraction
    is a subset of a larger one. For torch 2.13.0: 77 validation files, 1,704 training files, 859 of them at 0.5.
    """
    root, rules, skipped, found = _root(corpus), _FILTERS[corpus], Counter(), []
    for relative in _python_files(corpus):
        try:
            text = (root / relative).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
            continue
        if rules.shortest <= len(text) <= rules.longest:
            found.append(Document(relative, text))
    val = [d for d in found if d.hash % 25 == 0]
    train = [d for d in found if d.hash % 25 != 0 and _place(d.hash // 25) < fraction]
    if not val or not train:
        raise UserError(f"data.fraction={fraction} of data.corpus={corpus} leaves no training file; raise it")
    return Documents(_embedded_name(corpus), _fingerprint(found), train, val, skipped)


def unseen_code() -> list[Document]:
    """Validation part of the standard library: other people's code, unseen unless data.corpus=stdlib."""
    return embedded("stdlib").val


def unseen_english() -> list[Document]:
    """Python's language reference as plain English text, one document a topic (pydoc_data.topics)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this interpreter has no pydoc_data.topics; evaluate on your own text with data.path") from None
    return [Document(name, text) for name, text in sorted(topics.items())]


def sample(documents: list[Document], limit: int) -> list[str]:
    """Texts of about `limit` bytes: all of them, or the half, quarter, ... that fits, chosen by hash."""
    total, share = sum(len(d.text) for d in documents), 1.0
    while total * share > limit:
        share /= 2
    return [d.text for d in documents if _place(d.hash // 25) < share] or [documents[0].text[:limit]]


def _root(corpus: str) -> Path:
    spec = importlib.util.find_spec("torch") if corpus == "torch" else None  # finds the folder, imports nothing
    origin = spec.origin if spec else (getattr(os, "__file__", None) if corpus == "stdlib" else None)
    other = "stdlib" if corpus == "torch" else "torch"
    if origin is None or not os.path.isfile(origin):
        raise UserError(
            f"data.corpus={corpus}: its Python sources are not on this machine as files (a zipped or embeddable "
            f"build?); use data.corpus={other}, or {INSTEAD}"
        )
    return Path(origin).parent


def _python_files(corpus: str) -> list[str]:
    """POSIX relative paths of the files that the filter keeps by name, sorted."""
    root, rules, kept = _root(corpus), _FILTERS[corpus], []
    for folder, names, files in os.walk(root):
        if corpus == "stdlib" and Path(folder) == root:
            names[:] = [n for n in names if n not in ("site-packages", "dist-packages")]  # huge, and filtered anyway
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else relative + "/"
        kept += [prefix + file for file in files if file.endswith(".py")]
    kept = [p for p in kept if not p.startswith(rules.top) and not any(part in p for part in rules.anywhere)]
    if not kept:
        other = "stdlib" if corpus == "torch" else "torch"
        raise UserError(f"data.corpus={corpus}: {root} holds no .py files; use data.corpus={other}, or {INSTEAD}")
    return sorted(kept)


def _embedded_name(corpus: str) -> str:
    if corpus == "stdlib":
        return f"stdlib {platform.python_version()}"
    try:
        return f"torch {version('torch')}"
    except PackageNotFoundError:
        return "torch"


def _place(number: int) -> float:
    """The number's lowest 32 bits as a binary fraction in [0, 1), lowest bit first."""
    return int(f"{number & 0xFFFFFFFF:032b}"[::-1], 2) / 2**32


def _fingerprint(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for d in documents:
        digest.update(f"{d.identity}\0{hashlib.sha256(d.text.encode()).hexdigest()}".encode())
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------ your own text


def local(path: str, text_column: str = "text", val_fraction: float = 0.04) -> Documents:
    """A text file, a .jsonl file (one object a line, its text under `text_column`), or a folder of such files.

    A folder is read recursively in the order of POSIX relative paths. Every file counts that is valid UTF-8 without
    NUL bytes, whatever its suffix; hidden files and folders (a leading dot) and caches (folders with a CACHEDIR.TAG)
    do not exist. Each text file is one document, each line of a .jsonl or .ndjson file another.

    A document is validation if the hash of its text falls below `val_fraction`. A source of fewer than
    1 / val_fraction documents (a single large text file, a few books) cannot be split that way, so its documents are
    cut at line ends into contiguous pieces of at most 64 kB, and the pieces are split instead.
    """
    skipped: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    found: list[Document] = []
    for file in _local_files(path):
        if file.suffix.lower() in ROW_FILES:
            texts = _rows(file, text_column, skipped, columns)
        else:
            texts = _whole(file, skipped)
        found += [Document(hashlib.sha256(t.encode()).hexdigest(), t) for t in texts]
    if not found:
        raise _nothing_usable(path, text_column, skipped, columns)
    fingerprint = _fingerprint(found)
    if len(found) < 1 / val_fraction:
        found = _cut(found, val_fraction)
    if len(found) < 2:
        raise UserError(f"data.path={path} holds too little text to train and validate on; name a larger source")
    train, val = _hold_out(found, val_fraction)
    return Documents(path, fingerprint, train, val, skipped)


def listing(corpus: str | None, path: str | None) -> list[tuple[str, int, int]]:
    """(relative path, size, mtime_ns) of every file a source would read: equal lists, equal documents.

    This is what a warm start checks instead of reading and hashing 30 MB. An edit that keeps a file's size and its
    time stamp to the nanosecond goes unnoticed; delete the cache folder in that case.
    """
    if path is not None:
        root, files = Path(path), [(str(f), f) for f in _local_files(path)]
    else:
        root = _root(corpus)
        files = [(relative, root / relative) for relative in _python_files(corpus)]
    stats = [(name, file.stat()) for name, file in files]
    return [(str(root.absolute()), 0, 0), *((n, s.st_size, s.st_mtime_ns) for n, s in stats)]


def _local_files(path: str) -> list[Path]:
    root = Path(path)
    if not root.exists():
        raise UserError(f"data.path={path} does not exist; name a text file, a .jsonl file or a folder of them")
    if not root.is_dir():
        return [root]
    found, seen = [], set()
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or CACHE_MARK in files:  # a link that leads back up; our own cache
            names[:] = []
            continue
        seen.add(real)
        names[:] = [n for n in names if not n.startswith(".")]
        found += [Path(folder) / f for f in files if not f.startswith(".")]
    found = sorted((f for f in found if f.is_file()), key=lambda f: f.relative_to(root).as_posix())
    if not found:
        raise UserError(f"data.path={path} is an empty folder; put text or .jsonl files into it, or name another")
    return found


def _whole(file: Path, skipped: Counter[str]) -> Iterator[str]:
    """The file's text, if it is text."""
    with _opened(file) as handle:
        head = handle.read(8192)
        raw = head if b"\0" in head else head + handle.read()
    if b"\0" in raw:
        skipped["binary file"] += 1
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["file not UTF-8"] += 1
        return
    if text.strip():
        yield text
    else:
        skipped["empty file"] += 1


def _rows(file: Path, column: str, skipped: Counter[str], columns: Counter[str]) -> Iterator[str]:
    """Texts of a .jsonl file; blank lines do not count, bad rows are counted in `skipped`."""
    with _opened(file) as handle:
        while line := handle.readline(MAX_ROW + 1):
            if len(line) > MAX_ROW:
                skipped[f"row over {MAX_ROW // 1_000_000} MB"] += 1
                while line and not line.endswith(b"\n"):
                    line = handle.readline(MAX_ROW)
                continue
            if not line.strip():
                continue
            text, reason = _row_text(line, column, columns)
            if reason:
                skipped[reason] += 1
            else:
                yield text


def _row_text(line: bytes, column: str, columns: Counter[str]) -> tuple[str, str]:
    """(text, "") or ("", reason)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "", "row not UTF-8"
    except (ValueError, RecursionError):  # RecursionError: a line of ten thousand brackets
        return "", "invalid JSON"
    if not isinstance(row, dict):
        return "", "row not an object"
    columns.update(row.keys())
    if column not in row:
        return "", f"no column {column!r}"
    text = row[column]
    if text is None:
        return "", "null text"
    if not isinstance(text, str):
        return "", "text not a string"
    if not text.strip():
        return "", "empty text"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
        return "", "invalid unicode"
    return text, ""


def _opened(file: Path):
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"data.path: {file} cannot be read ({error.strerror}); mend or move it") from None


def _nothing_usable(path: str, column: str, skipped: Counter[str], columns: Counter[str]) -> UserError:
    if columns and set(skipped) == {f"no column {column!r}"}:
        names = ", ".join(name for name, _ in columns.most_common(10))
        return UserError(
            f"data.text_column={column!r} is in no row of {path}; its columns are {names}; "
            f"set data.text_column={columns.most_common(1)[0][0]}"
        )
    return UserError(
        f"data.path={path} holds no usable text ({describe(skipped)}); name UTF-8 text files or .jsonl with the "
        f"column data.text_column={column}"
    )


def describe(skipped: Counter[str] | dict[str, int]) -> str:
    """`3 null text, 1 invalid JSON`, most frequent first."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(skipped).most_common()) or "nothing there"


def _hold_out(found: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split by hash; each side keeps at least one document."""
    hashes = [d.hash for d in found]
    held = {i for i, h in enumerate(hashes) if h < val_fraction * 2**256}
    order = sorted(range(len(found)), key=lambda i: (hashes[i], i))
    held = (held or {order[0]}) if len(held) < len(found) else held - {order[-1]}
    return [d for i, d in enumerate(found) if i not in held], [d for i, d in enumerate(found) if i in held]


def _cut(found: list[Document], val_fraction: float) -> list[Document]:
    """Contiguous pieces that join to the same texts; ends of lines where lines are short enough."""
    total = sum(len(d.text) for d in found)
    size = min(PIECE, int(total * val_fraction / 4))  # about four pieces are held out
    size = max(1, size, min(1000, total // 2))  # shorter ones would be all borders
    pieces = []
    for document in found:
        text, start = document.text, 0
        while start < len(text):
            end = text.rfind("\n", start, start + size) + 1
            if end <= start or start + size >= len(text):
                end = start + size
            piece = text[start:end]
            pieces.append(Document(hashlib.sha256(piece.encode()).hexdigest(), piece))
            start = end
    return pieces
