"""Do the tests of the kernels notice a broken kernel? Break one thing at a time and see.

    python tools/mutate_kernels.py                 every mutation: minutes
    python tools/mutate_kernels.py gmm order       those of two files
    python tools/mutate_kernels.py --list

Each mutation changes one place of a copy of the tree and runs the tests of that file until the first failure. One that
every test survives is printed, exit code 1: a test is missing, or the line does nothing. First the copy is tested as it
is, or a failure would mean nothing. Without a GPU this is Triton's interpreter; a hang and a crash count as noticed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "moe", "tests", "pyproject.toml")
LIMIT = 600


class Mutation(NamedTuple):
    file: str
    what: str
    old: str
    """Occurs once in the file."""
    new: str


MUTATIONS = [
    Mutation(
        "tiles", "mask nothing where the depth alone is whole",
        "n % config.block_n == 0 and k % config.block_k == 0", "k % config.block_k == 0",
    ),  # fmt: skip
    Mutation("combine", "take the sum's width for the base's stride", "base.stride(0)", "d"),
    Mutation("tiles", "drop an expert's last, partial tile", "tl.cdiv(end - start, BLOCK_M)", "(end - start) // BLOCK_M"),
    Mutation("tiles", "one expert too early", "before = scan <= tile", "before = scan < tile"),
    Mutation("tiles", "every tile is its expert's first", "(tile - first_tile) * BLOCK_M", "0 * (tile - first_tile)"),
    Mutation("tiles", "a tile owns a row of the next expert", "tl.load(ends + expert) - first, BLOCK_M",
             "tl.load(ends + expert) + 1 - first, BLOCK_M"),
    Mutation("tiles", "drop the last step in depth", "tl.range(0, k, BLOCK_K)", "tl.range(0, k - BLOCK_K + 1, BLOCK_K)"),
    Mutation("tiles", "read past the depth", "deep = d < k - done", "deep = d < k"),
    Mutation("tiles", "cut off instead of rounding", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits"),
    Mutation("tiles", "store rows of nobody", "(m < rows)[:, None] & (c < columns)[None, :]", "(c < columns)[None, :]"),
    Mutation("tiles", "store columns of nobody", "(m < rows)[:, None] & (c < columns)[None, :]", "(m < rows)[:, None]"),
    Mutation("gmm", "swap tiles of rows and of columns", "n0 = tile % across * BLOCK_N", "n0 = tile // across * BLOCK_N"),
    Mutation("gmm", "columns of the first tile only", "tl.cast(n0, tl.int64) * stride_wn", "tl.cast(n0, tl.int64) * 0"),
    Mutation("gmm", "zeros begin a row late", "tl.range(start + tl", "tl.range(start + 1 + tl"),
    Mutation("up_swiglu", "skip the gate", "* u * gate[:, None]", "* u"),
    Mutation("up_swiglu", "swap gate and up", "g, u = tl.split", "u, g = tl.split"),
    Mutation("up_swiglu", "gate of the sorted row", "tl.load(gates + slot)", "tl.load(gates + first + own)"),
    Mutation("up_swiglu", "token of another choice", "slot // TOP_K", "slot % TOP_K"),
    Mutation("up_swiglu", "keep z of rows of nobody", "stored = (m < count)[:, None] & ", "stored = (m >= 0)[:, None] & "),
    Mutation("combine", "add rows of no expert", "(row >= 0)[:, None] & inside", "inside"),
    Mutation("combine", "drop the last choice", "tl.static_range(TOP_K)", "tl.static_range(TOP_K - 1)"),
    Mutation("combine", "forget the base", "acc = wide(tl.load(at", "acc = 0 * wide(tl.load(at"),
    Mutation("bwd_act", "derivative of the sigmoid alone", "(s + act * (1 - s))", "s"),
    Mutation("bwd_act", "swap dz of gate and of up", "tl.store(at + f, rounded(p * act,", "tl.store(at, rounded(p * act,"),
    Mutation("bwd_act", "h without its gate", "act * u * gate[:, None]", "act * u"),
    Mutation("bwd_act", "drop the last share of dgate", "tl.range(0, parts)", "tl.range(0, parts - 1)"),
    Mutation("bwd_act", "dgate of half a tile", "return share + _finish(", "return 0 * share + _finish("),
    Mutation("bwd_act", "dgate to the sorted row", "slot = tl.load(order + row,", "tl.load(order + row,"),
    Mutation("dw", "rows of the next expert on both sides", "live = r < end - first", "live = r < end"),
    Mutation("dw", "forget the zeros of an empty expert", "store(acc, at, n_b, n_a - a0,", "store(acc, at, n_b, tl.where(end > start, n_a - a0, 0),"),
    Mutation("dw", "an expert twice, another never", "(e[None, :] < mine[:, None])", "(e[None, :] <= mine[:, None])"),
    Mutation("dw", "swap the tile's offsets", "a0, b0 = tile % each // across * BLOCK_M, tile % each % across * BLOCK_N",
             "a0, b0 = tile % each % across * BLOCK_M, tile % each // across * BLOCK_N"),
    Mutation("dw", "drop an expert's last rows", "tl.range(start, end, BLOCK_K)", "tl.range(start, end - BLOCK_K + 1, BLOCK_K)"),
    Mutation("order", "unstable", "(i[None, :] < i[:, None])", "(i[None, :] > i[:, None])"),
    Mutation("order", "exclusive ends", "tl.store(ends + expert, end,", "tl.store(ends + expert, end - count,"),
    Mutation("order", "count ids of no expert", "(e >= 0) & (e < E)", "(e < E)"),
    Mutation("order", "a block's own choices come first", "tl.cumsum(tile, 0) - tile", "tl.cumsum(tile, 0)"),
    Mutation("order", "inv of no expert", "tl.where(some, row, -1)", "tl.where(some, row, 0)"),
    Mutation("route", "the higher id wins a tie", "best = tl.argmax(score, 1)",
             "best = tl.max(tl.where(score == tl.max(score, 1)[:, None], column[None, :], -1), 1)"),
    Mutation("route", "the bias is not heard", "score += tl.load(bias + expert, real, 0.0)[None, :]", "score += 0"),
    Mutation("route", "a group is as strong as its best", "SIGMOID and SIZE > 1", "False"),
    Mutation("route", "gates are not renormalised", "s = s / (tl.sum(s, 1) + 1e-20)[:, None]", "s = s"),
    Mutation("route", "padding is counted", "(score == float(\"-inf\")) & used[:, None]", "score == float(\"-inf\")"),
    Mutation("route", "the sum's part of the gradient", "(d - tl.sum(d * s, 1)[:, None] / t) / t", "d / t"),
    Mutation("route", "softmax without its row's part", "(dense - shared[:, None])", "dense"),
]  # fmt: skip


def apply(mutation: Mutation, text: str) -> str:
    """The broken source. Raises ValueError where the place is not there, or not alone."""
    found = text.count(mutation.old)
    if found != 1:
        raise ValueError(
            f"kernels/{mutation.file}.py: {mutation.what}: {mutation.old!r} is there {found} times, not once"
        )
    return text.replace(mutation.old, mutation.new)


def tests_of(file: str) -> list[str]:
    """What `file`'s tests are; the shared tiles are tested through their users."""
    names = {"tiles": ["gmm", "up_swiglu", "dw", "bwd_act"]}.get(file, [file])
    return [f"tests/kernels/test_{name}.py" for name in names] + ["tests/kernels/test_chain.py"]


