"""Compile recorded launches for cards that are not here, and read what came out: registers, memory, instructions.

    with recording(90) as launches: ...                the production wrappers, on meta tensors
    compiled = compile_for(launches, 90)               `key` tells equal ones apart beforehand

Triton's own just-in-time path compiles, warm-up only: a driver that merely names the architecture stands in for the real
one, so types, divisibility, constants and options are what a launch on that card would have. Triton brings the assembler
and the disassembler; no GPU and no CUDA toolkit is needed. Needs a process of its own without TRITON_INTERPRET, and an
empty TRITON_CACHE_DIR, as a cached kernel has no assembler's log.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moe.kernels.launch import INTERPRET, Launch

KB = 1024
REGISTERS, TENSOR_COLUMNS = 65536, 512
"""Of one multiprocessor, every architecture from 80 on; columns of tensor memory where there is any."""


class Limits(NamedTuple):
    """What a block may take and a multiprocessor holds (CUDA programming guide, table of compute capabilities)."""

    block_shared: int
    shared: int
    warps: int
    blocks: int


BIG, SMALL = Limits(227 * KB, 228 * KB, 64, 32), Limits(99 * KB, 100 * KB, 48, 24)
LIMITS = {
    80: Limits(163 * KB, 164 * KB, 64, 32), 86: SMALL._replace(blocks=16), 89: SMALL,
    90: BIG, 100: BIG, 103: BIG, 120: SMALL, 121: SMALL,
}  # fmt: skip


class Compiled(NamedTuple):
    kernel: str
    arch: int
    hash: str
    """Triton's, of source, types, constants and options: equal for equal binaries."""
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    """Of one thread."""
    stack: int
    """Bytes of one thread."""
    shared: int
    tensor_columns: int
    warnings: list[str]
    """Of the assembler."""
    instructions: Counter[str]
    """Whole words, `LDGSTS.E.BYPASS.LTC128B.128`."""

    def count(self, *names: str, of: Iterable[str] = ()) -> int:
        """Instructions whose first part is one of these, * for anything; `of`: only with one of these parts later on."""
        fits = [re.compile(name.replace("*", ".*")).fullmatch for name in names]
        found = 0
        for word, n in self.instructions.items():
            first, *later = word.split(".")
            found += n * (any(fit(first) for fit in fits) and (not of or bool(set(of) & set(later))))
        return found

    @property
    def tensor_word(self) -> str:
        """The instruction that products of this card are made of: wgmma on 90, tcgen05.mma on 100 and 103, else mma.sync."""
        return {90: "HGMMA", 100: "UTC*MMA", 103: "UTC*MMA"}.get(self.arch, "HMMA")

    @property
    def ctas(self) -> int:
        """Programs that fit on one multiprocessor at a time."""
        have = LIMITS[self.arch]
        of_warp = -(-32 * self.registers // 256) * 256
        fit = [have.blocks, have.warps // self.warps, have.shared // (self.shared + KB)]
        fit += [REGISTERS // (of_warp * self.warps)]
        return min(fit + [TENSOR_COLUMNS // self.tensor_columns] if self.tensor_columns else fit)


class _Pretended:
    """The part of a driver that compiling asks; the device's number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def key(launch: Launch, arch: int) -> str:
    """What Triton would keep the compiled launch under: equal for equal binaries, and nothing is compiled to know it."""
    driver.set_active(_Pretended(arch))
    _, specialised, options = launch.kernel.device_caches[arch][-1](*launch.args, **launch.options)
    return f"{launch.kernel.__module__}.{launch.kernel.__name__} {specialised} {options}"


def constants(launch: Launch) -> dict[str, Any]:
    """The numbers and words that a kernel is specialised for by name."""
    given = dict(zip((p.name for p in launch.kernel.params), launch.args)) | launch.options
    return {p.name: given[p.name] for p in launch.kernel.params if p.is_constexpr and p.name in given}


def compile_for(launches: Iterable[Launch], arch: int) -> list[Compiled | Exception]:
    """What Triton would start on a card of this architecture; what the compiler raises stands in the launch's place."""
    assert not INTERPRET, "under TRITON_INTERPRET there is nothing to compile"
    driver.set_active(_Pretended(arch))
    found: list[Compiled | Exception] = []
    codes = []
    for launch in launches:
        try:
            made, code = _compiled(launch, arch)
        except Exception as error:  # there are as many kinds as compiler passes
            made, code = error, b""
        found.append(made)
        codes.append(code)
    counts = disassembled(codes, arch)
    return [m if isinstance(m, Exception) else m._replace(instructions=c) for m, c in zip(found, counts)]


def _compiled(launch: Launch, arch: int) -> tuple[Compiled | Exception, bytes]:
    """All but the instructions, and their code."""
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        made = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    warnings = [line for line in said.getvalue().splitlines() if "warning" in line.lower()]
    m = made.metadata
    registers, stack = _used(made.asm["cubin"])
    compiled = Compiled(
        launch.kernel.__name__, arch, made.hash, constants(launch), m.num_warps, m.num_stages,
        registers, stack, m.shared, getattr(m, "tmem_size", 0) or 0, warnings, Counter(),
    )  # fmt: skip
    return compiled, text_of(made.asm["cubin"])


def _used(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if not used:
        raise RuntimeError(f"cuobjdump said nothing of registers: {(said.stderr or said.stdout).strip()[:200]}")
    return int(used[1]), int(used[2])


def text_of(cubin: bytes) -> bytes:
    """The machine code: sections .text* of a 64-bit ELF file."""
    (table,), (size, number, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    name_of = {s[0]: cubin[(at := sections[names][4] + s[0]) : cubin.index(b"\0", at)] for s in sections}
    return b"".join(cubin[s[4] : s[4] + s[5]] for s in sections if name_of[s[0]].startswith(b".text"))


WORD = 16  # bytes of an instruction
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def disassembled(codes: list[bytes], arch: int) -> list[Counter[str]]:
    """Instructions of each code, counted. All in one call: the disassembler takes longer to start than to read."""
    counts: list[Counter[str]] = [Counter() for _ in codes]
    owner = [i for i, code in enumerate(codes) for _ in range(len(code) // WORD)]
    if not owner:
        return counts
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        tool = Path(triton.knobs.nvidia.cuobjdump.path).with_name("nvdisasm")
        for decoder in (arch, arch - arch % 10):  # Triton 3.6 cannot read 103 and 121, which are 100 and 120 in words
            said = _run(str(tool), "-ndf", "-b", f"SM{decoder}{'a' * (decoder >= 90)}", file.name)
            if not said.returncode:
                break
    words = _INSTRUCTION.findall(said.stdout)
    if len(words) != len(owner):
        raise RuntimeError(f"nvdisasm read {len(words)} of {len(owner)} instructions: {said.stderr.strip()[:200]}")
    for at, word in words:
        counts[owner[int(at, 16) // WORD]][word] += 1
    return counts


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)
