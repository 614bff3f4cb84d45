"""Checkpoints that are whole or not there: written aside, synced, renamed; read back only when every byte agrees.

    root/step-00000123/  model.safetensors optim.safetensors ...   one shard for each prefix before the first '/'
                         state.json                                plain numbers: counters, data position
                         manifest.json                             size and sha256 of every other file

A crash at any moment leaves the previous checkpoints untouched: the work happens in `root/.tmp-*`, and one rename makes
it a checkpoint. sha256 because processors have instructions for it: 0.15 s for 250 MB where blake2b takes 0.28 s and
crc32, which only guards against accidents, 0.06 s; writing and syncing the same bytes takes 0.8 s.

Not here: what belongs into a checkpoint (the trainer), gathering of sharded state (the engine), weights for others
(interop/hf.py). Nothing is ever unpickled: safetensors and JSON only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import UserError
from moe.files import sync

TEMPORARY = ".tmp-"
# `.old` exists only between the two renames that replace a checkpoint of the same step
FOLDER = re.compile(r"step-(\d{8,})(\.old)?")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint whose every byte has been verified."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """`{"layers.0.w": ...}` for what was saved as `"<prefix>/layers.0.w"`; empty when nothing was."""
        from safetensors.torch import load_file

        file = self.path / f"{prefix}.safetensors"
        if not file.exists():
            return {}
        # a copy: the file is mapped, and the folder may be deleted while the tensors live
        return {name: tensor.clone() for name, tensor in load_file(file).items()}


def save(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    extra_files: dict[str, bytes | str] | None = None,
    warn: Callable[[str], Any] = warnings.warn,
) -> Path:
    """Write `root/step-XXXXXXXX` atomically, then delete all but the newest `keep` checkpoints.

    `tensors` are named `prefix/name`. `state` and `extra_files` travel along; keys of `state` come back as strings, as
    JSON has it. Whatever goes wrong, previous checkpoints stay as they are; a failing disk raises `UserError`.
    Checkpoints of later steps are deleted too: `load_latest` refused them, or this run would not be at this step.
    """
    from safetensors import SafetensorError

    assert step >= 0 and keep >= 1, (step, keep)
    root = Path(root)
    shards = _shards(tensors)
    texts: dict[str, bytes | str] = {"state.json": json.dumps(state), **(extra_files or {})}
    assert not set(texts) & {"manifest.json", *shards}, sorted(texts)
    final = root / f"step-{step:08d}"
    temporary = root / f"{TEMPORARY}{final.name}-{os.getpid()}-{time.time_ns()}"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, shards, texts)
        _publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # before the message: it also frees the space
        raise UserError(_failure(root, step, error)) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(root, final, keep, warn)
    return final


def load_latest(root: Path, warn: Callable[[str], Any] = warnings.warn) -> Checkpoint | None:
    """The newest checkpoint whose files all agree with its manifest; None when there is none at all.

    A damaged one costs a warning that names the file, and the one before it is taken.
    """
    root = Path(root)
    found = _found(root)
    for path in found:
        try:
            return Checkpoint(_step(path), path, _verify(path))
        except Damaged as damage:
            warn(f"checkpoint of step {_step(path)} is damaged: {path}/{damage}; falling back to the one before it")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {root} is whole; restore one from a backup, or start anew "
            f"with another run.dir=... (or delete {root})"
        )
    return None


class Damaged(Exception):
    """`<file> <what is wrong with it>`."""


# ------------------------------------------------------------------------------------------------------------- writing


def _shards(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, slash, rest = name.partition("/")
        assert slash and rest and re.fullmatch(r"[\w-][\w.-]*", prefix), f"{name!r} is not prefix/name"
        shards.setdefault(f"{prefix}.safetensors", {})[rest] = tensor
    return shards


def _savable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, no two overlapping: only the tensors that break a rule are copied."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name, tensor in sorted(ready.items(), key=lambda item: item[1].data_ptr()):
        if tensor.numel() and tensor.data_ptr() < end:  # tied weights, or views of one buffer
            ready[name] = tensor.clone()
        else:
            end = max(end, tensor.data_ptr() + tensor.nbytes)
    return ready


def _write(folder: Path, step: int, shards: dict[str, dict[str, Tensor]], texts: dict[str, bytes | str]) -> None:
    from safetensors.torch import save_file

    files = {}
    for name, tensors in shards.items():
        save_file(_savable(tensors), folder / name)
        files[name] = _seal(folder / name)
    for name, content in texts.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        files[name] = _seal(folder / name)
    (folder / "manifest.json").write_bytes(_sealed(json.dumps({"step": step, "files": files}).encode()))
    sync(folder / "manifest.json")
    sync(folder)


def _sealed(manifest: bytes) -> bytes:
    """The manifest vouches for itself: a flipped bit in it must not hide a shard."""
    return b"%s\n%s\n" % (manifest, hashlib.sha256(manifest).hexdigest().encode())


def _seal(file: Path) -> dict[str, Any]:
    """Make the file durable and describe it. Hashing what can be read back also catches a short write."""
    sync(file)
    return {"size": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():  # the same step again: the old one keeps counting until the new one stands
        old = final.with_name(final.name + ".old")
        if old.exists():
            _discard(old)
        os.rename(final, old)
    os.rename(temporary, final)
    sync(final.parent)


def _discard(path: Path) -> None:
    """Delete in two moves, so that an interruption never leaves half a checkpoint under a checkpoint's name."""
    doomed = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{time.time_ns()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _prune(root: Path, newest: Path, keep: int, warn: Callable[[str], Any]) -> None:
    stay = [path for path in _found(root) if _step(path) <= _step(newest) and not path.name.endswith(".old")][:keep]
    for path in [p for p in _found(root) if p not in stay] + sorted(root.glob(f"{TEMPORARY}*")):
        try:
            shutil.rmtree(path) if path.name.startswith(TEMPORARY) else _discard(path)
        except OSError as error:
            warn(f"old checkpoint {path} cannot be deleted ({_reason(error)}); delete it by hand to free its space")


def _failure(root: Path, step: int, error: Exception) -> str:
    last = next((path for path in _found(root) if (path / "manifest.json").exists()), None)
    good = f"the last good one is step {_step(last)} at {last}" if last else "there is no earlier one"
    return (
        f"checkpoint of step {step} cannot be written to {root}: {_reason(error)}; {good}; free some space or mend the "
        "disk, then run the same command again to resume (train.keep_checkpoints=1 needs the least room)"
    )


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------------- reading


def _step(path: Path) -> int:
    match = FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _found(root: Path) -> list[Path]:
    """Folders that look like checkpoints, newest first, a replaced one after its replacement."""
    try:
        paths = [path for path in root.iterdir() if FOLDER.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"checkpoint folder {root} cannot be read ({_reason(error)}); mend its permissions") from None
    return sorted(paths, key=lambda path: (-_step(path), path.name))


def _verify(path: Path) -> dict[str, Any]:
    """The state of a checkpoint after every file has been compared with the manifest."""
    name = "manifest.json"
    try:
        content = (path / name).read_bytes()
        text = content.partition(b"\n")[0]
        if content != _sealed(text):
            raise Damaged(f"{name} is altered or cut short")
        manifest = json.loads(text)
        if manifest["step"] != _step(path):
            raise Damaged(f"{name} belongs to step {manifest['step']}")
        for name, want in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != want["size"]:
                raise Damaged(f"{name} has {size} bytes instead of {want['size']}")
            if _digest(path / name) != want["sha256"]:
                raise Damaged(f"{name} is altered (sha256 differs)")
        return json.loads((path / "state.json").read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({_reason(error)})") from None


# ------------------------------------------------------------------------------------------------------ random numbers


def rng_state() -> dict[str, Tensor]:
    """State of every global generator of this process: torch (CPU, the current GPU), `random`, numpy."""
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    try:
        import numpy
    except ImportError:  # torch runs without it
        return state
    kind, words, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    assert kind == "MT19937", f"numpy's global generator is {kind}"
    state["numpy"] = torch.tensor([*words.tolist(), position, has_gauss], dtype=torch.int64)
    state["numpy_gauss"] = torch.tensor([gauss], dtype=torch.float64)
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Undo every draw since `rng_state()`. A generator that this machine or that record lacks is left alone."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), *(state["python_gauss"].tolist() or [None])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        *words, position, has_gauss = state["numpy"].tolist()
        keys = numpy.array(words, dtype=numpy.uint32)
        numpy.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
