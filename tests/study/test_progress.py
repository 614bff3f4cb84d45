"""The plan before a sweep and the line during it."""

import json
import math

import pytest

from moe.study import progress, sweep
from moe.study.progress import Screen, dry_run, duration, last_record


def test_dry_run_shows_every_run_and_leaves_nothing(toy, tmp_path, capsys):
    study = toy(study={"parallel": 2})
    before = sorted(tmp_path.rglob("*"))
    dry_run(study)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:5]] == [cell.name for cell in study.cells]
    assert "parameters" in lines[0] and all(" K " in line for line in lines[1:5])
    assert "4 runs, 2 at a time" in lines[6] and sorted(tmp_path.rglob("*")) == before


def test_dry_run_counts_finished_runs_as_they_were_measured(toy, recipes, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "POLL", 0.02)
    study = toy()
    sweep.run(study, recipes)
    summary = study.cells[3].folder / "summary.json"
    summary.unlink()
    capsys.readouterr()
    dry_run(study)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["finished"] * 3 + ["begun"]
    assert "2 s" in lines[4] and "about 2 s to go of 8 s" in lines[6]  # the stand-in's half second a step


def test_the_line_names_running_cells_and_repeats_itself_seldom(toy, capsys):
    study = toy()
    screen = Screen(study, 1)
    for cell in study.cells[:2]:
        cell.folder.mkdir(parents=True)
        (cell.folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "train/loss": 4.25}) + "\n")
    screen.show(study.cells[:2])
    screen.show(study.cells[:2])
    first, line = capsys.readouterr().out.splitlines()
    assert first == f"4 runs, 1 of them finished before; folder {study.folder}"
    assert line.startswith("1/4 finished  about ") and "none seed 0 3/4 loss 4.250" in line


def test_last_record_is_the_last_whole_line(tmp_path):
    assert last_record(tmp_path) == {}
    file = tmp_path / "metrics.jsonl"
    for text, step in (("", None), ('{"step": 1}', None), ('{"step": 1}\n{"st', 1), ('{"step": 1}\n{"step": 2}\n', 2)):
        file.write_text(text)
        assert last_record(tmp_path).get("step") == step
    file.write_text("".join(json.dumps({"step": s, "pad": "x" * 500}) + "\n" for s in range(200)))
    assert last_record(tmp_path)["step"] == 199


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (600, "10 min"), (7200, "2.0 h"), (math.nan, "?")])
def test_durations(seconds, text):
    assert duration(seconds) == text and progress.QUIET > progress.DRAW
