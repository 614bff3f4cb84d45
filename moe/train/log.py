"""What a run says while it goes: metrics.jsonl, console, wandb, and the exit code of a recipe.

    metrics.jsonl    one JSON object an optimizer step; plots, reports and tests read only this
    Console          a bar on a terminal, plain lines elsewhere
    Wandb            the same records, if the user wants it and it works

Only rank 0 writes or prints; on other ranks everything here does nothing. rich is loaded for a terminal, wandb when it
is going to be used; a run needs neither.
Not here: the run folder (run_folder.py), what the numbers mean (trainer), plots (analysis/chart.py).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import netrc
import os
import secrets
import sys
import time
import urllib.parse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.config import LogConfig, UserError
from moe.files import replace
from moe.train.run_folder import RunFolder, environment, is_leader, open_run

__all__ = ["accuracies", "Console", "Metrics", "RunFolder", "Wandb", "entry", "environment", "is_leader", "open_run", "read_metrics"]

WANDB_PATIENCE = 15.0  # seconds; wandb alone would wait 100 for a server that is not there
WANDB_QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}  # the setting `silent` comes after the login


# -------------------------------------------------------------------------------------------------------------- metrics


class Metrics:
    """Appends to metrics.jsonl, one object a line and step; the first `write` drops what stands from its step on."""

    def __init__(self, path: str | Path):
        self.path, self._last = Path(path), 0
        self._file: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """One line, flushed. Tensors of one element become numbers; what is not finite becomes null and is listed."""
        if not is_leader():
            return
        step = record["step"]
        assert isinstance(step, int) and step > self._last, (step, self._last)
        nonfinite: list[str] = []
        plain = {key: _plain(value, key, nonfinite) for key, value in record.items()}
        if nonfinite:
            plain["nonfinite"] = sorted(set(nonfinite))
        try:
            if self._file is None:
                self.truncate(step - 1)
                self._file = open(self.path, "a", buffering=1, encoding="utf-8", newline="\n")
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); free some space, then resume with the same command"
            ) from None
        self._last = step

    def truncate(self, step: int) -> None:
        """Forget records after `step`, and a last line that a crash tore: the run continues from there."""
        self.close()
        self._last = step
        if is_leader() and self.path.exists():
            kept = {r["step"]: r for r in read_metrics(self.path) if r["step"] <= step}
            replace(self.path, "".join(json.dumps(record) + "\n" for record in kept.values()))

    def sync(self) -> None:
        """Onto the disk; before a checkpoint, so that no checkpoint is ahead of its metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported by `write`
                file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl; a torn last line is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); is it the metrics.jsonl of a run folder?") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is unfinished
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError):
            if any(lines[number:]):
                raise UserError(f"{path}, line {number} is not a record of a step; delete that line") from None
            break
        records.append(record)
    return records


def _plain(value: Any, key: str, nonfinite: list[str]) -> Any:
    if hasattr(value, "tolist"):  # tensors and numpy, without importing either
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v, key, nonfinite) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(key)
        return None
    return value


# -------------------------------------------------------------------------------------------------------------- console


