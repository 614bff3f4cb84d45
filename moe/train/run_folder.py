"""The folder of a run: who started it, with which configuration and code, and whether it may be continued.

    run.dir/  config.yaml env.json git.diff     written once; a folder with a config.yaml is complete
              tokenizer.json                    with it the folder can be generated from
              env.json "resumed"                what was different each time the run was taken up again
              metrics.jsonl wandb_id            log.py
              checkpoints/ plots/ export/       checkpoint.py, analysis/chart.py, interop/hf.py

Not here: what a run writes while it goes (log.py), names of run folders (the recipe).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from moe.config import UserError, differences, to_dict
from moe.files import replace

PACKAGES = [
    "torch",
    "numpy",
    "triton",
    "deepspeed",
    "omegaconf",
    "safetensors",
    "tokenizers",
    "datasets",
    "transformers",
]
# no number of a run depends on these; ranks and ZeRO stage change the order of sums alone
FREE_TO_CHANGE = ("run.dir:", "run.dry_run:", "log.", "train.save_every:", "train.keep_checkpoints:", "train.zero_stage:")
DIFF_LIMIT = 1_000_000


def is_leader() -> bool:
    """Rank 0 of a launcher, or the only process."""
    return int(os.environ.get("RANK") or 0) == 0


@dataclass(frozen=True)
class RunFolder:
    path: Path
    resumed: bool  # rank 0 alone knows

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def export(self) -> Path:
        return self.path / "export"


def open_run(cfg: Any, dir: str | Path, extra: dict[str, Any] | None = None, tokenizer: str = "") -> RunFolder:
    """Create the run folder, or reopen it if it belongs to the same configuration and nobody else is writing to it.

    `tokenizer`: text of its tokenizer.json. `extra` goes into env.json: fingerprints of corpus and tokenizer, sizes. Raises `UserError` for a folder that
    another configuration started, naming the keys that differ.
    """
    import yaml

    path = Path(dir)
    if not is_leader():
        return RunFolder(path, False)
    text = yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True)
    config = path / "config.yaml"
    try:
        path.mkdir(parents=True, exist_ok=True)
        _lock(path)
        if config.exists():
            _check_same(path, config, yaml.safe_load(text))
            _note_resumption(path)
            return RunFolder(path, True)
        if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():
            raise UserError(f"run.dir={path} holds a run without its config.yaml; choose another run.dir=...")
        code, diff = git_state(Path(__file__).resolve().parents[2])
        replace(path / "env.json", json.dumps({**environment(), **code, **(extra or {})}, indent=2) + "\n")
        if diff:
            replace(path / "git.diff", diff)
        if tokenizer:
            replace(path / "tokenizer.json", tokenizer)
        replace(config, text)  # last: a folder with a config.yaml is complete
    except OSError as error:
        raise UserError(
            f"run.dir={path} cannot be written ({error.strerror or error}); choose another run.dir=..."
        ) from None
    return RunFolder(path, False)


def environment() -> dict[str, Any]:
    """Everything besides config and code that can change a number or a speed, as plain values."""
    import torch

    from moe.kernels.configs import table_hash

    try:
        tiles = table_hash()
    except ValueError as error:
        raise UserError(f"{error}; take the file of the release") from None

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "world_size": int(os.environ.get("WORLD_SIZE") or 1),
        "versions": versions,
        "kernel_table": tiles,
    }


def git_state(root: Path) -> tuple[dict[str, Any], str]:
    """({commit, dirty}, uncommitted changes including new source files), or ({}, "") when `root` is no checkout."""

    def git(*args: str, **env: str) -> str:
        command = ["git", "-C", str(root), *args]
        # never take the index lock: a run must not disturb a commit that is being made
        return subprocess.run(
            command, capture_output=True, check=True, timeout=30, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", **env}
        ).stdout.decode(errors="replace")  # fmt: skip

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
            return {}, ""  # installed inside somebody else's checkout
        commit = git("rev-parse", "HEAD").strip()
        fresh = git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py", "*.yaml", "*.yml", "*.cpp")
        with tempfile.TemporaryDirectory() as folder:  # variants are new files: show them through a private index
            index = os.path.join(folder, "index")
            Path(index).write_bytes((root / git("rev-parse", "--git-path", "index").strip()).read_bytes())
            if fresh:
                git("add", "--intent-to-add", "--", *fresh.strip("\0").split("\0"), GIT_INDEX_FILE=index)
            diff = git("diff", "HEAD", GIT_INDEX_FILE=index)
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return {}, ""
    if len(diff) > DIFF_LIMIT:
        diff = diff[:DIFF_LIMIT] + f"\n... cut at {DIFF_LIMIT} characters\n"
    return {"git_commit": commit, "git_dirty": bool(diff)}, diff


_locks: dict[Path, Any] = {}


def _lock(path: Path) -> None:
    """Two processes that append to one metrics.jsonl would both be lost; the system frees the lock when we end."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    path = path.resolve()
    if path in _locks:
        return
    handle = open(path / ".lock", "a+")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        handle.close()
        raise UserError(
            f"run.dir={path} is in use by another process; wait for it or choose another run.dir=..."
        ) from None
    except OSError:  # a file system without locks
        handle.close()
        return
    _locks[path] = handle


def refuse_another(cfg: Any, dir: str | Path) -> None:
    """Raise UserError where the folder belongs to another configuration: before work that comes ahead of `open_run`."""
    config = Path(dir) / "config.yaml"
    if config.exists():
        _check_same(Path(dir), config, to_dict(cfg))


def finished(cfg: Any, dir: str | Path) -> dict[str, Any] | None:
    """summary.json of the run that this very configuration has already completed in this folder."""
    path = Path(dir)
    config, summary = path / "config.yaml", path / "summary.json"
    if not (config.exists() and summary.exists()) or _changed(config, to_dict(cfg)):
        return None  # `open_run` says what differs
    try:
        return json.loads(summary.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{summary} is damaged; delete it, and the same command makes it again") from None


def saved_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration that a run folder was started with, as plain values."""
    import yaml

    file = Path(path) / "config.yaml"
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert isinstance(values, dict)
        return values
    except (yaml.YAMLError, UnicodeDecodeError, AssertionError):
        raise UserError(f"{file} is damaged; restore it or choose another run.dir=...") from None


def _changed(config: Path, new: dict) -> list[str]:
    """Differences that change a run's numbers between a folder's config.yaml and a new configuration."""
    return [line for line in differences(saved_config(config.parent), new) if not line.startswith(FREE_TO_CHANGE)]


def _check_same(path: Path, config: Path, new: dict) -> None:
    changed = _changed(config, new)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"run.dir={path} was started with another configuration ({', '.join(changed[:3])}{more}); choose another "
            "run.dir=... for this one, or undo the change to resume"
        )


def _note_resumption(path: Path) -> None:
    """Add to env.json what is different this time, so that a curve from two machines says so."""
    file = path / "env.json"
    first = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    code, diff = git_state(Path(__file__).resolve().parents[2])
    now = {**environment(), **code}
    again = first.setdefault("resumed", [])
    again.append({key: value for key, value in now.items() if first.get(key) != value})
    if diff and diff != ((path / "git.diff").read_text(encoding="utf-8") if (path / "git.diff").exists() else ""):
        replace(path / f"git.resumed-{len(again)}.diff", diff)
    replace(file, json.dumps(first, indent=2) + "\n")