def passes(tree: Path, files: list[str]) -> tuple[bool, str]:
    """Whether these tests pass in this copy, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, "hangs"
    if done.returncode < 0:
        return False, "crashes"  # a stray store
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode not in (0, 1):  # pytest's own trouble is no verdict
        raise RuntimeError(
            f"pytest ended with {done.returncode} in {' '.join(files)}: {(done.stderr or done.stdout)[-500:]}"
        )
    return done.returncode == 0, last


def copied(folder: Path) -> Path:
    """A copy of what the tests need; moe/kernels stays a link."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def survivors(mutations: list[Mutation], jobs: int) -> list[Mutation]:
    """Those that no test noticed; each worker has a tree of its own."""
    own = threading.local()
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def judge(mutation: Mutation) -> bool:
            if not hasattr(own, "tree"):
                own.tree = copied(Path(tempfile.mkdtemp(dir=scratch)))
            path = own.tree / "kernels" / f"{mutation.file}.py"
            whole, started = path.read_text(encoding="utf-8"), time.monotonic()
            path.write_text(apply(mutation, whole), encoding="utf-8")
            try:
                survived, last = passes(own.tree, tests_of(mutation.file))
            finally:
                path.write_text(whole, encoding="utf-8")
            verdict = "SURVIVES" if survived else "noticed"
            print(
                f"{verdict:8} {mutation.file}: {mutation.what} ({last}, {time.monotonic() - started:.0f} s)", flush=True
            )
            return survived

        return [mutation for mutation, survived in zip(mutations, pool.map(judge, mutations)) if survived]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names of files in kernels/, without .py; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    if strange := set(args.files) - {m.file for m in MUTATIONS}:
        parser.error(f"{min(strange)} has no mutations; there are {', '.join(sorted({m.file for m in MUTATIONS}))}")
    chosen = [m for m in MUTATIONS if not args.files or m.file in args.files]
    for mutation in chosen:
        apply(mutation, (ROOT / "kernels" / f"{mutation.file}.py").read_text(encoding="utf-8"))
    if args.list:
        print("\n".join(f"{m.file}: {m.what}" for m in chosen))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, last = passes(copied(Path(scratch)), sorted({path for m in chosen for path in tests_of(m.file)}))
    if not whole:
        print(f"the tests fail without any mutation: {last}")
        return 1
    left = survivors(chosen, args.jobs)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutations noticed")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
