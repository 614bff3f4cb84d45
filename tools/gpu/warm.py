"""Compile in advance, on all cores, what the other parts will start: one after another it would take minutes.

A process of its own that sees no GPU: the wrappers run on meta tensors, and what they would start is compiled for the card
into Triton's cache, where the real start finds it. It changes no result; if it fails, kernels are compiled when they start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_work: list = []


def start(arch: int) -> subprocess.Popen:
    """In the background."""
    command = [sys.executable, str(Path(__file__).parent), "--warm", str(arch)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    quiet: Any = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def wait(process: subprocess.Popen, limit: float) -> None:
    """Its workers end with it."""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def compile_all(arch: int) -> int:
    """-> how many binaries were made."""
    global _work
    from moe.kernels import ahead

    found = {ahead.key(launch, arch): launch for launch in launches(arch)}
    _work = list(found.values())
    jobs = max(1, min(len(_work), (os.cpu_count() or 2) - 1))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        pool.starmap(_compile, [(i, arch) for i in range(len(_work))], chunksize=1)
    return len(_work)


def _compile(i: int, arch: int) -> None:
    from moe.kernels import ahead

    ahead.compile_for([_work[i]], arch)


def launches(arch: int) -> list:
    """Of every row of the table, every case of the correctness part, and the layers of the training steps."""
    from calls import OURS, answered_by
    from cases import Problem
    from correctness import MODES, plan, precision
    from floors import SIZES, Shape

    from moe.kernels import chain
    from moe.kernels.launch import recording

    steps = [Shape(65536, 512, 128, e) for e in (64, 256, 1024)] + [Shape(32768, 768, 384, 256, 7)]
    cases = [(s, "bf16") for s in [*SIZES.values(), *steps]] + [(s, mode) for _, s, _, mode in plan(tiny=False)]
    with recording(arch) as found:
        for s, mode in dict.fromkeys(cases):
            p = Problem(s, MODES[mode], "meta")
            with precision(mode), answered_by("triton"):
                for name, call in OURS.items():
                    if name not in ("forward", "forward+backward", "layer"):
                        call(p)
                y, *kept = chain.experts_forward(p.x, p.w13, p.w2, p.ids, p.gates)
                chain.experts_backward(p.dy, p.x, p.w13, p.w2, p.gates, *kept)
                gates = torch.empty(s.rows, device="meta")
                y, z = chain.rows_forward(p.rows, p.w13, p.w2, p.ends, gates)
                chain.rows_backward(p.rows, p.rows, p.w13, p.w2, p.ends, gates, z)
    return found