class Console:
    """A progress bar on a terminal, plain lines elsewhere, silence on other ranks. Use it in a `with` block."""

    def __init__(self, steps: int, every: int = 10):
        self.steps, self.every = steps, every
        self._first: tuple[int, float] | None = None
        self._drawn = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._on = is_leader()
        self._terminal = self._on and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def header(self, rows: dict[str, Any]) -> None:
        """An aligned block: one row a label; a value of several lines stays in its column."""
        width = max(map(len, rows), default=0)
        for label, value in rows.items():
            first, *rest = str(value).splitlines() or [""]
            for head, text in [(label, first), *(("", more) for more in rest)]:
                self.line(f"{head:<{width}}  {text}".rstrip())

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._on:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        if self._bar is not None:
            self.line(f"warning: {text}")
        elif self._on:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        """Call it once an optimizer step with the step's metrics record."""
        if not self._on:
            return
        step, now = record["step"], time.monotonic()
        if self._first is None:
            self._first = (step, now)
        eta = (self.steps - step) * (now - self._first[1]) / max(1, step - self._first[0])
        parts = _parts(record) + ([f"eta {_duration(eta)}"] if 0 < eta else [])
        if self._terminal:
            self._draw(step, now, parts)
        elif step % self.every == 0 or step in (1, self.steps) or step == self._first[0]:
            self.line("  ".join([f"step {step}/{self.steps}", *parts]))
        if record.get("val/greedy") is not None:
            self.line(f"step {step}: {accuracies(record)}")
        elif record.get("val/bpb") is not None:
            self.line(f"step {step}: validation bpb {record['val/bpb']:.4f}, loss {_number(record, 'val/loss', '.4f')}")

    def close(self) -> None:
        """Leave the bar as it stands and give the cursor back."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
            self._bar = None
            atexit.unregister(self.close)

    def _draw(self, step: int, now: float, parts: list[str]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            columns = [
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(12),
                TextColumn("{task.fields[text]}"),
            ]
            # no refresh thread: one that holds a lock while a data worker is forked would hang the worker
            self._bar = Progress(*columns, auto_refresh=False)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.steps, text="")
            atexit.register(self.close)
        room = self._bar.console.width - 17 - 2 * len(str(self.steps)) - 4
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts = parts[:-2] + parts[-1:]  # the last, the time left, outlives the rest
        self._bar.update(self._task, completed=step, text="  ".join(parts))
        if now - self._drawn > 0.1 or step >= self.steps:
            self._drawn = now
            self._bar.refresh()


def _parts(record: dict[str, Any]) -> list[str]:
    """The figures of a step in order of importance; those that a run does not have are left out."""
    shown = [
        ("train/loss", lambda v: f"loss {v:.4f}"),
        ("train/bpb", lambda v: f"bpb {v:.3f}"),
        ("rl/reward", lambda v: f"reward {v:.3f}"),
        ("rl/zero_signal", lambda v: f"no signal {v:.0%}"),
        ("rl/entropy", lambda v: f"entropy {v:.2f}"),
        ("rl/logp_gap_max", lambda v: f"gap {v:.0e}"),
        ("rl/flip_rate", lambda v: f"flips {v:.1g}"),
        ("perf/tokens_per_s", lambda v: f"{v / 1e6:.2f}M tok/s" if v >= 1e6 else f"{v / 1e3:.1f}k tok/s"),
        ("moe/maxvio", lambda v: f"maxvio {v:.2f}"),
        ("perf/mfu", lambda v: f"mfu {100 * v:.1f}%"),
        ("train/lr", lambda v: f"lr {v:.1e}"),
    ]
    return [text(record[key]) for key, text in shown if record.get(key) is not None]


def accuracies(figures: dict[str, Any]) -> str:
    """`greedy 31.2 % (se 2.0), pass@1 ...` of every accuracy that has a standard error."""
    names = [k for k in figures if f"{k}_se" in figures]
    return ", ".join(
        f"{k.removeprefix('val/')} {100 * figures[k]:.1f} % (se {100 * figures[f'{k}_se']:.1f})" for k in names
    )


def _number(record: dict[str, Any], key: str, form: str) -> str:
    return format(record[key], form) if record.get(key) is not None else "?"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


# ---------------------------------------------------------------------------------------------------------------- wandb


class Wandb:
    """The same records for wandb, if the user wants it and it works. Never asks, never prints, never ends a run."""

    def __init__(self, cfg: LogConfig, folder: RunFolder, config: dict, warn: Callable[[str], Any]):
        self._run, self._warn, self.mode = None, warn, "disabled"
        if not is_leader():
            return
        mode = _wandb_mode(cfg.wandb, warn)
        if mode == "online" and not self._start(mode, cfg.project, folder, config):
            self._guard(_wandb_restart)
            mode = "offline"
        if mode == "offline":
            self._start(mode, cfg.project, folder, config)

    def log(self, record: dict[str, Any]) -> None:
        if self._run is not None:
            values = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
            self._guard(lambda: self._run.log(values, step=record["step"]))

    def finish(self) -> None:
        if self._run is not None:
            self._guard(self._run.finish)
            self._run = None

    def _start(self, mode: str, project: str, folder: RunFolder, config: dict) -> bool:
        try:
            for name, value in WANDB_QUIET.items():
                os.environ.setdefault(name, value)
            import wandb

            online = mode == "online"
            limits = {"finish_timeout": 60, **({"init_timeout": WANDB_PATIENCE} if online else {})}
            settings = wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, **limits)
            self._run = wandb.init(
                project=project,
                name=folder.path.resolve().name,
                id=_wandb_id(folder.path),
                resume="allow" if online else None,
                dir=folder.path,
                mode=mode,
                config=config,
                settings=settings,
                reinit="create_new",
            )
        except Exception as error:  # whatever wandb does, training goes on
            next_step = "logging offline" if mode == "online" else "going on without it"
            self._warn(f"wandb ({mode}) does not start: {_first_line(error)}; {next_step}")
            return False
        self.mode = mode
        return True

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # as above
            self._run, self.mode = None, "disabled"
            self._warn(f"wandb fails: {_first_line(error)}; going on without it (metrics.jsonl has everything)")


def _wandb_mode(mode: str, warn: Callable[[str], Any]) -> str:
    """What `log.wandb` comes to here: without a key, online would stop and ask."""
    if mode == "auto":
        wish = os.environ.get("WANDB_MODE")
        return wish if wish in ("offline", "disabled") else "online" if _wandb_key() else "disabled"
    if mode == "online" and not _wandb_key():
        warn(
            "log.wandb=online finds no key (WANDB_API_KEY, or `wandb login`); logging offline, `wandb sync` can send it"
        )
        return "offline"
    return mode


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in candidates:
        try:
            found = netrc.netrc(os.path.expanduser(file)).hosts.get(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return True
    return False


def _wandb_restart() -> None:
    """A failed start leaves wandb's service holding the run's id; a new service does not know it."""
    import wandb

    wandb.teardown()


def _wandb_id(path: Path) -> str:
    """One id a run folder, so that a resumed run continues its curves."""
    file = path / "wandb_id"
    if not file.exists():
        replace(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8").strip()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


# ---------------------------------------------------------------------------------------------------------------- entry


def entry(main: Callable[[], None]) -> None:
    """Run a recipe: a `UserError` is one line from rank 0 and exit code 2, Ctrl-C is 130, a bug keeps its traceback."""
    from moe import parallel

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # no file and line of ours

    def guarded() -> None:
        try:
            main()
        except UserError as error:
            raise SystemExit(_end(f"error: {' '.join(str(error).split())}", 2)) from None
        except KeyboardInterrupt:
            raise SystemExit(_end("interrupted; the same command with the same run.dir resumes", 130)) from None
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # what is left to flush has no reader
            raise SystemExit(_end("error: nobody reads the output any more; the same command resumes", 1)) from None
        except RuntimeError as error:
            if not parallel.lost_peer(error):
                raise
            text = "error: another rank is gone; look for its own message; the same command resumes from the last checkpoint"
            raise SystemExit(_end(text, 1, tellers=(0, 1))) from None  # the first rank may be the one that is gone

    parallel.record(guarded)()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and "deepspeed" in sys.modules:
        # all is written; at interpreter exit a thread of its libraries now and then aborts a rank
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end(text: str, code: int, tellers: tuple[int, ...] = (0,)) -> int:
    sys.stdout.flush()
    if int(os.environ.get("RANK") or 0) in tellers:
        print(text, file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:  # torchrun's table then shows the line, also if it is not rank 0 that failed
        info = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": info}}), encoding="utf-8")
    return code
