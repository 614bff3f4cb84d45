"""The ablation recipe as a user starts it, and the studies that come along."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from moe.study.grid import load_study

ROOT = Path(__file__).parents[2]
ABLATE = ROOT / "recipes" / "ablate.py"
STUDIES = [f for f in sorted((ROOT / "recipes" / "ablations").glob("*.yaml")) if "\nstudy:" in f.read_text("utf-8")]
BALANCE = f"config={ROOT / 'recipes' / 'ablations' / 'balance.yaml'}"


@pytest.fixture
def ablate(monkeypatch, tmp_path, capsys):
    """ablate(arguments) -> what it prints, run in this process from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(ABLATE), *arguments])
        runpy.run_path(str(ABLATE), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_can_be_made(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = load_study([f"config={file}"])
    assert len({cell.folder for cell in study.cells}) == len(study.cells) >= 2
    assert study.settings.question and study.settings.limits and all(m.label for m in study.metrics)


def test_the_study_of_balance_is_the_one_that_was_promised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = load_study([BALANCE])
    assert {cell.config.model.balance for cell in study.cells} == {"none", "aux", "bias"} and len(study.cells) == 9
    for cell in study.cells:
        model, train = cell.config.model, cell.config.train
        assert (model.scoring_func, model.n_routed_experts, model.seq_aux_alpha) == ("sigmoid", 64, 0)
        assert train.steps >= 1000
        assert (
            train.micro_batch_size * cell.config.data.seq_len == train.batch_tokens
        )  # one pass: aux and bias see the same


def test_dry_run_lists_the_runs_and_leaves_nothing(ablate, tmp_path):
    out = ablate(BALANCE, "--dry-run")
    assert all(f"{arm} seed {seed} " in out for arm in ("aux", "none", "bias") for seed in range(3))
    assert "9 runs, 2 at a time" in out and list(tmp_path.iterdir()) == []


def test_help_names_every_knob_of_a_study(ablate):
    out = ablate("--help")
    assert all(f"study.{name}=" in out for name in ("name", "seeds", "parallel", "metrics", "claims", "report_only"))


def test_a_report_needs_no_run(ablate, tmp_path):
    out = ablate(BALANCE, "study.report_only=true", "study.folder=there")
    assert "9 of 9 runs are not in this report" in out and "REPORT.md" in out
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"REPORT.md", "report.html", "results.csv"}


def test_an_impossible_grid_costs_one_line_that_names_every_bad_cell(tmp_path):
    arms = {"a": {"model.n_group": 7}, "b": {"model.balanse": "none"}, "c": {}}
    (tmp_path / "bad.yaml").write_text(json.dumps({"study": {"seeds": 2}, "arms": arms}))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ABLATE, "config=bad.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    for part in ("4 of 6 runs", "[a seed 0, a seed 1] model.n_group=7", "[b seed 0, b seed 1] model.balanse"):
        assert part in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]
