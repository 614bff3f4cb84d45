"""The tuner without a GPU: its candidates, and what it writes when a made-up clock stands for the card."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe.kernels import configs
from moe.kernels.ahead import LIMITS
from moe.kernels.configs import Config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "tune_kernels.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("tune_tool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_candidates_could_fit_the_card_and_hold_the_shipped_rows(tool, arch):
    table = configs.table()
    for kernel in configs.KERNELS:
        for dtype in ("half", "fp32"):
            found = tool.candidates(kernel, arch, dtype)
            assert len(set(found)) == len(found) > 10
            assert all(c.ctas * c.num_warps <= LIMITS[arch].warps for c in found)
            missing = [row.config for row in table.rows[kernel, arch, dtype] if row.config not in found]
            assert not missing, (kernel, dtype, missing)


def test_the_fastest_wins_and_within_noise_the_smaller(tool):
    big, small, slow = Config(128, 128, 64, 8, 3, 2), Config(64, 128, 64, 4, 3, 2), Config(64, 64, 64, 4, 3, 4)
    times = {big: 1.0, small: 1.01, slow: 1.3}

    def clock(problem, config):
        return times[config] * problem.width

    assert tool.best("gmm", "half", 256, [big, small, slow], clock) == small
    times[small] = 1.05
    assert tool.best("gmm", "half", 256, [slow, small, big], clock) == big


def test_no_shape_outvotes_the_others(tool):
    a, b = Config(64, 64, 64, 4, 3, 1), Config(128, 64, 64, 4, 3, 1)

    def clock(problem, config):  # b wins two shapes by 10 %, a wins the largest by 5 %
        large = problem.width == max(width for width, _ in tool.SHAPES.values())
        return problem.width * problem.load * ((1.05 if large else 1.0) if config == b else (1.0 if large else 1.1))

    assert tool.best("dw", "half", 64, [a, b], clock) == b


def test_neighbours_with_one_tile_share_a_row_and_bounds_lie_between_the_loads(tool):
    a, b = Config(16, 64, 64, 4, 3, 3), Config(64, 64, 64, 4, 3, 3)
    found = tool.rows("gmm", 90, "half", [16, 64, 256, 1024], [a, a, b, b])
    assert [(row.rows, row.config) for row in found] == [(128, a), (None, b)]
    found = tool.rows("gmm", 90, "half", [16, 64, 256], [a, b, a])
    assert [row.rows for row in found] == [32, 128, None]


def test_a_new_table_replaces_the_rows_of_its_card_alone(tool, tmp_path):
    path = tmp_path / "configs.json"
    shutil.copy(configs.FILE, path)
    before = configs.load(path)
    new = tool.rows("dw", 90, "half", [16, 1024], [Config(64, 64, 64, 4, 2, 4), Config(64, 64, 32, 4, 2, 4)])
    for card in ("one", "another"):
        tool.write(path, tool.updated(configs.load(path), new), f"sm_90: timed on {card}")
    after = configs.load(path)
    assert after.hash != before.hash and after.rows["dw", 90, "half"] == new
    assert {k: v for k, v in after.rows.items() if k != ("dw", 90, "half")} == {
        k: v for k, v in before.rows.items() if k != ("dw", 90, "half")
    }
    about = json.loads(path.read_text())["about"]
    assert about[-1] == "sm_90: timed on another" and sum("timed on" in line and "sm_90" in line for line in about) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_that_would_not_load_is_not_written(tool, tmp_path):
    path = tmp_path / "configs.json"
    shutil.copy(configs.FILE, path)
    broken = tool.rows("dw", 90, "half", [16], [Config(64, 48, 64, 4, 2, 4)])
    with pytest.raises(ValueError, match="powers of two"):
        tool.write(path, tool.updated(configs.load(path), broken), "sm_90: timed on nothing")
    assert path.read_text() == configs.FILE.read_text()


def test_without_a_gpu_it_ends_in_one_line(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool.torch.cuda, "is_available", lambda: False)
    assert tool.main([]) == 2
    assert capsys.readouterr().err == "tune_kernels: no GPU here to time on; --dry-run lists the candidates\n"


@pytest.mark.slow
def test_a_dry_run_lists_what_compiles_clean(tool):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--dry-run", "--json", "--arch", "86", "--kernel", "dw", "--dtype", "fp32"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {Config(*c) for c in json.loads(done.stdout)["dw.fp32"]}
    assert {row.config[:5] for row in configs.table().rows["dw", 86, "fp32"]} <= {c[:5] for c in found}
    assert found <= set(tool.candidates("dw", 86, "fp32"))
