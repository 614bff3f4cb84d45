"""What a sweep says before and while it runs: the plan of `--dry-run`, and one line of progress."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moe.analysis import ceiling, planner
from moe.study.grid import Cell, Study
from moe.train.run_folder import finished
from moe.train.summary import USUAL_MFU

DRAW, QUIET = 0.5, 60.0  # seconds between lines on a terminal, where they replace each other, and elsewhere


def dry_run(study: Study) -> None:
    """Every run with parameters and expected time; writes and starts nothing."""
    train = study.cells[0].config.train
    cuda = train.device != "cpu" and torch.cuda.is_available()
    dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16
    peak = ceiling.peak_flops("cuda" if cuda else "cpu", dtype, train.threads)
    done = {cell.name: finished(cell.config, cell.folder) for cell in study.cells}
    records = {cell.arm: record for cell in study.cells if "perf/seconds" in (record := last_record(cell.folder))}
    measured = {arm: record["perf/seconds"] / record["step"] * train.steps for arm, record in records.items()}
    rows = [("run", "parameters", "active", "expected", "")]
    total = left = 0.0
    for cell in study.cells:
        size, name = planner.parameters(cell.config.model), cell.name
        seconds = measured.get(cell.arm, _planned(cell.config, peak.flops))
        total, left = total + seconds, left + (0.0 if done[name] else seconds)
        state = "finished" if done[name] else "begun" if cell.folder.exists() else ""
        rows.append((name, planner.si(size.total), planner.si(size.active), duration(seconds), state))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, *figures, state in rows:
        print("  ".join([name.ljust(widths[0]), *(f.rjust(w) for f, w in zip(figures, widths[1:])), state]).rstrip())
    at_once = min(study.settings.parallel, len(study.cells))
    print(
        f"\n{len(study.cells)} runs, {at_once} at a time: about {duration(left / at_once)} to go of "
        f"{duration(total / at_once)} of training, validation apart (arms that have begun as measured, others at "
        f"{USUAL_MFU:.0%} of {peak.flops / 1e9:,.0f} GFLOP/s)\nstudy folder: {study.folder} (nothing started: dry run)"
    )


def _planned(config: Any, peak: float) -> float:
    """Seconds of training by the recipe's FLOPs; NaN where a step is more than its tokens (grpo)."""
    if not hasattr(config, "data"):
        return math.nan
    tokens = config.train.batch_tokens * config.train.steps
    return planner.mfu_flops(config.model, config.data.seq_len) * tokens / (peak * USUAL_MFU)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Screen:
    """One line of progress, drawn anew on a terminal and repeated once a minute elsewhere."""

    def __init__(self, study: Study, done: int) -> None:
        self.study, self.done = study, done
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._shown, self._begun, self._taken = 0.0, time.monotonic(), self._steps()
        self.line(f"{len(study.cells)} runs, {done} of them finished before; folder {study.folder}")

    def show(self, running: list[Cell]) -> None:
        now = time.monotonic()
        if now - self._shown < (DRAW if self._terminal else QUIET):
            return
        self._shown, parts = now, [f"{self.done}/{len(self.study.cells)} finished"]
        steps, total = self._steps(), sum(cell.config.train.steps for cell in self.study.cells)
        if steps > self._taken:
            parts.append(f"about {duration((total - steps) * (now - self._begun) / (steps - self._taken))} left")
        for cell in running:
            record = last_record(cell.folder)
            loss = f" loss {record['train/loss']:.3f}" if record.get("train/loss") is not None else ""
            parts.append(f"{cell.name} {record.get('step', 0)}/{cell.config.train.steps}{loss}")
        if self._terminal:
            room = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{'  '.join(parts)[:room]}", end="", flush=True)
        else:
            self.line("  ".join(parts))

    def line(self, text: str) -> None:
        """A line that stays."""
        self.end()
        print(text, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", flush=True)

    def _steps(self) -> int:
        return sum(last_record(cell.folder).get("step", 0) for cell in self.study.cells)


def last_record(folder: Path) -> dict[str, Any]:
    """Newest whole line of metrics.jsonl, without reading the rest."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
