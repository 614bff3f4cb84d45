"""Compile every Triton kernel for every architecture, without a GPU, and judge what came out.

    python tools/compile_kernels.py                      everything: all rows of kernels/configs.json, all widths
    python tools/compile_kernels.py --quick              CI's share: the same kernels, rows and cards, fewer widths
    python tools/compile_kernels.py --arch 90 --kernel gmm --list
    python tools/compile_kernels.py --report docs/kernels_static.md

The launches are what the production wrappers start on meta tensors, each compiled once as Triton would compile it on the
card (kernels/ahead.py). The rules (kernel_rules.py): no stack and no local memory, the card's own tensor-core instruction, no product
that ptxas had to serialise, no narrow loads of aligned operands, no atomics, memory within the card's limits, as many
programs a multiprocessor as the row of the table says; and no row of the table that no launch takes, no recompilation
when the number of tokens changes. One line a breach, exit code 1.

It sees no time and no race.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # nothing is compiled under it

import kernel_report  # noqa: E402
import kernel_rules  # noqa: E402
import torch  # noqa: E402

from moe.kernels import ahead, configs  # noqa: E402
from moe.kernels.launch import Launch, recording  # noqa: E402

EXPERTS, CHOICES = 256, 8
WIDTHS = ((256, 32), (512, 64), (1024, 256), (2048, 512))
"""(model width, expert width): each takes other tiles, since a tile is cut to the matrix."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}


class Use(NamedTuple):
    """One way that production calls the kernels."""

    dtype: str
    width: int
    hidden: int
    whole: bool = True
    """Not only tokens with ids: rows that are sorted already, and `recompute_z`, too."""
    every_load: bool = True
    """Each row of the table, not only the last."""


ALL = [Use(dtype, *widths) for dtype in DTYPES for widths in WIDTHS]
QUICK = [
    Use("bfloat16", 1024, 256), Use("bfloat16", 256, 32, whole=False), Use("float16", 1024, 256, False, every_load=False),
    Use("float32", 1024, 256, whole=False), Use("tf32", 1024, 256, whole=False),
]  # fmt: skip


class Case(NamedTuple):
    """One launch to compile."""

    launch: Launch
    arch: int
    dtype: str
    row: configs.Row | None
    """The row of the table that gave the tile."""
    where: str
    """Widths and rows per expert of the first launch like it."""

    def faults(self, made: ahead.Compiled) -> list[str]:
        return kernel_rules.faults(self.dtype, self.row.config.ctas if self.row else None, made)


# ------------------------------------------------------------------------------------------------- production launches


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def experts(use: Use, tokens: int) -> None:
    """Forward and backward of the routed experts."""
    from moe.kernels import chain

    dtype, width, hidden = DTYPES[use.dtype], use.width, use.hidden
    w13, w2 = meta(EXPERTS, 2 * hidden, width, dtype=dtype), meta(EXPERTS, width, hidden, dtype=dtype)
    x, ids = meta(tokens, width, dtype=dtype), meta(tokens, CHOICES, dtype=torch.int64)
    gates = meta(tokens, CHOICES, dtype=torch.float32)
    _, *kept = chain.experts_forward(x, w13, w2, ids, gates)
    chain.experts_backward(x, x, w13, w2, gates, *kept)
    if use.whole:
        chain.experts_forward(x, w13, w2, ids, gates, keep_z=False)
        x, ends = meta(tokens * CHOICES, width, dtype=dtype), meta(EXPERTS, dtype=torch.int32)
        gates = meta(tokens * CHOICES, dtype=torch.float32)
        _, z = chain.rows_forward(x, w13, w2, ends, gates)
        chain.rows_backward(x, x, w13, w2, ends, gates, z)
        chain.rows_forward(x, w13, w2, ends, gates, keep_z=False)


def routing(tokens: int) -> None:
    """Choice, its gradient and the counting sort, as V3 (groups), V2 (softmax) and a small model call them."""
    from moe.kernels.order import sort_by_expert
    from moe.kernels.route import route, route_backward

    fp32 = torch.float32
    shapes = ((256, 8, 8, 4, "sigmoid"), (64, 6, 1, 1, "softmax"), (32, 4, 1, 1, "sigmoid"))
    for n_experts, k, groups, open_groups, scoring in shapes:
        logits, bias = meta(tokens, n_experts, dtype=fp32), meta(n_experts, dtype=fp32)
        for mask in (None, meta(tokens, dtype=torch.bool)):
            ids, gates, hist = route(logits, bias, k, groups, open_groups, scoring, True, 2.5, mask)
            route_backward(gates, logits, ids, scoring, True, 2.5)
        sort_by_expert(ids, n_experts, hist)
        sort_by_expert(ids, n_experts)
        sort_by_expert(ids.to(torch.int32), n_experts)


def loads(table_rows: Iterable[configs.Row]) -> list[int]:
    """Rows per expert that reach every row of the table: each bound itself, and more than all."""
    bounds = sorted({row.rows for row in table_rows if row.rows})
    return [*bounds, 4 * max(bounds, default=64)]


