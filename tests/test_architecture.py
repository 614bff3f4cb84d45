"""The house rules, as tables: who may import whom, and where each heavy package may be imported.

A file imports strictly lower floors; a folder is one floor, whose files may import each other. Imports inside functions
count. A new module needs an entry here; a test names each breach.
"""

import ast
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOOR = {  # path, or folder with everything in it -> floor
    "kernels/": 0,
    "moe/config/": 1.0,
    "moe/files.py": 1.0,
    "moe/parallel.py": 1.1,
    "moe/ops/": 1.1,
    "moe/layers/basics.py": 2.0,
    "moe/layers/cache.py": 2.0,
    "moe/layers/routing.py": 2.0,
    "moe/layers/balance.py": 2.1,
    "moe/layers/dispatch.py": 2.1,
    "moe/layers/attention.py": 2.2,
    "moe/layers/router.py": 2.2,
    "moe/layers/experts.py": 2.2,
    "moe/layers/moe.py": 2.3,
    "moe/layers/block.py": 2.4,
    "moe/layers/precision.py": 2.45,
    "moe/layers/mtp.py": 2.5,
    "moe/layers/__init__.py": 2.6,
    "moe/data/": 3.0,
    "moe/model.py": 3.0,
    "moe/objectives/": 3.1,
    "moe/inference/": 4,
    "moe/interop/": 4,
    "moe/analysis/": 4,
    "moe/train/": 5,
    "moe/rl/": 6,
    "moe/study/": 6,
    "moe/__init__.py": 7,
    "recipes/": 8,
    "tools/": 8,
}

OPEN = {"torch", "numpy"}  # anybody may import these and the standard library

DOOR = {  # package -> the only paths that import it
    "triton": ["kernels/"],
    "omegaconf": ["moe/config/load.py"],
    "yaml": ["moe/config/load.py", "moe/train/log.py", "moe/train/run_folder.py"],
    "torch.distributed": ["moe/parallel.py"],
    "tokenizers": ["moe/data/tokenizer.py"],
    "datasets": ["moe/data/sources.py"],
    "reasoning_gym": ["moe/data/tasks.py"],
    "flash_attn": ["kernels/varlen.py"],
    "liger_kernel": ["tools/gpu/"],  # peers to measure against, where they are installed
    "sonicmoe": ["tools/gpu/"],
    "deep_gemm": ["tools/gpu/"],
    "safetensors": ["moe/interop/hf.py", "moe/train/checkpoint.py"],
    "transformers": ["moe/interop/hf_experts.py", "tools/bench/"],  # there as the peer to measure against
    "matplotlib": ["moe/analysis/chart.py"],
    "deepspeed": ["moe/train/zero.py"],
    "wandb": ["moe/train/log.py"],
    "rich": ["moe/train/log.py", "tools/"],
}

ADVICE, HARD_STOP = 300, 500  # lines of a module
RECIPE, FUNCTION = 90, 60  # advice
LONG: dict[str, int] = {}  # module -> its own hard stop, with the reason

SUBSTANCE = 25  # lines of a module, from which on it has a test file of its own
TESTED_ELSEWHERE = {  # module -> the file or folder that tests it
    "moe/config/__init__.py": "tests/test_config.py",
    "moe/config/knobs.py": "tests/test_config.py",
    "moe/config/load.py": "tests/test_config.py",
    "moe/config/model.py": "tests/test_config.py",
    "moe/config/recipes.py": "tests/test_config.py",
    "moe/data/__init__.py": "tests/data/test_prepare.py",
    "moe/data/store.py": "tests/data/test_prepare.py",
    "moe/interop/hf_config.py": "tests/interop/test_hf.py",
    "moe/interop/hf_folder.py": "tests/interop/test_hf.py",
    "moe/interop/hf_names.py": "tests/interop/test_hf.py",
    "moe/parallel.py": "tests/train/test_trainer.py",
    "moe/train/loop.py": "tests/train/test_trainer.py",
    "moe/train/zero.py": "tests/train/test_engine.py",
    "moe/objectives/__init__.py": "tests/objectives/test_pretraining.py",
    "moe/objectives/advantages.py": "tests/objectives/test_policy.py",
    "moe/rl/start.py": "tests/rl/test_grpo.py",
    "moe/train/evaluate.py": "tests/train/test_trainer.py",
    "moe/train/run_folder.py": "tests/train/test_log.py",
    "moe/train/summary.py": "tests/recipes/test_smoke.py",
    "moe/layers/routing.py": "tests/layers/test_router.py",
    "moe/layers/experts.py": "tests/layers/test_moe.py",
    "moe/__init__.py": "tests/test_public_api.py",
    "kernels/eager.py": "tests/ops/test_grouped.py",
    "kernels/reference.py": "tests/ops/test_grouped.py",
    "kernels/attention.py": "tests/ops/test_attend.py",
    "kernels/norm.py": "tests/ops/test_norm.py",
    "kernels/head.py": "tests/ops/test_head.py",
    "kernels/launch.py": "tests/kernels/test_compile.py",
    "kernels/ahead.py": "tests/kernels/test_compile.py",
    "kernels/tiles.py": "tests/kernels/test_gmm.py",
    "kernels/native/library.py": "tests/kernels/native/test_build.py",
    "kernels/native/selftest.py": "tests/ops/test_paths.py",
    "moe/ops/__init__.py": "tests/ops/test_paths.py",
    "moe/ops/backends.py": "tests/ops/test_attention_backends.py",
    "moe/ops/fused.py": "tests/ops/test_attention_backends.py",
    "kernels/packed.py": "tests/ops/test_attention_backends.py",
    "kernels/flex.py": "tests/ops/test_attention_backends.py",
    "kernels/varlen.py": "tests/ops/test_attention_backends.py",
    "kernels/sdpa.py": "tests/ops/test_attention_backends.py",
}

