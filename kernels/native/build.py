"""Builds the native kernels: every op's file once a level, then the choice between them, into one shared library.

    python kernels/native/build.py [--stale] [--out FILE] [--levels avx2,portable] [--jobs N] [--sanitize] [FILE.cpp ...]

setup.py calls `build` at installation, `make native` runs this file. It needs GCC or Clang (tested: 12 and 22) as $CXX,
c++, g++ or clang++, and imports nothing but the standard library. Deliberately absent: -march=native, since a library may
travel; -ffast-math, since NaN must stay NaN.

A digest of the sources is compiled in: a library made of others is stale, and library.py does not load it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "libmoe_native.dylib" if sys.platform == "darwin" else "libmoe_native.so"
COMMON = ("dispatch.cpp", "scratch.cpp")  # compiled once; every other file once a level
LEVELS: dict[str, tuple[str, ...]] = {  # the last flag is the one that a level is known by
    "portable": (),
    "avx2": ("-mfma", "-mf16c", "-mavx2"),
    "avx512": ("-mfma", "-mf16c", "-mavx2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
LEVELS["avx512bf16"] = (*LEVELS["avx512"], "-mavx512bf16")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
SANITIZE = (  # -O1 takes five times as long to compile, and the tests half as long to run (measured)
    "-O0", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-fno-sanitize=nonnull-attribute",  # an empty tensor has no address, and setting none of its bytes does no harm
    "-DMOE_POISON",  # working memory starts as NaN: scratch.cpp
)  # fmt: skip
MARK = b"moe-native-digest:"


class BuildError(Exception):
    """One line; `output` is what the compiler said."""

    def __init__(self, line: str, output: str = ""):
        super().__init__(line)
        self.output = output


def digest(folder: Path = HERE) -> str:
    """Of all that a library is made of: sources, headers, and this file with its flags."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h"), folder / "build.py"]):
        if path.exists():
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def digest_of(library: Path) -> str:
    """The digest inside a library, read without loading it; "" where there is none."""
    found = re.search(re.escape(MARK) + rb"([0-9a-f]{16})", library.read_bytes())
    return found.group(1).decode() if found else ""


def find_compiler() -> list[str] | None:
    """$CXX, which may hold arguments, or else the first of the usual names that is installed."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def build(
    folder: Path | str = HERE, out: Path | str | None = None, compiler: Sequence[str] | None = None,
    flags: Sequence[str] = (), levels: Sequence[str] = tuple(LEVELS), only: Sequence[str] = (), jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Compile and link; -> the library, put in place whole or not at all. Raises BuildError.

    flags: behind the usual ones; levels, only: fewer of them, or fewer of the ops' files, to have it sooner.
    """
    folder = Path(folder).resolve()
    out = Path(out or folder / LIBRARY).resolve()
    if sys.platform == "win32":
        raise BuildError("they are written for GCC and Clang, on Linux and macOS")
    if unknown := [level for level in levels if level not in LEVELS]:
        raise BuildError(f"level {unknown[0]!r} is not one of {list(LEVELS)}")
    compiler = list(compiler or find_compiler() or ())
    if not compiler:
        raise BuildError("no C++ compiler was found (c++, g++, clang++, or what CXX names)")
    ops = sorted(path.name for path in folder.glob("*.cpp") if path.name not in COMMON)
    ops = [name for name in ops if not only or name in only]
    with tempfile.TemporaryDirectory() as work:
        base = [*compiler, *FLAGS, *_openmp(compiler, Path(work), say), *flags]
        levels = [x for x in LEVELS if x in levels and _can(compiler, x, Path(work), say)]  # the best one last
        built = "-DMOE_BUILT(X)=" + " ".join(f"X({level})" for level in levels)
        units = [(name, f"-DMOE_LEVEL={level}", *LEVELS[level]) for level in reversed(levels) for name in ops]
        units += [("dispatch.cpp", built, f'-DMOE_DIGEST="{MARK.decode()}{digest(folder)}"'), ("scratch.cpp",)]
        objects = [str(Path(work) / f"{i}.o") for i in range(len(units))]
        with ThreadPoolExecutor(jobs or cores()) as pool:
            commands = [[*base, "-c", str(folder / u), *more, "-o", o] for (u, *more), o in zip(units, objects)]
            list(pool.map(_run, commands))
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(f"{out.name}.{os.getpid()}")
        try:
            _run([*base, "-shared", *objects, "-o", str(fresh)])
            os.replace(fresh, out)
        finally:
            fresh.unlink(missing_ok=True)
    return out


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else f"exit {done.returncode}")
        raise BuildError(f"{command[0]} failed: {first}", f"{shlex.join(command)}\n{done.stderr}{done.stdout}")


def _probe(compiler: list[str], work: Path, source: str, *flags: str) -> None:
    """Raises BuildError where this does not become a library."""
    path = work / "probe.cpp"
    path.write_text(source)
    _run([*compiler, *FLAGS, *flags, "-shared", str(path), "-o", str(work / "probe.so")])


def _openmp(compiler: list[str], work: Path, say: Callable[[str], None]) -> list[str]:
    _probe(compiler, work, "int one() { return 1; }\n")
    try:
        _probe(compiler, work, "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n", "-fopenmp")
        return ["-fopenmp"]
    except BuildError:
        say(f"native kernels: {compiler[0]} has no OpenMP, so they will run on one thread")
        return []


def _can(compiler: list[str], level: str, work: Path, say: Callable[[str], None]) -> bool:
    """Whether the compiler knows the level, for the processor that it compiles for."""
    flags = LEVELS[level]
    if not flags:
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        _probe(compiler, work, f'int has() {{ return __builtin_cpu_supports("{flags[-1][2:]}"); }}\n', *flags)
        return True
    except BuildError:
        say(f"native kernels: {compiler[0]} is too old for the level {level}, which is left out")
        return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="build.py", description="Build the native kernels.")
    parser.add_argument("--stale", action="store_true", help="only if the library is missing or made of other sources")
    parser.add_argument("--out", type=Path, default=HERE / LIBRARY)
    parser.add_argument("--levels", default=",".join(LEVELS), help="fewer of them, separated by commas")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: cores)")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("only", nargs="*", help="the ops' files to compile (default: all)")
    args = parser.parse_args(argv)
    if args.stale and args.out.exists() and digest_of(args.out) == digest():
        return 0
    try:
        flags = SANITIZE if args.sanitize else ()
        out = build(out=args.out, flags=flags, levels=args.levels.split(","), only=args.only, jobs=args.jobs)
    except BuildError as error:
        said = "" if args.stale else error.output + "\n"
        print(
            f"{said}native kernels: not built, the slower PyTorch path will be used: {error}".strip(), file=sys.stderr
        )
        return 1
    print(f"native kernels: built {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
