"""Files that are whole or not there: what checkpoints, exports, caches and run folders write with.

Not here: what to do when the disk is full; each caller says what it was writing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's names."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and orders renames by itself
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, text: str) -> None:
    """Write a small file so that readers see the old content or the new, never half of either, also after a crash."""
    handle, temporary = tempfile.mkstemp(prefix=".building-", dir=path.parent)  # a name of its own: writers may race
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # renamed already, unless something failed
