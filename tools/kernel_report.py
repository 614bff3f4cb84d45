"""The static report of the kernels as markdown: what the compiler made of them, and what the memory and tensor cores of
a card allow at best. `tools/compile_kernels.py --report FILE` writes it; no figure in it was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

from moe.kernels import ahead, configs

BANDWIDTH, TENSOR_RATE = 4.3e12, 790e12
"""Bytes and bf16 FLOPs a second of an H200, as far as they are reached in practice."""


class Size(NamedTuple):
    name: str
    tokens: int
    width: int
    hidden: int
    experts: int = 256
    choices: int = 8


SIZES = (Size("S", 8192, 512, 64), Size("M", 16384, 1024, 256), Size("L", 32768, 2048, 512))

# kernel, FLOPs, bytes; every tensor once, in bf16; N tokens, D width, F expert width, E experts, K choices, M = N K rows
WORK = (
    ("route, sort_by_expert", "0", "4*N*E + 32*N*K"),
    ("up_swiglu", "4*M*D*F", "4*E*F*D + 2*N*D + 6*M*F"),
    ("gmm, down", "2*M*D*F", "2*E*F*D + 2*M*F + 2*M*D"),
    ("combine", "0", "2*M*D + 2*N*D"),
    ("bwd_act", "2*M*D*F", "2*E*F*D + 2*N*D + 10*M*F"),
    ("dw of w2", "2*M*D*F", "2*M*F + 2*N*D + 2*E*F*D"),
    ("gmm, dx of rows", "4*M*D*F", "4*M*F + 4*E*F*D + 2*M*D"),
    ("combine, dx", "0", "2*M*D + 2*N*D"),
    ("dw of w13", "4*M*D*F", "4*M*F + 2*N*D + 4*E*F*D"),
)


def floor(flops: str, traffic: str, size: Size) -> tuple[float, str]:
    """Least microseconds, and what sets them."""
    names = {"N": size.tokens, "D": size.width, "F": size.hidden, "E": size.experts, "K": size.choices}
    names["M"] = size.tokens * size.choices
    by_memory, by_cores = (1e6 * eval(w, {}, names) / r for w, r in ((traffic, BANDWIDTH), (flops, TENSOR_RATE)))
    return max(by_memory, by_cores), "memory" if by_memory >= by_cores else "tensor cores"


def floors() -> list[str]:
    columns = [f"{s.name}: N={s.tokens:,} D={s.width:,} F={s.hidden}" for s in SIZES]
    lines = ["| kernel | FLOPs | bytes | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(SIZES)]
    sums = [0.0] * len(SIZES)
    for kernel, flops, traffic in WORK:
        found = [floor(flops, traffic, size) for size in SIZES]
        sums = [total + us for total, (us, _) in zip(sums, found)]
        cells = " | ".join(f"{us:.0f} {bound}" for us, bound in found)
        formulas = (" ".join(f.split("*")).replace(" + ", " + ") if f != "0" else "" for f in (flops, traffic))
        lines.append(f"| {kernel} | {' | '.join(formulas)} | {cells} |")
    return [*lines, "| **all** | | | " + " | ".join(f"**{total:,.0f}**" for total in sums) + " |"]


def products(done: list[tuple[Any, ahead.Compiled]], arch: int) -> list[str]:
    """One line a row of the table and dtype; where a row has several binaries, the worst of each figure."""
    groups: dict[tuple, list[ahead.Compiled]] = {}
    for case, made in done:
        if case.row and made.arch == arch:
            groups.setdefault((case.row, case.dtype), []).append(made)
    lines = [
        "| kernel | type | rows an expert | tile | warps | stages | registers | shared KB | programs | tensor | copies |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (row, dtype), made in sorted(groups.items(), key=lambda item: _place(*item[0])):
        c = row.config
        load = f"to {row.rows}" if row.rows else "any"
        lines.append(
            f"| {row.kernel} | {dtype} | {load} | {c.block_m}x{c.block_n}x{c.block_k} | {c.num_warps} | {c.num_stages} | "
            f"{max(m.registers for m in made)} | {max(m.shared for m in made) / ahead.KB:.0f} | {min(m.ctas for m in made)} | "
            f"{_range(m.count(m.tensor_word) for m in made)} | {_range(m.count('LDGSTS') for m in made)} |"
        )
    return lines


def _place(row: configs.Row, dtype: str) -> tuple:
    return configs.KERNELS.index(row.kernel), dtype, row.rows or 1 << 30, row.width or 1 << 30


def _range(counts: Iterable[int]) -> str:
    found = sorted(counts)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}-{found[-1]}"


def others(done: list[tuple[Any, ahead.Compiled]]) -> list[str]:
    archs = sorted({made.arch for _, made in done})
    worst: dict[str, dict[int, list[ahead.Compiled]]] = {}
    for case, made in done:
        if not case.row:
            worst.setdefault(made.kernel.strip("_"), {}).setdefault(made.arch, []).append(made)
    lines = ["| kernel | " + " | ".join(f"sm_{a}" for a in archs) + " |", "|---|" + "---|" * len(archs)]
    for kernel in sorted(worst):
        cells = [worst[kernel].get(a, []) for a in archs]
        figures = (f"{max(m.registers for m in c)}, {min(m.ctas for m in c)}" if c else "" for c in cells)
        lines.append(f"| {kernel} | " + " | ".join(figures) + " |")
    return lines


def describe(dtype: str, made: ahead.Compiled) -> str:
    """Kernel, card, tile: the head of every line of output."""
    tile = "x".join(str(value) for name, value in made.constants.items() if name.startswith("BLOCK"))
    words = (made.kernel.strip("_"), f"sm_{made.arch}", dtype, tile, f"w{made.warps} s{made.stages}")
    return " ".join(word for word in words if word)


def figures(made: ahead.Compiled) -> str:
    own = made.tensor_word
    return (
        f"{made.registers} registers, {made.stack} stack, {made.shared / ahead.KB:.0f} KB, {made.ctas} a multiprocessor, "
        f"{made.count(own)} {own}, {made.count('LDGSTS')} LDGSTS"
    )


def markdown(done: list[tuple[Any, ahead.Compiled]]) -> str:
    archs = sorted({made.arch for _, made in done})
    parts = [
        "# Static report of the Triton kernels",
        f"Written by `python tools/compile_kernels.py --report docs/kernels_static.md` with Triton {version('triton')}; table of "
        f"tiles {configs.table_hash()}; {len(done)} binaries. **No GPU was there: no figure on this page is a time that was "
        "measured.** `docs/kernels.md` says what such a proof cannot see.",
        "## What a card allows at best",
        f"Microseconds of one layer, forward and backward, for E=256, K=8 in bf16: bytes at {BANDWIDTH / 1e12:.1f} TB/s or "
        f"FLOPs at {TENSOR_RATE / 1e12:.0f} TFLOP/s (an H200), whichever takes longer, every tensor read or written once. "
        "M = N K rows; the router's own product is PyTorch's.",
        "\n".join(floors()),
        "## Kernels that multiply, by card",
        "A line is a row of `kernels/configs.json` in one type; where widths and variants make several binaries of it, the "
        "most registers and memory, the fewest programs a multiprocessor, the range of static instruction counts. Tiles are "
        "cut to narrow matrices, so counts can lie below the full tile's. tensor: HGMMA (wgmma) on sm_90, UTC*MMA (tcgen05) on "
        "sm_100 and sm_103, HMMA (mma.sync) elsewhere; copies: LDGSTS (cp.async). Stack, local memory and atomics are zero "
        "throughout, or this page would not have been written without a complaint.",
        *(part for arch in archs for part in (f"### sm_{arch}", "\n".join(products(done, arch)))),
        "## The other kernels",
        "Most registers, fewest programs a multiprocessor.",
        "\n".join(others(done)),
    ]
    return "\n\n".join(parts) + "\n"
