"""What the interpreter cannot see: races. The same bits a thousand times over, and NVIDIA's own checkers.

Forward and backward of a small layer are repeated while, every other time, products on a second stream shake the order in
which blocks run. compute-sanitizer, where it is found, runs every kernel once in a process of its own: memcheck (each
tensor an allocation of its own, so that an overrun is seen) and racecheck (shared memory).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from calls import OURS, answered_by
from cases import Problem
from floors import SIZES, TINY, Shape
from machine import Clock, Machine, first_line

SMALL = Shape(512, 256, 64, 64, 8)
OUTPUTS = ("y", "dx", "dw13", "dw2", "dgates")
TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def run(machine: Machine, clock: Clock, tiny: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"failures": [], "repeats": [], "sanitizer": []}
    plan = [("tiny", TINY, 3)] if tiny else [("small", SMALL, 1000), ("M", SIZES["M"], 50)]
    for name, s, times in plan:
        if not clock.has(5, f"repeats at {name}"):
            continue
        try:
            done, differing = repeat(Problem(s, torch.bfloat16, machine.device, "zipf"), times, clock)
        except Exception as raised:
            found["failures"].append(f"repeats at {name}: {first_line(raised)}")
            continue
        found["repeats"].append({"size": name, "times": done, "differing": differing})
        if done < times:
            clock.cut.append(f"repeats at {name}: {done} of {times}")
        if differing:
            found["failures"].append(f"repeats at {name}: {differing} of {done} differ in their bits")
    if machine.is_gpu:
        sanitize(found, clock)
    else:
        found["sanitizer"].append({"tool": "all", "result": "there is no GPU"})
    return found


def repeat(p: Problem, times: int, clock: Clock) -> tuple[int, int]:
    """-> repetitions made, and how many gave other bits than the first. Nothing waits for the device in between."""
    side = torch.cuda.Stream(p.device) if p.device.type == "cuda" else None
    noise = torch.randn(512, 512, device=p.device)
    differing = torch.zeros((), dtype=torch.int64, device=p.device)
    with answered_by("triton"):
        first = [_bits(t) for t in OURS["forward+backward"](p)]
        for i in range(times):
            if side is not None and i % 2:
                with torch.cuda.stream(side):
                    for _ in range(i % 7):
                        noise @ noise
            again = OURS["forward+backward"](p)
            differing += torch.stack([(a != _bits(b)).any() for a, b in zip(first, again)]).any()
            if i % 50 == 49 and clock.left() < 2:
                return i + 1, int(differing)
    return times, int(differing)


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().view(torch.int16 if t.element_size() == 2 else torch.int32)


def sanitize(found: dict[str, Any], clock: Clock) -> None:
    tool = sanitizer()
    if tool is None:
        clock.cut.append("compute-sanitizer: not installed here")
        return
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    script = Path(__file__).parent
    for check in TOOLS:
        if not clock.has(15, f"compute-sanitizer {check}"):
            continue
        limit = min(60.0, clock.left())
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, str(script), "--kernels"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            clock.cut.append(f"compute-sanitizer {check}: not done after {limit:.0f} s")
            continue
        said = [line for line in done.stdout.splitlines() if line.startswith("=====")]
        last = said[-1].strip("= ") if said else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if done.returncode == 0:
            found["sanitizer"].append({"tool": check, "result": last})
        elif done.returncode == 9:
            found["sanitizer"].append({"tool": check, "result": last})
            found["failures"].append(f"compute-sanitizer {check}: {last}")
        else:  # it does not know the driver, or may not attach
            clock.cut.append(f"compute-sanitizer {check}: could not run: {last}")


def sanitizer() -> str | None:
    """Its path, where the CUDA toolkit or its wheel is installed."""
    places = [*os.environ.get("PATH", "").split(os.pathsep), *PLACES]
    if home := os.environ.get("CUDA_HOME"):
        places += [f"{home}/bin", f"{home}/compute-sanitizer"]
    places += [str(p.parent) for folder in sys.path for p in Path(folder).glob("nvidia/*/**/compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def every_kernel() -> None:
    """One small run of each kernel: what the sanitizer looks at."""
    for dtype in (torch.bfloat16, torch.float32):
        p = Problem(Shape(70, 72, 24, 8, 2), dtype, "cuda", "nobody")
        with answered_by("triton"):
            for call in OURS.values():
                call(p)
    torch.cuda.synchronize()
    print("every kernel ran")
