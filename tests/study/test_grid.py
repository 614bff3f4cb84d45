"""A YAML becomes the runs it says, equal but for what varies; everything impossible is told before the first of them."""

import pytest

from moe.config import UserError, differences, fingerprint, to_dict
from moe.study.grid import Metric, load_study


def names(study):
    return [cell.name for cell in study.cells]


def test_arms_times_seeds_with_the_baseline_first(toy):
    study = toy(study={"seeds": [3, 1], "baseline": "none"})
    assert study.baseline == "none"
    assert names(study) == ["none seed 3", "bias seed 3", "none seed 1", "bias seed 1"]
    assert [cell.config.model.balance for cell in study.cells] == ["none", "bias"] * 2
    assert [cell.config.train.seed for cell in study.cells] == [3, 3, 1, 1]


def test_arms_differ_in_what_they_say_and_in_nothing_else(toy):
    a, b, again, _ = (to_dict(cell.config) for cell in toy().cells)
    assert differences(a, b) == ["model.balance: bias -> none"]
    assert differences(a, again) == ["train.seed: 0 -> 1"]


def test_vary_is_the_full_grid(toy):
    study = toy(arms=None, vary={"model.balance": ["aux", "none"], "optim.lr": [1e-3, 1e-2, 1e-1]}, study={"seeds": 1})
    found = [(cell.config.model.balance, cell.config.optim.lr) for cell in study.cells]
    assert found == [(b, lr) for b in ("aux", "none") for lr in (1e-3, 1e-2, 1e-1)]
    assert list(study.arms)[1] == "balance=aux lr=0.01"


def test_the_command_line_reaches_the_study_and_all_runs(toy):
    study = toy("study.seeds=[5]", "train.steps=7", "--dry-run", "study.parallel=3")
    assert {(cell.seed, cell.config.train.steps) for cell in study.cells} == {(5, 7)}
    assert study.settings.dry_run and study.settings.parallel == 3


def test_threads_are_the_studys_unless_the_runs_say_otherwise(toy):
    assert {cell.config.train.threads for cell in toy(study={"threads": 2}).cells} == {2}
    assert {cell.config.train.threads for cell in toy("train.threads=3").cells} == {3}


def test_folders_carry_the_hash_and_are_found_again_under_another_name(toy):
    study = toy()
    for cell in study.cells:
        assert cell.folder.name.endswith(fingerprint(cell.config)) and cell.folder.parent == study.folder
    assert len({cell.folder for cell in study.cells}) == 4
    study.cells[1].folder.mkdir(parents=True)
    renamed = toy(arms={"off/on": {"model.balance": "none"}, "aux": {"model.balance": "aux"}})
    assert renamed.cells[0].folder == study.cells[1].folder  # the finished runs of a changed grid are not lost
    assert "/" not in renamed.cells[2].folder.name and renamed.cells[1].folder not in [c.folder for c in study.cells]


def test_all_bad_cells_are_told_at_once(toy, tmp_path):
    arms = {
        "fine": {"model.balance": "none"},
        "group": {"model.n_group": 3},
        "typo": {"model.balanse": "bias"},
        "entry": {"model.balance": "biass"},
        "schedule": {"optim.schedule": "linear"},
        "twin": {"model.balance": "none"},
    }
    with pytest.raises(UserError) as caught:
        toy(arms=arms)
    told = str(caught.value)
    assert "10 of 12 runs cannot be made, none was started" in told
    for part in (
        "[group seed 0, group seed 1] model.n_group=3", "[typo seed 0, typo seed 1] model.balanse is not a knob",
        "model.balance='biass'", "optim.schedule='linear'", "[twin seed 0] the same run as fine seed 0",
    ):  # fmt: skip
        assert part in told, told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"study": {"baseline": "bas"}}, "study.baseline='bas' is not one of the arms ['bias', 'none']"),
        ({"study": {"seeds": [1, 1]}}, "names a seed twice"),
        ({"study": {"seeds": 0}}, "study.seeds=0"),
        ({"study": {"seeds": "three"}}, "study.seeds=three"),
        ({"study": {"recipe": "pretrian"}}, "study.recipe='pretrian'"),
        ({"study": {"parallel": 0}}, "study.parallel=0 must be >= 1"),
        ({"study": {"qestion": "?"}}, "did you mean 'study.question'"),
        ({"study": {"metrics": [{"nam": "val/loss"}]}}, "study.metrics: nam is not a key; did you mean 'name'"),
        ({"study": {"metrics": "val/loss"}}, "study.metrics must be a list"),
        ({"study": {"metrics": [{"better": "up"}]}}, "study.metrics.better='up'"),
        ({"study": {"metrics": [{"scale": "ratio", "margin": 0.1}]}}, "write 1.1 for ten per cent"),
        ({"study": {"metrics": [{"name": "val/loss"}, {"name": "val/loss"}]}}, "study.metrics: val/loss stands twice; leave one out"),
        ({"study": {"claims": [{"arm": "nine"}]}}, "study.claims: arm='nine' is not one of ['none']"),
        ({"study": {"claims": [{"arm": "none", "metric": "val/bpb"}]}}, "study.claims: metric='val/bpb'"),
        ({"study": {"claims": [{"arm": "none", "expect": "worse"}]}}, "study.claims.expect='worse'"),
        ({"vary": {"train.steps": [1]}}, "either arms: {name"),
        ({"arms": None}, "either arms: {name"),
        ({"arms": {}}, "arms: must hold"),
        ({"arms": {"a": [1]}}, "arms: must hold"),
        ({"arms": None, "vary": {"train.steps": 5}}, "vary: must hold a list"),
        ({"modle": {"balance": "none"}}, "modle is not a section"),
    ],
)
def test_mistakes_in_the_study_are_named(toy, changes, words):
    with pytest.raises(UserError) as caught:
        toy(**changes)
    assert words in str(caught.value)


def test_a_study_needs_one_file(toy):
    with pytest.raises(UserError, match="name one study"):
        toy("config=again.yaml")
    with pytest.raises(UserError, match="not key=value"):
        toy("fast")


def test_ratios_are_taken_on_the_scale_of_logarithms():
    metric = Metric(scale="ratio", margin=1.2)
    assert metric.working(6.0) - metric.working(2.0) == pytest.approx(metric.distance(3.0))
    assert Metric().working(6.0) == 6.0 and Metric().distance(None) == 0
    with pytest.raises(UserError, match="has no ratio"):
        metric.working(0.0)


def test_what_a_recipe_would_refuse_is_told_beforehand(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "study: {recipe: grpo, seeds: 1}\nmodel: {preset: tiny-rl}\nvary: {grpo.loss: [dapo, dappo], task.name: [sort, sorrt]}\n"
    )
    with pytest.raises(UserError) as caught:
        load_study([f"config={tmp_path / 'study.yaml'}"])
    told = str(caught.value)
    assert "3 of 4 runs cannot be made" in told and "'dappo' is not one of" in told and "'sorrt' is not one of" in told


@pytest.mark.parametrize("key", ["train.seed", "run.dir"])
def test_an_arm_cannot_set_what_the_study_sets(toy, key):
    with pytest.raises(UserError, match=f"arms: none sets {key}"):
        toy(arms={"bias": {"model.balance": "bias"}, "none": {key: "1"}})
