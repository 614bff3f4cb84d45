"""Runs a study: every cell an ordinary recipe in a process of its own, several at a time, until each has finished.

    finished      summary.json written by this very configuration: skipped
    interrupted   a run folder with checkpoints: the recipe resumes by itself
    failed        any other end: tried once more, then noted in the cell's `failed` and left alone until the next sweep

Nothing is remembered but run folders: after kill -9 the same command goes on where they stand. Ctrl-C and SIGTERM pass
on to the runs, which save. On Linux a run also ends, saving, when its sweep dies; elsewhere the next sweep waits for it.
Not here: what the runs are (grid.py), what is printed (progress.py), what they show (report.py), other machines: start one sweep a machine, each with
arms of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import UserError, to_dict
from moe.files import replace
from moe.study.grid import Cell, Study
from moe.study.progress import Screen
from moe.train.run_folder import finished

ROOT = Path(__file__).resolve().parents[2]
ATTEMPTS = 2
POLL = 0.5  # seconds between looks at the runs
PATIENCE = 120.0  # seconds that stopped runs have to save


class Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen
    attempt: int


def run(study: Study, recipes: Path) -> list[Cell]:
    """Bring every cell to its end; -> those that failed. `recipes`: the folder that holds study.recipe."""
    study.folder.mkdir(parents=True, exist_ok=True)
    lock = _hold(study.folder)
    if lock is None:
        raise UserError(f"study.folder={study.folder} is in use by another sweep; wait for it, or name another one")
    with lock, _asked_to_stop() as stop:
        todo = [(cell, 1) for cell in study.cells if finished(cell.config, cell.folder) is None]
        screen = Screen(study, len(study.cells) - len(todo))
        running: list[Running] = []
        failed: list[Cell] = []
        try:
            while (todo or running) and not stop:
                free = [entry for entry in todo if not _busy(entry[0].folder)]
                for cell, attempt in free[: study.settings.parallel - len(running)]:
                    todo.remove((cell, attempt))
                    running.append(_start(cell, study, recipes, attempt))
                time.sleep(POLL)
                for ended in [r for r in running if r.process.poll() is not None]:
                    running.remove(ended)
                    again = _settle(ended, screen)
                    if again and ended.attempt < ATTEMPTS:
                        todo.append((ended.cell, ended.attempt + 1))
                    elif again:
                        failed.append(ended.cell)
                screen.show([r.cell for r in running])
        finally:
            _stop([r.process for r in running])
            screen.end()
    if stop:
        done = sum(finished(cell.config, cell.folder) is not None for cell in study.cells)
        print(f"stopped: {done} of {len(study.cells)} runs are finished; the same command goes on", file=sys.stderr)
        raise SystemExit(130)
    return failed


# ----------------------------------------------------------------------------------------------------------- processes


def _start(cell: Cell, study: Study, recipes: Path, attempt: int) -> Running:
    """The recipe in a process group of its own, so that a Ctrl-C reaches it once, through us."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "failed").unlink(missing_ok=True)
    file = cell.folder / "cell.yaml"
    replace(file, json.dumps(to_dict(cell.config), indent=1) + "\n")  # JSON is YAML
    command = [sys.executable, recipes / f"{study.settings.recipe}.py", f"config={file}", f"run.dir={cell.folder}"]
    threads = str(cell.config.train.threads)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": path}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # the sweep's own launcher is not the run's
        env.pop(name, None)
    with open(cell.folder / "stdout.log", "ab") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
    return Running(cell, process, attempt)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the sweep dies, however it dies (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _settle(ended: Running, screen: Screen) -> bool:
    """Say how a run ended; -> whether it failed."""
    cell, code = ended.cell, ended.process.returncode
    done = finished(cell.config, cell.folder) if code == 0 else None
    if done is not None:
        screen.done += 1
        screen.line(
            f"{cell.name}: finished" + (f", validation loss {done['val/loss']:.4f}" if "val/loss" in done else "")
        )
        return False
    lines = (cell.folder / "stdout.log").read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    left = "tried again" if ended.attempt < ATTEMPTS else f"left alone; see {cell.folder / 'stdout.log'}"
    screen.line(f"{cell.name}: failed with code {code} ({said}); {left}")
    try:
        replace(cell.folder / "failed", f"code {code}, attempt {ended.attempt}: {said}\n")
    except (OSError, UserError) as error:  # a full disk may be why the run failed; the screen has said so
        screen.line(f"{cell.name}: {cell.folder / 'failed'} cannot be written: {error}")
    return True


def _stop(processes: list[subprocess.Popen]) -> None:
    """SIGTERM to every run's group, and SIGKILL to what has not saved in time."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one interrupts at once."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hold(folder: Path) -> Any:
    """The folder's lock file, locked until it is closed; None if another process holds it."""
    handle = open(folder / ".lock", "a+")
    try:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        handle.close()
        return None
    except (ImportError, OSError):  # Windows, or a file system without locks: go on without
        pass
    return handle


def _busy(folder: Path) -> bool:
    """Whether a run of an earlier sweep still writes here (run_folder.py holds the lock meanwhile)."""
    if not (folder / ".lock").exists():
        return False
    handle = _hold(folder)
    if handle is not None:
        handle.close()
    return handle is None
