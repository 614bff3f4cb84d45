"""Tile sizes of the grouped kernels: frozen rows in configs.json, one for each kernel, architecture, dtype and load.

No tuning at run time: its winner is timing noise that differs between ranks and runs, and another tile rounds otherwise.
A row holds up to `rows` rows per expert (M / E, which the host knows without asking the GPU) and, where a kernel needs
it, up to `width` output columns; the last row of each list has no bound. `bf16` and `fp16` share the rows of "half".

Architectures are families: 80; 86 and 89, with 99 KB of shared memory a block and 48 warps a multiprocessor; 90 (wgmma);
100 and 103 (tcgen05); 120 and 121, small again and with the tensor-core instructions of 80, but another assembler. One
that is not listed takes the next lower family.

The rows are chosen by static evidence, not by time, as long as no GPU has tuned them: what tools/compile_kernels.py
finds clean (no spills, the architecture's own tensor-core instruction, the occupancy `ctas` says), and among that the
tile whose height wastes little of an expert's rows (about block_m / 2n of them). tools/tune_kernels.py replaces them
by measured ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("configs.json")
KERNELS = ("up_swiglu", "gmm", "bwd_act", "dw")
DTYPES = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "fp32"}


class Config(NamedTuple):
    block_m: int
    """Rows of a tile (for `dw`: of the first weight dimension)."""
    block_n: int
    block_k: int
    """Depth of one step of the product."""
    num_warps: int
    num_stages: int
    ctas: int = 1
    """Programs that share a multiprocessor; tools/compile_kernels.py holds the row to it."""


class Row(NamedTuple):
    kernel: str
    family: int
    dtype: str
    rows: int | None
    """Most rows per expert; None: any."""
    width: int | None
    """Most output columns; None: any."""
    config: Config


class Table(NamedTuple):
    families: dict[int, int]
    """Architecture -> the architecture whose rows it takes."""
    rows: dict[tuple[str, int, str], list[Row]]
    """(kernel, family, dtype) -> rows, the first that holds is taken."""
    hash: str


def lookup(kernel: str, arch: int, dtype: torch.dtype, n: int, k: int, rows_per_expert: float) -> Config:
    """`kernel`: one of KERNELS; n: output width, k: depth; rows_per_expert: M / E."""
    return pick(kernel, arch, dtype, n, rows_per_expert).config


def pick(kernel: str, arch: int, dtype: torch.dtype, n: int, rows_per_expert: float) -> Row:
    """The row of the table that `lookup` answers from."""
    tiles = table()
    if dtype not in DTYPES:
        raise ValueError(f"{kernel}: no tiles for {dtype}; the kernels take bfloat16, float16 and float32")
    rows = tiles.rows[kernel, family_of(tiles, arch), DTYPES[dtype]]
    return next(r for r in rows if _holds(r, n, rows_per_expert))


def family_of(table: Table, arch: int) -> int:
    """The family of an architecture; of the next lower one that is listed, if it is not."""
    known = max((a for a in table.families if a <= arch), default=None)
    if known is None:
        raise ValueError(
            f"sm_{arch}: the Triton kernels need compute capability {min(table.families) / 10:.1f} or newer"
        )
    return table.families[known]


def table_hash() -> str:
    """Names the table in a run's record: other tiles round otherwise."""
    return table().hash


def _holds(row: Row, n: int, rows_per_expert: float) -> bool:
    return (row.rows is None or rows_per_expert <= row.rows) and (row.width is None or n <= row.width)


@functools.cache
def table() -> Table:
    """configs.json, read once."""
    return load(FILE)


# ---------------------------------------------------------------------------------------------------------- the file


