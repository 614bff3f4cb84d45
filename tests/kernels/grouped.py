"""Rows of experts for the tests of the grouped kernels: an order by torch's stable sort, garbage where nobody may look."""

import mmap
from typing import NamedTuple

import torch
import triton.language as tl

from moe.kernels.configs import Config

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROUNDED = {F32: 1e-6, F16: 2.0**-11 + 1e-6, BF16: 2.0**-8 + 1e-6}
"""Error of a sum in fp32 that was rounded once, to the nearest, against the largest value."""

COUNTS = {  # rows of each expert
    "spread": [5, 9, 1, 7, 20, 3],
    "empty ones": [0, 7, 0, 0, 30, 0],
    "a hot one": [1, 0, 66, 2, 0, 1],
    "one for all": [0, 0, 0, 40, 0, 0],
    "only the last": [0, 0, 0, 0, 0, 33],
    "whole tiles": [16, 0, 64, 0, 0, 0],
    "nobody": [0, 0, 0, 0, 0, 0],
}
TILES = {"tall": Config(64, 32, 32, 4, 3), "few rows": Config(16, 32, 32, 4, 2)}
NOBODYS = 6
"""Rows past the last expert's, in every case."""


class Choices(NamedTuple):
    """What `order` would say of [N, K] ids; the tail of order, past ends[-1], is garbage that no kernel reads."""

    order: torch.Tensor
    inv: torch.Tensor
    ends: torch.Tensor
    counts: list[int]

    @property
    def live(self):
        return sum(self.counts)

    @property
    def slots(self):
        """Flat choice of each live row."""
        return self.order[: self.live].long()

    def experts(self):
        """-> (expert, its rows as a slice) of every expert."""
        ends = [0, *self.ends.tolist()]
        return [(e, slice(ends[e], ends[e + 1])) for e in range(len(self.counts))]


def choose(counts, top_k=1, nobody=NOBODYS):
    """Choices in random order, `nobody` of them or a few more without an expert."""
    live, n_experts = sum(counts), len(counts)
    nobody += -(live + nobody) % top_k
    ids = torch.cat(
        [torch.repeat_interleave(torch.arange(n_experts), torch.tensor(counts)), torch.full((nobody,), n_experts)]
    )
    ids = ids[torch.randperm(len(ids))]
    order = torch.sort(ids, stable=True).indices.int()
    order[live:] = 2**30
    inv = torch.full((len(ids),), -1, dtype=torch.int32)
    inv[order[:live].long()] = torch.arange(live, dtype=torch.int32)
    return Choices(order, inv.view(-1, top_k), torch.tensor(counts).cumsum(0).int(), counts)


def nearest(actual, exact):
    """Share of values that are the exact ones rounded to the nearest; of those cut off it would be a half."""
    return (actual == exact.to(actual.dtype)).double().mean().item() if actual.numel() else 1.0


def garbage_after(rows, live):
    """The rows, NaN from `live` on."""
    rows = rows.clone()
    rows[live:] = float("nan")
    return rows


def awkward(t):
    """The same values as a view into NaN: misaligned, its last dimension dense or not, its rows of odd distance."""
    inner = torch.randint(1, 3, ()).item()
    whole = torch.full((*t.shape[:-1], inner * t.shape[-1] + 5), float("nan"), dtype=t.dtype)
    view = whole[..., 3 : 3 + inner * t.shape[-1] : inner]
    view.copy_(t)
    return view


class Fence:
    """Stands for the memory of Triton's interpreter: only what a launch was given may be read or written."""

    def __init__(self, memory):
        self.memory, self.given, self.touched = memory, [], 0

    def launch(self, start):
        def fenced(kernel, grid, *args, **options):
            self.given = [extent(a) for a in args if isinstance(a, torch.Tensor) and a.numel()]
            start(kernel, grid, *args, **options)

        return fenced

    def look(self, pointers, mask):
        pointers = pointers[mask.astype(bool)]
        inside = [(first <= pointers) & (pointers < end) for first, end in self.given]
        assert sum(inside, start=pointers < 0).all(), "an address outside all tensors"
        self.touched += pointers.size

    def load(self, pointers, mask, *rest):
        self.look(pointers, mask)
        return self.memory.load(pointers, mask, *rest)

    def store(self, pointers, value, mask):
        self.look(pointers, mask)
        return self.memory.store(pointers, value, mask)


def extent(t):
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def fence(monkeypatch, module):
    """From here on the launches of `module` fail where they leave their tensors."""
    import triton.runtime.interpreter as interpreter

    found = Fence(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", found)
    monkeypatch.setattr(module, "launch", found.launch(module.launch))
    return found


# ----------------------------------------------------------------------------------------------- far from the beginning


NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python's mmap names from 3.13 on."""


def sparse(*shape, dtype=F16):
    """Zeros that take no memory until they are touched, for tensors of more than 2^31 elements."""
    size = torch.Size(shape)
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, size.numel() * dtype.itemsize, flags=anonymous), dtype=dtype).view(size)


class Sparse:
    """Stands for torch in a module that allocates outputs."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, dtype, device):
        return sparse(*shape, dtype=dtype)


def one_tile(monkeypatch, module, kernel, tile):
    """`kernel` of `module` makes that one tile of its output alone, and outputs are sparse: far tiles at no cost."""
    from moe.kernels import tiles

    fence(monkeypatch, module)
    launch = module.launch

    def only(started, grid, *args, **options):
        with monkeypatch.context() as patch:
            # the interpreter would copy every argument back onto itself, untouched pages included
            patch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
            if started is kernel:
                patch.setattr(tl, "program_id", lambda axis: tile)
                patch.setattr(tl, "num_programs", lambda axis: 1 << 30)
                grid = (1,)
            launch(started, grid, *args, **options)

    monkeypatch.setattr(module, "launch", only)
    monkeypatch.setattr(tiles, "torch", Sparse())
