"""The mutation check itself: every mutation still has its place, and a survivor would be seen."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("mutate_tool", ROOT / "tools" / "mutate_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(file):
    return (ROOT / "kernels" / f"{file}.py").read_text()


def test_every_mutation_finds_its_place_and_leaves_python(tool):
    for mutation in tool.MUTATIONS:
        broken = tool.apply(mutation, source(mutation.file))
        assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source(mutation.file))), mutation


def test_every_kernel_file_is_broken_somewhere(tool):
    with_kernels = {path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()}
    assert with_kernels == {mutation.file for mutation in tool.MUTATIONS}
    for file in with_kernels:
        assert all((ROOT / path).exists() for path in tool.tests_of(file))


def test_a_place_that_is_gone_or_not_alone_is_named(tool):
    for old in ("no such line", "tl.load"):
        with pytest.raises(ValueError, match=r"kernels/gmm\.py: a try: .* times, not once"):
            tool.apply(tool.Mutation("gmm", "a try", old, ""), "x = tl.load(a) + tl.load(b)")


def test_survivors_are_told_from_what_a_test_notices(tool, monkeypatch, tmp_path, capsys):
    """On a house of one function, whose test sees one of its two lines."""
    for name, text in {
        "kernels/sums.py": "def total(a, b):\n    unseen = 1\n    return a + b\n",
        "tests/kernels/test_sums.py": "import sys\nsys.path.insert(0, 'kernels')\nfrom sums import total\n\n\n"
        "def test_it():\n    assert total(2, 3) == 5\n",
        "tests/kernels/test_chain.py": "def test_nothing():\n    pass\n",
        "moe/__init__.py": "",
        "pyproject.toml": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    seen, unseen = (
        tool.Mutation("sums", "minus", "a + b", "a - b"),
        tool.Mutation("sums", "idle", "unseen = 1", "unseen = 2"),
    )
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "MUTATIONS", [seen, unseen])
    assert tool.main(["--jobs", "1"]) == 1
    told = capsys.readouterr().out
    assert "SURVIVES sums: idle" in told and "noticed  sums: minus" in told and "1 of 2 mutations noticed" in told
    assert (tmp_path / "kernels" / "sums.py").read_text().count("a + b") == 1  # the house itself is untouched
