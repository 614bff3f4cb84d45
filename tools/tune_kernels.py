"""Choose the rows of kernels/configs.json: tiles that compile clean, and of these the fastest on the GPU at hand.

    python tools/tune_kernels.py --dry-run --arch 90 --kernel dw     what compiles clean, without a GPU
    python tools/tune_kernels.py                                     on a GPU: times them, writes this architecture's rows
    python tools/tune_kernels.py --kernel gmm --loads 32 256 1024    rows per expert that get a row of their own

A candidate is clean by the rules of tools/compile_kernels.py, with as many programs a multiprocessor as it keeps without
spilling. Times are CUDA events around calls of the production wrapper whose inputs rotate through more memory than L2
holds, the median of several rounds; the winner of a row is the tile with the least geometric mean over the shapes, and a
smaller one within 2 % of it is preferred, since that is noise. The new table is a change of numerics: commit it with the
report, and expect another hash in run records.

The timing half has never run: no GPU was there. Its choice and its writing are tested with a made-up clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.kernels import configs
from moe.kernels.configs import Config, Row, Table

EXPERTS, CHOICES = 256, 8
SHAPES = {"S": (512, 64), "M": (1024, 256), "L": (2048, 512)}
"""Model width, expert width."""
LOADS = (16, 64, 256, 1024)
"""Rows per expert; each but the last becomes the bound of a row, the last is for whatever is more."""
WARPS = (4, 8)
STAGES = (2, 3, 4)
TILES = {  # block_m, block_n, block_k; under 64 rows the operands are swapped
    "up_swiglu": [(16, 64, 64), (16, 128, 64), (32, 64, 64), (64, 32, 64), (64, 64, 32), (64, 64, 64), (64, 128, 64),
                  (128, 32, 64), (128, 64, 32), (128, 64, 64), (128, 128, 64)],
    "gmm": [(16, 64, 64), (16, 128, 64), (32, 128, 64), (64, 64, 64), (64, 128, 32), (64, 128, 64), (64, 256, 64),
            (128, 64, 64), (128, 128, 32), (128, 128, 64), (128, 256, 64)],
    "bwd_act": [(16, 64, 64), (16, 128, 64), (32, 64, 64), (64, 32, 64), (64, 64, 32), (64, 64, 64), (64, 128, 64),
                (128, 32, 64), (128, 64, 32), (128, 64, 64), (128, 128, 64)],
    "dw": [(64, 64, 32), (64, 64, 64), (64, 128, 32), (64, 128, 64), (128, 64, 64), (128, 128, 32), (128, 128, 64),
           (128, 256, 64)],
}  # fmt: skip
SMALL_TILES = [
    (32, 32, 32),
    (32, 64, 32),
    (64, 32, 32),
    (64, 64, 16),
    (64, 64, 32),
]  # fp32: no tensor cores, or half their rate


def candidates(kernel: str, arch: int, dtype: str) -> list[Config]:
    """Tiles that could fit, with every number of programs a multiprocessor that memory and accumulators would allow."""
    from moe.kernels.ahead import KB, LIMITS, REGISTERS

    have, size = LIMITS[arch], 4 if dtype == "fp32" else 2
    found = []
    for block, warps, stages in itertools.product(TILES[kernel] if size == 2 else SMALL_TILES, WARPS, STAGES):
        m, n, k = block
        wide = 2 * n if kernel == "up_swiglu" else n
        accumulators = m * wide // (32 * warps)
        if not 8 <= accumulators <= 192 and size == 2:
            continue  # too few for the tensor cores' smallest tile, or sure to spill
        shared = (stages - 1) * (m + wide) * k * size  # at least; some keep one stage more
        most = min(have.shared // (shared + KB), have.warps // warps, REGISTERS // (32 * warps * (accumulators + 40)))
        if shared <= have.block_shared:
            found += [Config(*block, warps, stages, ctas) for ctas in range(1, min(most, 4) + 1)]
    return found


# ----------------------------------------------------------------------------------------------------------- the problem


class Problem(NamedTuple):
    kernel: str
    dtype: torch.dtype
    width: int
    hidden: int
    load: int

    def calls(self, config: Config | None, device: str, seed: int = 0) -> list[Callable[[], Any]]:
        """What training asks of this kernel: each call of the wrapper, on random rows evenly spread over the experts."""
        m = self.load * EXPERTS
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32, device=device) * self.load
        order = torch.randperm(m, generator=generator, device=device).to(torch.int32)
        token, gates = partial(normal, m // CHOICES, self.width), normal(m // CHOICES, CHOICES, dtype=torch.float32)
        wide, narrow = partial(normal, m, 2 * self.hidden), partial(normal, m, self.hidden)
        w13, w2 = (
            partial(normal, EXPERTS, 2 * self.hidden, self.width),
            partial(normal, EXPERTS, self.width, self.hidden),
        )
        if self.kernel == "up_swiglu":
            from moe.kernels.up_swiglu import up_swiglu

            return [partial(up_swiglu, token(), w13(), gates, ends, order, config=config)]
        if self.kernel == "bwd_act":
            from moe.kernels.bwd_act import bwd_act

            return [partial(bwd_act, token(), w2(), wide(), gates, ends, order, config=config)]
        if self.kernel == "dw":
            from moe.kernels.dw import dw

            to_a, to_b = (dict(gather=side, top_k=CHOICES, config=config) for side in "ab")
            return [
                partial(dw, token(), narrow(), ends, order, **to_a),
                partial(dw, wide(), token(), ends, order, **to_b),
            ]
        from moe.kernels.gmm import gmm

        return [
            partial(gmm, narrow(), w2(), ends, True, config=config),
            partial(gmm, wide(), w13(), ends, False, config=config),
        ]


# ------------------------------------------------------------------------------------------------------ what compiles clean


def clean(kernel: str, arch: int, dtype: str, jobs: int) -> list[tuple[Config, str]]:
    """Candidates without a fault, those with most programs of each tile, and their figures."""
    import compile_kernels as gate

    like = {"half": torch.bfloat16, "fp32": torch.float32}[dtype]
    width, hidden = SHAPES["M"]
    found: dict[tuple, tuple[Config, str]] = {}
    cases = []
    for config in candidates(kernel, arch, dtype):
        row = Row(kernel, arch, dtype, None, None, config)
        for precision in (
            ("highest", "high") if dtype == "fp32" else ("highest",)
        ):  # exact products and TF32 share a row
            torch.set_float32_matmul_precision(precision)
            name = "tf32" if precision == "high" else str(like)[6:]
            for call in Problem(kernel, like, width, hidden, 256).calls(config, "meta"):
                launches = gate.traced(arch, name, "", call)
                cases += [c._replace(row=row) for c in launches if gate.is_kernel(c.launch, kernel)]
    made = gate.compile_all(cases, jobs)
    for row, group in itertools.groupby(zip(cases, made), lambda pair: pair[0].row):
        pairs = list(group)
        if all(not isinstance(m, str) and not case.faults(m) for case, m in pairs):
            figures = ", ".join(str(m.registers) for _, m in pairs)
            found[row.config[:5]] = row.config, f"{figures} registers, {max(m.shared for _, m in pairs) // 1024} KB"
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------- timing

Clock = Callable[[Problem, Config], float]


def on_gpu(problem: Problem, config: Config, rounds: int = 20, flush: int = 192 << 20) -> float:
    """Milliseconds of the problem's calls: inputs rotate through more bytes than L2 holds, median of the rounds."""
    sets = [problem.calls(config, "cuda")]
    size = sum(t.numel() * t.element_size() for call in sets[0] for t in call.args if isinstance(t, torch.Tensor))
    sets += [problem.calls(config, "cuda", seed) for seed in range(1, min(4, flush // size + 1))]
    for calls in sets:
        for call in calls:
            call()
    times = []
    for i in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in sets[i % len(sets)]:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def best(kernel: str, dtype: str, load: int, clean_ones: Sequence[Config], clock: Clock) -> Config:
    """The least geometric mean over the shapes; within 2 % of it the tile with the least accumulators."""
    like = {"half": torch.bfloat16, "fp32": torch.float32}[dtype]
    problems = [Problem(kernel, like, *widths, load) for widths in SHAPES.values()]
    means = {c: math.exp(sum(math.log(clock(p, c)) for p in problems) / len(problems)) for c in clean_ones}
    least = min(means.values())
    return min((c for c in means if means[c] <= 1.02 * least), key=lambda c: (c.block_m * c.block_n, means[c]))


def rows(kernel: str, family: int, dtype: str, loads: Sequence[int], chosen: Sequence[Config]) -> list[Row]:
    """One row a load, neighbours with the same tile joined; a bound is halfway to the next load, in powers of two."""
    found: list[Row] = []
    for load, after, config in zip(loads, [*loads[1:], None], chosen):
        bound = None if after is None else round(math.sqrt(load * after))
        if found and found[-1].config == config:
            found.pop()
        found.append(Row(kernel, family, dtype, bound, None, config))
    return found


def updated(table: Table, new: Iterable[Row]) -> Table:
    """The table with the rows of these kernels, families and dtypes replaced."""
    fresh: dict[tuple[str, int, str], list[Row]] = {}
    for row in new:
        fresh.setdefault((row.kernel, row.family, row.dtype), []).append(row)
    return table._replace(rows=table.rows | fresh)


def write(path: Path, table: Table, remark: str) -> None:
    """Checked as it will be read, before it takes the old one's place; the remark joins the file's own words."""
    about = [
        line for line in json.loads(path.read_text(encoding="utf-8"))["about"] if line.split()[0] != remark.split()[0]
    ]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder, path.name)
        draft.write_text(configs.dump([*about, remark], table), encoding="utf-8")
        configs.load(draft)
        draft.replace(path)


# --------------------------------------------------------------------------------------------------------------- the run


def ask_gate(arch: int, kernels: Sequence[str], dtypes: Sequence[str], jobs: int) -> dict[str, list[Config]]:
    """`clean` in a process of its own: it replaces Triton's driver, which is needed here."""
    words = ["--dry-run", "--json", "--arch", str(arch), "--jobs", str(jobs), "--kernel", *kernels, "--dtype", *dtypes]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return {name: [Config(*c) for c in listed] for name, listed in json.loads(done.stdout).items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=configs.KERNELS, default=list(configs.KERNELS))
    parser.add_argument("--dtype", nargs="+", choices=("half", "fp32"), default=["half", "fp32"])
    parser.add_argument("--loads", type=int, nargs="+", default=list(LOADS))
    parser.add_argument("--dry-run", action="store_true", help="print the candidates that compile clean, and stop")
    parser.add_argument("--arch", type=int, help="for a dry run; else the GPU's own")
    parser.add_argument("--json", action="store_true", help="the dry run's list for programs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if args.dry_run:
        found = {f"{k}.{d}": clean(k, args.arch or 90, d, args.jobs) for k in args.kernel for d in args.dtype}
        print(json.dumps({n: [c for c, _ in listed] for n, listed in found.items()}) if args.json else listing(found))
        return 0
    if not torch.cuda.is_available():
        print("tune_kernels: no GPU here to time on; --dry-run lists the candidates", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    table, loads = configs.load(configs.FILE), sorted(args.loads)
    family = configs.family_of(table, 10 * major + minor)
    new = []
    for name, listed in ask_gate(10 * major + minor, args.kernel, args.dtype, args.jobs).items():
        kernel, dtype = name.split(".")
        chosen = [best(kernel, dtype, load, listed, on_gpu) for load in loads]
        new += rows(kernel, family, dtype, loads, chosen)
        print(name, *chosen, sep="\n  ")
    write(
        configs.FILE,
        updated(table, new),
        f"sm_{family}: timed on {torch.cuda.get_device_name()} by tools/tune_kernels.py.",
    )
    print(f"{configs.FILE}: table {configs.load(configs.FILE).hash}; now run tools/compile_kernels.py")
    return 0


def listing(found: dict[str, list[tuple[Config, str]]]) -> str:
    lines = []
    for name, listed in found.items():
        lines.append(f"{name}: {len(listed)} clean")
        for c, figures in sorted(listed, key=lambda pair: (pair[0].block_m, pair[0].block_n, -pair[0].ctas)):
            tile = f"{c.block_m}x{c.block_n}x{c.block_k}"
            lines.append(f"  {tile:12} {c.num_warps} warps {c.num_stages} stages {c.ctas} programs: {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        if "--dry-run" in sys.argv:  # cached kernels have no assembler's log
            os.environ.update(TRITON_CACHE_DIR=folder, OMP_NUM_THREADS="1")
        sys.exit(main(sys.argv[1:]))
