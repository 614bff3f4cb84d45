"""Building, finding and loading the library: with no compiler, a broken one, other sources, unknown levels, drift."""

import ctypes
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe.kernels.native import build, library

ROOT = Path(__file__).parents[3]
COMPILER = build.find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture
def sources(tmp_path):
    """A folder with what every library is made of, and no op, so that it compiles in a moment."""
    folder = tmp_path / "kernels" / "native"
    folder.mkdir(parents=True)
    for name in ("build.py", "interface.h", "scratch.h", *build.COMMON):
        shutil.copy(build.HERE / name, folder)
    return folder


@pytest.fixture
def fresh(monkeypatch):
    """fresh(folder, **environment): `library` as a new process sees it that finds its files there."""

    def look(folder, **environment):
        for name in ("MOE_NATIVE_LIBRARY", "MOE_NATIVE_LEVEL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(library, "HERE", folder)
        for name, value in (("_library", None), ("_why", None), ("_functions", {})):
            monkeypatch.setattr(library, name, value)
        return library

    return look


def broken(tmp_path):
    """A compiler that never likes what it sees."""
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\necho 'and more' >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


@needs_compiler
def test_a_machine_with_a_compiler_has_the_kernels_of_these_sources():
    assert library.status() == "", "the other tests here skip themselves without it"


@needs_compiler
def test_a_library_has_every_level_its_digest_and_no_symbol_too_many(sources):
    before = set(sources.iterdir())
    path = build.build(sources)
    assert set(sources.iterdir()) == before | {path} and path.name == build.LIBRARY
    assert build.digest_of(path) == build.digest(sources)
    loaded = ctypes.CDLL(str(path))
    assert loaded.moe_native_use(b"portable") == 1 and loaded.moe_native_use(b"avx3") == 0
    with pytest.raises(AttributeError):
        loaded.moe_scratch  # noqa: B018


def test_without_a_compiler_building_fails_in_one_line(sources, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="^no C\\+\\+ compiler was found .*CXX.*$"):
        build.build(sources)
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(build.BuildError, match="^/nowhere/g\\+\\+ cannot be run: No such file.*$"):
        build.build(sources)


def test_a_failing_compiler_is_quoted_and_leaves_the_old_library_alone(sources, tmp_path):
    (sources / build.LIBRARY).write_text("an older one")
    with pytest.raises(build.BuildError, match="failed: x.cpp:1: error: no such thing$") as error:
        build.build(sources, compiler=[broken(tmp_path)])
    assert "and more" in error.value.output
    assert (sources / build.LIBRARY).read_text() == "an older one"
    assert not list(sources.glob(f"{build.LIBRARY}.*"))


@needs_compiler
def test_an_old_compiler_leaves_levels_out_and_says_which(sources, tmp_path, capsys):
    script = tmp_path / "old"
    script.write_text(f'#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1;; esac\nexec {COMPILER[0]} "$@"\n')
    script.chmod(0o755)
    path = build.build(sources, compiler=[str(script)], levels=("portable", "avx512bf16"))
    loaded = ctypes.CDLL(str(path))
    loaded.moe_native_levels.restype = ctypes.c_char_p
    assert loaded.moe_native_levels() == b"portable"
    if build.platform.machine() == "x86_64":
        assert "too old for the level avx512bf16" in capsys.readouterr().out


def test_a_level_that_nobody_knows_is_refused(sources):
    with pytest.raises(build.BuildError, match="level 'avx3' is not one of.*portable"):
        build.build(sources, levels=["avx3"])


@needs_compiler
def test_a_stale_library_is_built_again_and_a_good_one_is_not(sources):
    """By Python's standard library alone (-I -S)."""
    out, command = sources / build.LIBRARY, [sys.executable, "-I", "-S", str(sources / "build.py"), "--stale"]
    assert "built" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before = out.stat().st_mtime_ns
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    assert out.stat().st_mtime_ns == before
    (sources / "interface.h").write_text((sources / "interface.h").read_text() + "// another thought\n")
    assert build.digest_of(out) != build.digest(sources)
    subprocess.run(command, capture_output=True, check=True)
    assert build.digest_of(out) == build.digest(sources)


def test_what_is_missing_is_told_with_the_way_out(sources, fresh, monkeypatch):
    why = fresh(sources).status()
    assert why.startswith("the native kernels were not built") and "python -m moe.kernels.native build" in why
    assert not library.exists()
    (sources.parents[1] / "Makefile").touch()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler; install g++ or clang++, then `make native`" in fresh(sources).status()
    with pytest.raises(RuntimeError, match="were not built"):
        library.level()


def test_a_library_of_other_sources_or_none_at_all_is_not_loaded(sources, fresh):
    (sources / build.LIBRARY).write_bytes(b"no library" + build.MARK + b"0123456789abcdef")
    assert "other sources" in fresh(sources).status() and library.exists()
    (sources / build.LIBRARY).write_bytes(b"no library" + build.MARK + build.digest(sources).encode())
    assert "cannot be loaded" in fresh(sources).status()
    assert "does not exist" in fresh(sources, MOE_NATIVE_LIBRARY="/nowhere/x.so").status() and library.exists()


@needs_compiler
def test_the_level_is_the_best_one_or_the_one_that_was_asked_for(sources, fresh, tmp_path):
    build.build(sources, levels=[*reversed(build.LEVELS)])
    assert fresh(sources).level() == library.levels()[-1]
    assert library.levels() == [level for level in build.LEVELS if level in library.levels()]
    library.use_level("portable")
    assert library.level() == "portable"
    assert fresh(sources, MOE_NATIVE_LEVEL="portable").level() == "portable"
    with pytest.raises(ValueError, match="level 'avx3' is not one of.*portable"):
        library.use_level("avx3")
    fresh(sources, MOE_NATIVE_LEVEL="avx3")
    for _ in range(2):
        with pytest.raises(ValueError, match="MOE_NATIVE_LEVEL='avx3' is not one of.*portable"):
            library.status()


@needs_compiler
def test_a_mirror_that_drifted_and_an_op_that_was_left_out_are_told(sources, fresh):
    from moe.kernels.native.experts import Experts

    build.build(sources, levels=["portable"])
    fresh(sources)
    with pytest.raises(RuntimeError, match="experts_forward was left out"):
        library.call("experts_forward", Experts())
    drifted = type("Experts", (library.Struct,), {"_fields_": [("n", ctypes.c_int64)]})
    with pytest.raises(RuntimeError, match="Experts has 8 bytes in Python and .* in interface.h"):
        library.call("experts_forward", drifted())
    inner = type("Outer", (library.Struct,), {"_fields_": [("of", ctypes.POINTER(drifted))]})
    with pytest.raises(RuntimeError, match="Experts has 8 bytes"):
        library._check(_Sizes(library._loaded(), Outer=8), inner)


class _Sizes:
    """A library that knows the sizes of more structs."""

    def __init__(self, real, **sizes):
        self._real, self._sizes = real, sizes

    def __getattr__(self, name):
        size = self._sizes.get(name.removeprefix("moe_native_sizeof_"))
        return getattr(self._real, name) if size is None else type("Size", (), {"__call__": lambda self: size})()


# --------------------------------------------------------------------------------------------------------- installation


@pytest.fixture
def package(sources, monkeypatch):
    """A checkout of next to nothing, with our setup.py."""
    pytest.importorskip("setuptools")
    root = sources.parents[1]
    shutil.copy(ROOT / "setup.py", root)
    (root / "moe").mkdir()
    (root / "moe" / "__init__.py").touch()
    monkeypatch.chdir(root)
    return root


def test_an_installation_without_a_compiler_says_so_in_one_line_and_goes_on(package, monkeypatch, capsys):
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("CXX", broken(package))
    old = package / "kernels" / "native" / build.LIBRARY
    old.write_text("made of other sources")
    assert runpy.run_path(str(package / "setup.py"))["native"]() is False
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 1 and "not built, the slower PyTorch path will be used" in said[0] and "no such thing" in said[0]
    )
    assert not old.exists()


@needs_compiler
@pytest.mark.parametrize("compiles", [True, False])
def test_a_wheel_is_for_this_platform_if_it_holds_the_library(package, monkeypatch, compiles):
    if not compiles:
        monkeypatch.setenv("CXX", broken(package))
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], check=True, capture_output=True)
    (wheel,) = (package / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"moe/kernels/native/dispatch.cpp", "moe/kernels/native/interface.h"} <= set(names)
    assert (f"moe/kernels/native/{build.LIBRARY}" in names) == compiles
    assert ("-py3-none-any" in wheel.name) != compiles and "-py3-none-" in wheel.name
