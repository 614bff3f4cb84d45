"""Ranks, devices and threads: the one door to torch.distributed.

One process is the plain case and touches nothing of it. With WORLD_SIZE > 1 (torchrun) the group is gloo on CPUs and
NCCL on GPUs; sums travel as one flat tensor a dtype.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from moe.config import TrainConfig, UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check_rows(self, rows: int, seq_len: int) -> None:
        """Every rank takes as many rows of a step as every other."""
        if rows % self.world:
            raise UserError(
                f"train.batch_tokens: {rows} rows a step cannot be shared equally by {self.world} ranks; "
                f"set train.batch_tokens to a multiple of {seq_len * self.world}"
            )

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all ranks, in place; one message a dtype."""
        if self.world == 1 or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            torch.distributed.all_reduce(flat)
            for t, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(part.view(t.shape))


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


@contextmanager
def session(train: TrainConfig) -> Iterator[Ranks]:
    """Device, threads, allocator and process group for one run, from the environment that torchrun sets."""
    world, rank, local = _env("WORLD_SIZE", 1), _env("RANK", 0), _env("LOCAL_RANK", 0)
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but no CUDA device is visible; use train.device=cpu or auto")
    cuda = train.device != "cpu" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"local rank {local} has no GPU: {torch.cuda.device_count()} visible; lower --nproc-per-node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(train.threads or max(1, cores() // _env("LOCAL_WORLD_SIZE", 1)))
        if train.keep_memory:
            keep_memory()
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    try:
        yield Ranks(rank, world, device)
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> bool:
    """glibc: freed memory stays with the process instead of going back page by page; -> whether it took effect.

    Fresh pages cost more than the arithmetic on them: a training step on CPUs takes half the time with this setting
    (docs/benchmarks.md). Call it before the first large tensor. train.keep_memory=false switches it off.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has neither the library nor the page-fault problem's remedy
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 64 << 20)])


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: its own message, if any, is the cause."""
    said = str(error)
    return _env("WORLD_SIZE", 1) > 1 and (
        isinstance(error, torch.distributed.DistError)
        or any(sign in said for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe"))
    )


def record(main: Callable[[], None]) -> Callable[[], None]:
    """Let torchrun show the error of `main` instead of its own table alone."""
    from torch.distributed.elastic.multiprocessing.errors import record as torch_record

    return torch_record(main)
