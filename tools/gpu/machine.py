"""The card, what it reaches, and how time is taken: CUDA events on a GPU, a clock elsewhere."""

from __future__ import annotations

import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from floors import Card, known_card

from moe.analysis.ceiling import measure_ceiling

ROOT = Path(__file__).parents[2]
QUERIES = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"


class Machine(NamedTuple):
    device: torch.device
    name: str
    card: Card
    facts: dict[str, Any]

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


def look() -> Machine:
    """Of the GPU; without one the interpreter plays an H200, so that every formula has something to work on."""
    from moe.kernels import configs

    facts: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton"),
        "numpy": _version("numpy"), "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "table of tiles": configs.table_hash(), "command": " ".join(["python tools/gpu_check.py", *sys.argv[1:]]),
    }  # fmt: skip
    if not torch.cuda.is_available():
        card = known_card("H200")
        assert card
        return Machine(torch.device("cpu"), "interpreter", card, facts)
    device = torch.device("cuda", torch.cuda.current_device())
    p, name = torch.cuda.get_device_properties(device), torch.cuda.get_device_name(device)
    bandwidth, rate = measured_bandwidth(device), measure_ceiling(torch.bfloat16, device=device)
    card = known_card(name) or Card(bandwidth, rate, "measured at the start")
    facts |= {
        "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count, "memory, GB": p.total_memory / 1e9,
        "L2, MB": getattr(p, "L2_cache_size", 0) / 1e6, "cuda": torch.version.cuda,
        "copy, TB/s": bandwidth / 1e12, "matmul of 8192, bf16 TFLOP/s": rate / 1e12, **state(),
    }  # fmt: skip
    return Machine(device, name, card, facts)


def state() -> dict[str, str]:
    """Driver, clocks, temperature and power by nvidia-smi, where it can be asked."""
    said = _said("nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv,noheader", "-i", "0")
    return dict(zip(QUERIES.split(","), (word.strip() for word in said.split(",")))) if said else {}


def measured_bandwidth(device: torch.device) -> float:
    """bytes/s of a copy of 1 GB, both ways counted."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds([lambda: b.copy_(a)], device, 0.1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _said(*command: str) -> str:
    """The first line that a program prints, or nothing."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else ""


# ---------------------------------------------------------------------------------------------------------------- time

Calls = Sequence[Callable[[], Any]]


def seconds(calls: Calls, device: torch.device, budget: float = 0.15) -> float:
    """Of one call: the calls take turns (each on inputs of its own), after a warm-up; median of rounds between events.

    One round is at least 2 ms long, so that starting the clock does not count.
    """
    if device.type != "cuda":
        for call in calls:
            start = time.perf_counter()
            call()
        return time.perf_counter() - start
    for call in [*calls, *calls]:
        call()
    once = _between_events(calls, 1) / len(calls)
    turns = max(1, math.ceil(2e-3 / once / len(calls)))
    rounds = min(30, max(3, int(budget / (once * turns * len(calls)))))
    return statistics.median(_between_events(calls, turns) for _ in range(rounds)) / turns / len(calls)


def _between_events(calls: Calls, turns: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(turns):
        for call in calls:
            call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def graphed(calls: Calls, device: torch.device, budget: float = 0.1) -> float:
    """Seconds of one call as a CUDA graph replays all of them. Raises where a call cannot be captured: it waits for the
    device, or allocates outside torch."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    found = seconds([graph.replay], device, budget) / len(calls)
    del kept, graph
    return found


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """What one call has allocated at once, its results included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# -------------------------------------------------------------------------------------------------------------- budget


class Clock:
    """How long a part may go on. What has no time left is told in `cut`, never left out in silence."""

    def __init__(self, minutes: float) -> None:
        self.started, self.minutes = time.monotonic(), minutes
        self.cut: list[str] = []
        self._until = math.inf

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def until(self, share: float) -> None:
        """The next part may use the time up to this share of the whole; what earlier parts saved is its to use."""
        self._until = 60 * self.minutes * share

    def left(self) -> float:
        return self._until - self.spent

    def has(self, seconds: float, what: str) -> bool:
        """Whether there is time for it; else it is noted as cut."""
        if self.left() >= seconds:
            return True
        self.cut.append(what)
        return False


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