def record(arch: int, uses: list[Use], fewer: int = 0) -> list[Case]:
    """Every launch of production on this architecture, repetitions included; of so many tokens fewer."""
    table = configs.table()
    own = [row for key, rows in table.rows.items() if key[1] == configs.family_of(table, arch) for row in rows]
    cases = list(traced(arch, "", "4096 tokens", partial(routing, 4096 - fewer)))
    for use in uses:
        of_dtype = loads(row for row in own if row.dtype == configs.DTYPES[DTYPES[use.dtype]])
        for load in of_dtype if use.every_load else of_dtype[-1:]:
            where = f"D={use.width} F={use.hidden}, {load} rows an expert"
            torch.set_float32_matmul_precision("high" if use.dtype == "tf32" else "highest")
            cases += traced(arch, use.dtype, where, partial(experts, use, load * EXPERTS // CHOICES - fewer))
    torch.set_float32_matmul_precision("highest")
    return cases


def traced(arch: int, dtype: str, where: str, call: Callable[[], None]) -> Iterable[Case]:
    """The launches of one call, each with the row of the table that was looked up for it, if one was."""
    plain = configs.pick
    with recording(arch) as found:

        def noted(*args):
            row = plain(*args)
            found.append(row)
            return row

        configs.pick = noted
        try:
            call()
        finally:
            configs.pick = plain
    row = None
    for item in found:
        if isinstance(item, configs.Row):
            row = item
        else:  # a kernel of the table has its name there; what else its wrapper starts has no row
            own = row if row and is_kernel(item, row.kernel) else None
            yield Case(item, arch, dtype, own, where)


def is_kernel(launch: Launch, name: str) -> bool:
    """Whether this is the kernel that the table calls so, not a helper its wrapper starts beside it."""
    return launch.kernel.__name__ == f"_{name}"


def distinct(cases: Iterable[Case]) -> dict[str, Case]:
    """The first case of each binary, by the key that Triton itself would keep it under; what a row promises is kept."""
    found: dict[str, Case] = {}
    for case in cases:
        key = f"{case.arch} {ahead.key(case.launch, case.arch)} {case.row}"
        found.setdefault(key, case)
    return found


# -------------------------------------------------------------------------------------------------------------- the run

_work: list[list[Case]] = []


def _compile(i: int) -> list[ahead.Compiled | str]:
    made = ahead.compile_for([case.launch for case in _work[i]], _work[i][0].arch)
    return [f"{type(m).__name__}: {str(m).strip()[-300:]!r}" if isinstance(m, Exception) else m for m in made]


def compile_all(cases: list[Case], jobs: int) -> list[ahead.Compiled | str]:
    """In the order of `cases`, which is by architecture. Workers are forks: launches hold functions that do not travel."""
    global _work
    of_one = [list(part) for _, part in itertools.groupby(cases, lambda case: case.arch)]
    _work = [part[i : i + 16] for part in of_one for i in range(0, len(part), 16)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return [made for part in pool.imap(_compile, range(len(_work))) for made in part]


def unreached(cases: Iterable[Case], archs: Iterable[int]) -> list[str]:
    """Rows of the table that no launch took, of the families that were asked for."""
    table = configs.table()
    families = {configs.family_of(table, arch) for arch in archs}
    taken = {case.row for case in cases}
    rows = [row for rows in table.rows.values() for row in rows if row.family in families]
    return [f"{configs.FILE.name}: no launch takes {row}" for row in rows if row not in taken]


def recompiles(cases: Iterable[Case], fewer: Iterable[Case]) -> list[str]:
    """Kernels that one token less would compile anew: the first step of another batch would stall."""
    known = {ahead.key(case.launch, case.arch) for case in cases}
    found = {}
    for case in fewer:
        if ahead.key(case.launch, case.arch) not in known:
            found[f"{case.launch.kernel.__name__} sm_{case.arch}: recompiles when the number of tokens changes"] = None
    return list(found)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(ahead.LIMITS), default=list(ahead.LIMITS))
    parser.add_argument("--kernel", nargs="+", help="only kernels with one of these words in their name")
    parser.add_argument("--quick", action="store_true", help="fewer widths")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print every binary with its figures")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the static report as markdown")
    args = parser.parse_args(argv)
    started = time.monotonic()
    uses = QUICK if args.quick else ALL
    recorded = [case for arch in args.arch for case in record(arch, uses)]
    found = unreached(recorded, args.arch)
    found += recompiles(recorded, (case for arch in args.arch for case in record(arch, uses, fewer=1)))
    cases = list(distinct(recorded).values())
    if args.kernel:
        cases = [c for c in cases if any(word in c.launch.kernel.__name__ for word in args.kernel)]
        if not cases:
            names = sorted({c.launch.kernel.__name__ for c in recorded})
            parser.error(f"no kernel has one of {args.kernel} in its name; there are {', '.join(names)}")
    done = []
    for case, made in zip(cases, compile_all(cases, args.jobs)):
        if isinstance(made, str):
            where = f"{case.launch.kernel.__name__} sm_{case.arch} {case.dtype} ({case.where})"
            found.append(f"{where} does not compile: {made}")
            continue
        head = kernel_report.describe(case.dtype, made)
        done.append((case, made))
        found += [f"{head} ({case.where}): {fault}" for fault in case.faults(made)]
        if args.list:
            print(f"{head}: {kernel_report.figures(made)}")
    if args.report:
        args.report.write_text(kernel_report.markdown(done), encoding="utf-8")
    print("\n".join(found), end="\n" if found else "")
    print(
        f"{len(done)} binaries of {len(recorded)} launches on {', '.join(f'sm_{a}' for a in args.arch)}: {len(found)} faults; "
        f"{time.monotonic() - started:.0f} s, Triton {version('triton')}, table {configs.table_hash()}"
    )
    return int(bool(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:  # cached kernels have no assembler's log
        os.environ.update(TRITON_CACHE_DIR=folder, OMP_NUM_THREADS="1")
        sys.exit(main(sys.argv[1:]))