def load(path: Path) -> Table:
    """Read and check a table. A wrong row is named by file, kernel, family, dtype and place."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        families = {int(arch): int(family) for arch, family in content["families"].items()}
        listed = content["rows"]
        keys = {
            (kernel, int(family), dtype)
            for kernel, f in listed.items()
            for family, d in f.items()
            for dtype in d.keys()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(
            f'{path}: not a table of tiles ({e!r}); it holds "families" and "rows": kernel, family, dtype'
        ) from None
    rows = {}
    for kernel in KERNELS:
        for family in sorted(set(families.values())):
            for dtype in dict.fromkeys(DTYPES.values()):
                entries = listed.get(kernel, {}).get(str(family), {}).get(dtype)
                rows[kernel, family, dtype] = _rows(entries, (kernel, family, dtype), path)
    if unknown := keys - set(rows):
        raise ValueError(f"{path}: {_name(*min(unknown))} is no key of this table (a typing error?)")
    return Table(families, rows, hashlib.sha256(json.dumps([content["families"], listed]).encode()).hexdigest()[:12])


def _rows(entries: Any, key: tuple[str, int, str], path: Path) -> list[Row]:
    if not entries:
        raise ValueError(f"{path}: {_name(*key)} has no rows; every kernel needs some for every family and dtype")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {_name(*key)} is not a list of rows")
    rows = []
    for i, entry in enumerate(entries):
        place = f"{path}: {_name(*key)}[{i}]"
        if wrong := _wrong(entry):
            raise ValueError(f"{place}: {wrong}")
        m, n, k = entry["block"]
        row = Row(*key, entry.get("rows"), entry.get("width"),
                  Config(m, n, k, entry["warps"], entry["stages"], entry["ctas"]))  # fmt: skip
        for earlier in rows:
            if all(mine is not None and mine <= theirs for mine, theirs in _bounds(row, earlier)):
                raise ValueError(f"{place}: never reached, an earlier row holds all it holds")
        rows.append(row)
    if (rows[-1].rows, rows[-1].width) != (None, None):
        raise ValueError(f"{path}: {_name(*key)}: the last row must hold any load, without rows and width")
    return rows


def _bounds(row: Row, earlier: Row) -> list[tuple[int | None, int]]:
    """(own bound, the earlier row's) where the earlier row has one."""
    pairs = [(row.rows, earlier.rows), (row.width, earlier.width)]
    return [(mine, theirs) for mine, theirs in pairs if theirs is not None]


def _wrong(entry: Any) -> str:
    """What is wrong with one row of the file, or nothing."""
    wanted = {"block", "warps", "stages", "ctas"}
    if not isinstance(entry, dict) or not wanted <= set(entry) <= wanted | {"rows", "width"}:
        return f"needs {', '.join(sorted(wanted))}, may have rows and width"
    block = entry["block"]
    if not isinstance(block, list) or len(block) != 3 or not all(_power(b) and 16 <= b <= 256 for b in block):
        return f"block={block} is not [block_m, block_n, block_k], powers of two from 16 to 256"
    if not _power(entry["warps"]) or entry["warps"] > 16:
        return f"warps={entry['warps']} is not 1, 2, 4, 8 or 16"
    for name, most in {"stages": 16, "ctas": 32, "rows": 2**31, "width": 2**31}.items():
        if name in entry and not (type(entry[name]) is int and 1 <= entry[name] <= most):
            return f"{name}={entry[name]!r} is not a whole number from 1 to {most}"
    return ""


def _power(value: Any) -> bool:
    return type(value) is int and value > 0 and value & (value - 1) == 0


def _name(kernel: str, family: int, dtype: str) -> str:
    return f"{kernel}.{family}.{dtype}"


def dump(about: list[str], table: Table) -> str:
    """The file's text: one row a line, so that a change of the table is a readable diff."""
    kernels = []
    for kernel in KERNELS:
        families = []
        for family in sorted(set(table.families.values())):
            kinds = []
            for dtype in dict.fromkeys(DTYPES.values()):
                lines = [f"        {json.dumps(_entry(row))}" for row in table.rows[kernel, family, dtype]]
                kinds.append(f'      "{dtype}": [\n' + ",\n".join(lines) + "\n      ]")
            families.append(f'    "{family}": {{\n' + ",\n".join(kinds) + "\n    }")
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(families) + "\n  }")
    head = ",\n".join(f"  {json.dumps(line)}" for line in about)
    families_line = json.dumps({str(arch): family for arch, family in table.families.items()})
    return f'{{\n"about": [\n{head}\n],\n"families": {families_line},\n"rows": {{\n' + ",\n".join(kernels) + "\n}\n}\n"


def _entry(row: Row) -> dict[str, Any]:
    bounds = {name: getattr(row, name) for name in ("rows", "width") if getattr(row, name) is not None}
    c = row.config
    block = [c.block_m, c.block_n, c.block_k]
    return {**bounds, "block": block, "warps": c.num_warps, "stages": c.num_stages, "ctas": c.ctas}
