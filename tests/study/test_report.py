"""The report says what the run folders hold, names what is missing, and is the same for the same folders."""

import csv
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest

from moe.study import sweep
from moe.study.report import Result, write_report

ARMS = {"none": {"model.balance": "none"}, "aux": {"model.balance": "aux"}, "bias": {"model.balance": "bias"}}
METRICS = [
    {"name": "val/loss", "label": "held-out loss", "margin": 0.01, "spread": "pooled"},
    {"name": "moe/maxvio", "label": "MaxVio", "scale": "ratio", "margin": 1.1},
    {"name": "train/loss", "compare": False},
]
CLAIMS = [
    {"metric": "val/loss", "arm": "bias", "expect": "better", "by": 0.4, "text": "Said somebody."},
    {"metric": "val/loss", "arm": "aux", "expect": "no_worse"},
    {"metric": "moe/maxvio", "arm": "bias", "expect": "equivalent"},
]


@pytest.fixture
def study(toy, recipes, monkeypatch):
    monkeypatch.setattr(sweep, "POLL", 0.02)
    settings = {"seeds": 3, "baseline": "none", "metrics": METRICS, "claims": CLAIMS, "limits": ["What came later."]}
    made = toy(arms=ARMS, study=settings | {"parallel": 3})
    assert sweep.run(made, recipes) == []
    return made


def write(study):
    return write_report(study, ["config=toy.yaml", "study.report_only=true"]).read_text()


def rows_of(text, heading):
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_tables_hold_the_figures_of_the_runs(study):
    text = write(study)
    losses = {"none": [3.5, 3.601, 3.701], "aux": [3.2, 3.3, 3.4], "bias": [3.0, 3.1, 3.2]}  # see the stand-in
    results = rows_of(text, "Results")
    assert results[0] == ["arm", "seeds", "held-out loss", "MaxVio", "train/loss"]
    for row, arm in zip(results[2:], ["none", "aux", "bias"]):
        mean, sd = statistics.fmean(losses[arm]), statistics.stdev(losses[arm])
        assert row[0].startswith(f"`{arm}`") and row[1:3] == ["3", f"{mean:.4f} ± {sd:.4f}"]
        assert row[3] == "2 ± 1"
    assert "(baseline)" in results[2][0]
    found = {(row[0], row[1]): row for row in rows_of(text, "Differences to the baseline")[2:]}
    assert set(found) == {(m, f"`{a}`") for m in ("held-out loss", "MaxVio") for a in ("aux", "bias")}
    difference = statistics.fmean(b - n for b, n in zip(losses["bias"], losses["none"]))
    row = found["held-out loss", "`bias`"]
    assert row[2] == f"{difference:+.4f}" and row[4:6] == ["0.01", "pooled"] and row[-1] == "better"
    low, high = map(float, row[3].split(" to "))
    assert low < difference < high and (high - low) / 2 == pytest.approx(float(row[6]), abs=1e-4)
    assert found["MaxVio", "`aux`"][2] == "×1" and found["MaxVio", "`aux`"][-1] == "equivalent within the margin"


def test_claims_get_their_verdicts_in_words(study):
    verdicts = write(study).partition("## Verdicts")[2].partition("##")[0].strip().splitlines()
    assert len(verdicts) == 3
    assert verdicts[0].startswith(
        "- **supports**: `bias` is better than `none` in held-out loss by at least 0.4 (margin 0.01)"
    )
    assert verdicts[0].endswith("Said somebody.") and "smallest effect this could have seen is" in verdicts[0]
    assert verdicts[1].startswith("- **supports**: `aux` is no worse than `none`")
    assert verdicts[2].startswith("- **supports**: `bias` is equivalent to `none` in MaxVio (margin ×1.1)")


def test_the_report_carries_what_is_needed_to_repeat_and_to_doubt_it(study):
    text = write(study)
    for part in (
        "Which way is up?", "`python recipes/ablate.py config=toy.yaml`", "abc", "`model.balance=\"aux\"`", "What came later.",
        "## What this cannot tell", "## Cost", "the noise is measured with 3 seeds alone", study.cells[0].folder.name, "data: {\"seq_len\": 32}",
    ):  # fmt: skip
        assert part in text, part
    assert "report_only" not in text


def test_the_page_and_the_markdown_say_the_same_and_need_nothing_else(study):
    text = write(study)
    page = (study.folder / "report.html").read_text()
    for row in rows_of(text, "Results")[2:]:
        assert all(cell.replace("`", "") in page.replace("<code>", "").replace("</code>", "") for cell in row)
    assert page.count("<svg") == 3  # training loss, MaxVio, held-out loss
    assert "<script" not in page and "src=" not in page and "@import" not in page
    assert all(link.startswith(("#", "data:")) for link in [part.split('"')[0] for part in page.split('href="')[1:]])


def test_the_same_folders_give_the_same_bytes_in_any_order_of_time(study):
    write(study)
    names = ["REPORT.md", "report.html", "results.csv", "val-loss.svg"]
    before = [(study.folder / name).read_bytes() for name in names]
    for name in names:
        (study.folder / name).unlink()
    for cell in study.cells[::-1]:
        (cell.folder / "summary.json").touch()
    write(study)
    assert [(study.folder / name).read_bytes() for name in names] == before
    with open(study.folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {r["arm"] for r in rows} == set(ARMS) and float(rows[0]["val/loss"]) == 3.5


def test_what_is_missing_is_named_and_the_rest_compared(study):
    text = write(study)
    assert "not in this report" not in text
    gone, failed = (next(c for c in study.cells if c.name == name) for name in ("bias seed 2", "aux seed 0"))
    shutil.rmtree(gone.folder)
    (failed.folder / "summary.json").unlink()
    (failed.folder / "failed").write_text("code 1, attempt 2: error: x\n")
    text = write(study)
    assert "**2 of 9 runs are not in this report:**" in text
    assert (
        "- bias seed 2: not finished, at step 0 of 4" in text
        and "- aux seed 0: failed, code 1, attempt 2: error: x" in text
    )
    assert [row[1] for row in rows_of(text, "Results")[2:]] == ["3", "2", "2"]


def test_nothing_finished_is_a_report_too(toy):
    study = toy(study={"claims": [{"metric": "val/loss", "arm": "none"}]})
    text = write(study)
    assert "**4 of 4 runs are not in this report:**" in text and "**inconclusive**" in text
    assert (study.folder / "report.html").exists()


def test_where_a_figure_comes_from():
    records = [{"step": s, "moe/x": float(s), "val/x": float(s), "gap": None} for s in range(1, 41)]
    result = Result(None, {"val/loss": 2.5}, [*records, {"step": 41}])
    assert result.value("val/loss") == 2.5
    assert result.value("moe/x") == statistics.fmean([37, 38, 39, 40]) and result.value("val/x") == 40
    assert result.value("gap") is None and result.value("nowhere") is None


def test_one_seed_has_no_interval(toy, recipes, monkeypatch):
    monkeypatch.setattr(sweep, "POLL", 0.02)
    study = toy(study={"seeds": 1})
    sweep.run(study, recipes)
    row = rows_of(write(study), "Differences to the baseline")[2]
    assert row[2] == "+0.5000" and "no interval" in row[3] and row[-1] == "inconclusive"
    assert not math.isnan(float(json.loads((study.cells[0].folder / "summary.json").read_text())["val/loss"]))
    assert Path(study.folder / "report.html").exists()
