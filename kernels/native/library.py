"""The built kernels: found and loaded at their first use, called with mirrors of interface.h's structs.

    class Experts(Struct):                           # beside its binding, named as in interface.h
        _fields_ = [("n", c_int64), ...]
    call("experts_forward", Experts(n=3, x=pointer(x), dtype=DTYPES[x.dtype], threads=threads()))

Nothing is loaded while `moe` is imported, and torch always comes first: its OpenMP runtime is then the one that the
kernels find, so both share one pool of threads. ctypes lets go of Python's lock during a call.

    MOE_NATIVE_LIBRARY   another library than the one beside this file, taken without a look at its digest
    MOE_NATIVE_LEVEL     portable, avx2, avx512 or avx512bf16 instead of the best that the processor runs

`python -m moe.kernels.native` says what there is.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe.kernels.native import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
HERE = Path(__file__).resolve().parent
_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_why: str | None = None  # "" once it is loaded, None before the first look
_functions: dict[tuple[str, type], Callable] = {}


class Struct(ctypes.Structure):
    """Mirror of a struct of interface.h, under its name; its size is compared at the first call."""


def pointer(tensor: Tensor | None) -> int | None:
    """What a field that is a pointer takes; the tensor must outlive the call."""
    return None if tensor is None else tensor.data_ptr()


def threads() -> int:
    return torch.get_num_threads()


def call(name: str, struct: Struct) -> None:
    """Run op `name`; MemoryError and ValueError as its result says, RuntimeError where there is no library."""
    function = _functions.get((name, type(struct))) or _function(name, type(struct))
    if code := function(ctypes.byref(struct)):
        raise _ERRORS[code](name)


_ERRORS: dict[int, Callable[[str], Exception]] = {
    1: lambda name: MemoryError(f"{name}: no memory to work in"),
    2: lambda name: ValueError(f"{name}: the tensors are too large for the native kernels"),
    3: lambda name: RuntimeError(f"{name} was left out when the native kernels were built; {remedy()}"),
}


def status() -> str:
    """Why the kernels are not there, and what to do; "" where they are. Raises ValueError for a wrong MOE_NATIVE_LEVEL."""
    global _library, _why
    with _lock:
        if _why is None:
            library, why = _open(_path())
            name = os.environ.get("MOE_NATIVE_LEVEL")
            if library and name and not library.moe_native_use(name.encode()):
                raise ValueError(f"MOE_NATIVE_LEVEL={name!r} is not one of {_levels(library)}, which run here")
            _library, _why = library, why
        return _why


def exists() -> bool:
    """Whether somebody meant to have the kernels: where `status` finds fault then, it is worth a warning."""
    return bool(os.environ.get("MOE_NATIVE_LIBRARY")) or _path().exists()


def level() -> str:
    """The level that answers now."""
    return _loaded().moe_native_level().decode()


def levels() -> list[str]:
    """The levels that this library has and this processor runs, the best one last."""
    return _levels(_loaded())


def use_level(name: str) -> None:
    """Answer by that level from now on, in the whole process; "" is the best. For tests."""
    if not _loaded().moe_native_use(name.encode()):
        raise ValueError(f"level {name!r} is not one of {levels()}, which run here")


def remedy() -> str:
    """The command that builds the library here."""
    checkout = (HERE.parents[1] / "Makefile").exists()
    return "`make native` builds them" if checkout else "`python -m moe.kernels.native build` builds them"


def _path() -> Path:
    return Path(os.environ.get("MOE_NATIVE_LIBRARY") or HERE / build.LIBRARY)


def _open(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, why not)."""
    named = bool(os.environ.get("MOE_NATIVE_LIBRARY"))
    if not path.exists():
        if named:
            return None, f"MOE_NATIVE_LIBRARY={path} does not exist"
        missing = "" if build.find_compiler() else "there is no C++ compiler; install g++ or clang++, then "
        return None, f"the native kernels were not built; {missing}{remedy()}"
    if not named and build.digest_of(path) != build.digest(HERE):
        return None, f"the native kernels were built from other sources than those here; {remedy()} again"
    try:
        library = ctypes.CDLL(str(path))
        for name in ("moe_native_level", "moe_native_levels"):
            getattr(library, name).restype = ctypes.c_char_p
        library.moe_native_use.argtypes = [ctypes.c_char_p]
    except (OSError, AttributeError) as error:  # another processor's, a missing runtime, something else altogether
        return None, f"{path.name} cannot be loaded ({error}); {remedy()} for this machine"
    return library, ""


def _loaded() -> ctypes.CDLL:
    if why := status():
        raise RuntimeError(why)
    assert _library is not None
    return _library


def _levels(library: ctypes.CDLL) -> list[str]:
    return library.moe_native_levels().decode().split()


def _function(name: str, kind: type[Struct]) -> Callable:
    library = _loaded()
    _check(library, kind)
    function = getattr(library, f"moe_{name}")
    function.argtypes, function.restype = [ctypes.POINTER(kind)], ctypes.c_int
    _functions[name, kind] = function
    return function


def _check(library: ctypes.CDLL, kind: type[Struct]) -> None:
    """The mirror is as large as the struct, and so are the structs that it points to."""
    size = getattr(library, f"moe_native_sizeof_{kind.__name__}")
    size.restype = ctypes.c_int64
    if size() != ctypes.sizeof(kind):
        raise RuntimeError(f"{kind.__name__} has {ctypes.sizeof(kind)} bytes in Python and {size()} in interface.h")
    for _, field, *_ in kind._fields_:
        inner = getattr(field, "_type_", None)
        if isinstance(inner, type) and issubclass(inner, Struct):
            _check(library, inner)