NEWER = {  # names that Python 3.10 lacks; mypy finds more, this one is there without it
    "builtins": {"ExceptionGroup", "BaseExceptionGroup"},
    "contextlib": {"chdir"},
    "datetime": {"UTC"},
    "enum": {"StrEnum", "ReprEnum", "member", "nonmember", "verify"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod"},
    "tomllib": {"load", "loads"},
    "typing": {"Never", "NotRequired", "Required", "Self", "Unpack", "assert_never", "assert_type", "override"},
}


# ---------------------------------------------------------------------------------------------------------- the walk


def sources(root: Path) -> list[str]:
    """Python files of the house, relative; the link moe/kernels is not followed, kernels/ is walked itself."""
    found = []
    for house in ("kernels", "moe", "recipes", "tools"):
        for folder, folders, files in os.walk(root / house):
            folders[:] = [f for f in folders if f != "__pycache__" and not os.path.islink(os.path.join(folder, f))]
            found += [(Path(folder) / f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    return sorted(found)


def module_of(path: str) -> str:
    """moe/data/__init__.py -> moe.data; kernels/eager.py -> moe.kernels.eager."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"moe.{name}" if name.split(".")[0] == "kernels" else name


def entry(path: str) -> str | None:
    """The key of FLOOR that holds this path."""
    folders = [key for key in FLOOR if key.endswith("/") and path.startswith(key)]
    return path if path in FLOOR else max(folders, key=len, default=None)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str | None]]:
    """Every (module, name or None) that a file imports, at any depth, relative and dynamic imports included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield from ((source, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, None
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}", None  # torch.distributed is there without an import of its own


def breaches(root: Path) -> list[str]:
    """Every breach of floors and doors, such as `moe/layers/router.py imports moe.train (floor 5 > 2.2)`."""
    paths = sources(root)
    path_of = {module_of(path): path for path in paths}
    for key in FLOOR:  # a floor that is not built yet is one all the same
        path_of.setdefault(module_of(key.rstrip("/")), key)
    found: dict[str, None] = {}
    for path in paths:
        own = entry(path)
        if own is None:
            found[f"{path} has no floor"] = None
            continue
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        for source, name in imports(tree, module_of(path), path.endswith("__init__.py")):
            target = f"{source}.{name}" if name and f"{source}.{name}" in {*path_of, *DOOR} else source
            top = target.split(".")[0]
            if top == "moe":
                while target not in path_of:
                    target = target.rpartition(".")[0]
                other = entry(path_of[target])
                if other and other != own and FLOOR[other] >= FLOOR[own]:
                    sign = ">" if FLOOR[other] > FLOOR[own] else "="
                    found[f"{path} imports {target} (floor {FLOOR[other]:g} {sign} {FLOOR[own]:g})"] = None
                continue
            package = next((p for p in DOOR if target == p or target.startswith(p + ".")), None)
            if package:
                if not any(path == door or door.endswith("/") and path.startswith(door) for door in DOOR[package]):
                    found[f"{path} imports {package}, whose door is {' and '.join(DOOR[package])}"] = None
            elif top not in OPEN | sys.stdlib_module_names and not (root / path).with_name(f"{top}.py").exists():
                found[f"{path} imports {top}, which has no door"] = None
    return list(found)


def misnamed(root: Path) -> list[str]:
    """Files that would hide a module from their neighbours: a script's folder comes first on the path."""
    taken = sys.stdlib_module_names | OPEN | {package.split(".")[0] for package in DOOR} | {"moe", "kernels"}
    scripts = [path for path in sources(root) if path.startswith(("recipes/", "tools/"))]
    return [f"{path} hides the module {Path(path).stem}" for path in scripts if Path(path).stem in taken]


def too_new(root: Path) -> list[str]:
    """Syntax and names that Python 3.10 does not have."""
    found = []
    for path in sources(root):
        text = (root / path).read_text(encoding="utf-8")
        try:
            tree = ast.parse(text, feature_version=(3, 10))
        except SyntaxError as error:
            found.append(f"{path}:{error.lineno} is not Python 3.10: {error.msg}")
            continue
        used = {(source, name) for source, name in imports(tree, module_of(path), path.endswith("__init__.py"))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.add((node.value.id, node.attr))
            elif isinstance(node, ast.Name):
                used.add(("builtins", node.id))
        found += [
            f"{path} uses {m}.{n}, newer than Python 3.10" for m, n in sorted(used, key=str) if n in NEWER.get(m, ())
        ]
        found += [f"{path} imports tomllib, newer than Python 3.10" for m, _ in used if m == "tomllib"]
    return found


def oversized(root: Path) -> tuple[list[str], list[str]]:
    """(over the hard stop, over the advised size)."""
    stop, advice = [], []
    for path in sources(root):
        text = (root / path).read_text(encoding="utf-8")
        lines = len(text.splitlines())
        limit = RECIPE if path.startswith("recipes/") else LONG.get(path, ADVICE)
        if lines > LONG.get(path, HARD_STOP):
            stop.append(f"{path} has {lines} lines (hard stop {LONG.get(path, HARD_STOP)})")
        elif lines > limit:
            advice.append(f"{path} {lines} lines (advice {limit})")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION:
                    advice.append(f"{path}:{node.name} {length} lines (advice {FUNCTION})")
    return stop, advice


def untested(root: Path) -> list[str]:
    """Modules of substance without a test file in the mirrored place."""
    found = []
    for path in sources(root):
        if path.startswith(("recipes/", "tools/")) or len((root / path).read_text("utf-8").splitlines()) < SUBSTANCE:
            continue
        folder, stem = Path("tests", *Path(path).parts[:-1]), Path(path).stem
        if path.startswith("moe/"):
            folder = Path("tests", *Path(path).parts[1:-1])
        elsewhere = TESTED_ELSEWHERE.get(path)
        if not any((root / folder).glob(f"test_{stem}*.py")) and not (elsewhere and (root / elsewhere).exists()):
            found.append(f"{path} has no {(folder / f'test_{stem}.py').as_posix()}")
    return found


# --------------------------------------------------------------------------------------------------------- this house


def test_imports_keep_to_floors_and_doors():
    found = breaches(ROOT)
    assert not found, "\n".join(found)


def test_kernels_is_a_shelf_behind_a_link():
    link = ROOT / "moe" / "kernels"
    assert link.is_symlink(), "moe/kernels is not a link: git config core.symlinks true, then check it out again"
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide the package `kernels` that transformers uses"


def test_scripts_hide_no_module():
    found = misnamed(ROOT)
    assert not found, "\n".join(found)


def test_code_runs_on_the_oldest_python_we_promise():
    found = too_new(ROOT)
    assert not found, "\n".join(found)


def test_modules_stay_small():
    stop, advice = oversized(ROOT)
    if advice:
        warnings.warn("longer than advised: " + "; ".join(advice), stacklevel=1)
    assert not stop, "\n".join(stop)


def test_tests_mirror_the_tree():
    found = untested(ROOT)
    assert not found, "\n".join(found)


# --------------------------------------------------------------------------------------------------- planted breaches


@pytest.fixture
def house(tmp_path):
    """house({path: source}): a tree of its own."""

    def build(files: dict[str, str]) -> Path:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return build


ROUTER = "moe/layers/router.py"


@pytest.mark.parametrize(
    "path, source, breach",
    [
        (ROUTER, "import moe.train", f"{ROUTER} imports moe.train (floor 5 > 2.2)"),
        (ROUTER, "from moe import train", f"{ROUTER} imports moe.train (floor 5 > 2.2)"),
        (ROUTER, "from moe.train import log", f"{ROUTER} imports moe.train.log (floor 5 > 2.2)"),
        (ROUTER, "from moe.train.log import entry", f"{ROUTER} imports moe.train.log (floor 5 > 2.2)"),
        (ROUTER, "def f():\n    from ..train import log", f"{ROUTER} imports moe.train.log (floor 5 > 2.2)"),
        (ROUTER, "from .moe import MoE", f"{ROUTER} imports moe.layers.moe (floor 2.3 > 2.2)"),
        (ROUTER, "from moe import Transformer", f"{ROUTER} imports moe (floor 7 > 2.2)"),
        (ROUTER, "import importlib as i\ni.import_module('moe.rl')", f"{ROUTER} imports moe.rl (floor 6 > 2.2)"),
        ("moe/layers/experts.py", "import moe.layers.router", "moe/layers/experts.py imports moe.layers.router (floor 2.2 = 2.2)"),
        ("moe/study/sweep.py", "import moe.rl", "moe/study/sweep.py imports moe.rl (floor 6 = 6)"),
        ("kernels/eager.py", "from moe import config", "kernels/eager.py imports moe.config (floor 1 > 0)"),
        ("moe/data/__init__.py", "from . import store\nfrom .. import objectives", "moe/data/__init__.py imports moe.objectives (floor 3.1 > 3)"),
        ("moe/layers/new.py", "", "moe/layers/new.py has no floor"),
        ("moe/new.py", "", "moe/new.py has no floor"),
        ("moe/ops/head.py", "def f():\n    import triton.language as tl", "moe/ops/head.py imports triton, whose door is kernels/"),
        ("moe/model.py", "from torch import distributed", "moe/model.py imports torch.distributed, whose door is moe/parallel.py"),
        ("moe/model.py", "import torch\ntorch.distributed.barrier()", "moe/model.py imports torch.distributed, whose door is moe/parallel.py"),
        ("recipes/sft.py", "import wandb", "recipes/sft.py imports wandb, whose door is moe/train/log.py"),
        ("moe/model.py", "import yaml", f"moe/model.py imports yaml, whose door is {' and '.join(DOOR['yaml'])}"),
        ("tools/plan.py", "from scipy import stats", "tools/plan.py imports scipy, which has no door"),
    ],
)  # fmt: skip
def test_a_planted_import_is_named(house, path, source, breach):
    tree = {
        "moe/train/log.py": "",
        "moe/data/store.py": "",
        "moe/objectives/__init__.py": "",
        ROUTER: "",
        "moe/layers/moe.py": "",
    }
    assert breaches(house({**tree, path: source})) == [breach]


def test_what_is_allowed_is_not_named(house):
    clean = {
        "moe/__init__.py": "from moe import ops\nfrom moe.config import load",
        "moe/config/load.py": "def f():\n    import omegaconf, yaml",
        "moe/ops/head.py": "import torch\nfrom moe.config import UserError\nfrom moe.kernels import eager",
        "moe/train/log.py": "import os.path\nimport numpy as np\nfrom moe import parallel\nfrom moe.train.engine import Engine",
        "moe/train/engine.py": "from . import log\nimport torch.nn.functional as F",
        "kernels/gemm.py": "import triton\nfrom moe.kernels import eager",
        "tools/plan.py": "import rich.table\nimport moe\nfrom shared import table",
        "tools/shared.py": "",
    }
    assert breaches(house(clean)) == []


def test_planted_names_syntax_and_sizes_are_named(house):
    root = house(
        {
            "recipes/profile.py": "from datetime import UTC",
            "tools/bench/inspect.py": "import enum\nenum.StrEnum",
            "tools/plan.py": "try:\n    pass\nexcept* ValueError:\n    pass\n",
            "moe/model.py": "x = 1\n" * 501,
            "moe/ops/head.py": "def f():\n" + "    pass\n" * 301,
            "tests/ops/test_head.py": "",
        }
    )
    assert misnamed(root) == [
        "recipes/profile.py hides the module profile",
        "tools/bench/inspect.py hides the module inspect",
    ]
    assert [line.split(":")[0].split(",")[0] for line in too_new(root)] == [
        "recipes/profile.py uses datetime.UTC", "tools/bench/inspect.py uses enum.StrEnum", "tools/plan.py",
    ]  # fmt: skip
    stop, advice = oversized(root)
    assert stop == ["moe/model.py has 501 lines (hard stop 500)"]
    assert advice == ["moe/ops/head.py 302 lines (advice 300)", "moe/ops/head.py:f 302 lines (advice 60)"]
    assert untested(root) == ["moe/model.py has no tests/test_model.py"]
