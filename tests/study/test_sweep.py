"""Runs are started, skipped, taken up, tried again and stopped as they should, and a sweep that was killed ends alike."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.config import UserError
from moe.study import sweep
from moe.study.grid import load_study
from moe.train.run_folder import finished

from .conftest import TOY

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sweep, "POLL", 0.02)


def starts():
    return sorted(" ".join(line.split()[:2]) for line in open("starts.txt")) if Path("starts.txt").exists() else []


ALL = ["bias 0", "bias 1", "none 0", "none 1"]


def test_every_cell_is_run_once_and_never_again(toy, recipes, capsys):
    study = toy(study={"parallel": 2, "threads": 3})
    assert sweep.run(study, recipes) == [] and starts() == ALL
    assert {line.split()[2] for line in open("starts.txt")} == {"3"}  # threads of a run
    for cell in study.cells:
        assert finished(cell.config, cell.folder)["step"] == 4
        assert (cell.folder / "stdout.log").read_text() == "starting\n"
    assert "none seed 1: finished, validation loss 3.6010" in capsys.readouterr().out
    assert sweep.run(study, recipes) == [] and starts() == ALL


def test_a_changed_grid_runs_what_is_new(toy, recipes):
    sweep.run(toy(), recipes)
    arms = {"none": {"model.balance": "none"}, "aux": {"model.balance": "aux"}}
    sweep.run(toy(arms=arms), recipes)
    assert starts() == ["aux 0", "aux 1", *ALL]


def test_a_summary_of_another_configuration_is_no_result(toy, recipes):
    study = toy()
    sweep.run(study, recipes)
    config = study.cells[0].folder / "config.yaml"
    config.write_text(config.read_text().replace("steps: 4", "steps: 5"))
    sweep.run(study, recipes)
    assert starts() == ["bias 0", *ALL]


def test_a_failed_run_is_tried_once_more(toy, recipes, capsys):
    Path("behave.json").write_text(json.dumps({"none 0": ["fail"]}))
    study = toy()
    assert sweep.run(study, recipes) == []
    assert starts() == [*ALL[:3], "none 0", "none 1"]
    assert "failed with code 1 (error: out of luck); tried again" in capsys.readouterr().out
    assert not (study.cells[1].folder / "failed").exists()


def test_a_run_that_fails_twice_is_noted_and_the_others_go_on(toy, recipes, capsys):
    Path("behave.json").write_text(json.dumps({"none 0": ["fail", "fail"]}))
    study = toy()
    assert [cell.name for cell in sweep.run(study, recipes)] == ["none seed 0"]
    assert starts() == [*ALL[:3], "none 0", "none 1"]
    assert (study.cells[1].folder / "failed").read_text() == "code 1, attempt 2: error: out of luck\n"
    assert "left alone" in capsys.readouterr().out
    assert sweep.run(study, recipes) == []  # the next sweep tries again
    assert not (study.cells[1].folder / "failed").exists()


def test_two_sweeps_do_not_share_a_folder(toy, recipes):
    study = toy()
    study.folder.mkdir(parents=True)
    held = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl,time; f=open({str(study.folder / '.lock')!r},'a'); "
         "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)  # fmt: skip
    try:
        held.stdout.readline()
        with pytest.raises(UserError, match="in use by another sweep"):
            sweep.run(study, recipes)
    finally:
        held.kill()
        held.wait()
    assert starts() == []


def test_a_run_that_outlives_its_sweep_is_waited_for(toy, recipes):
    study = toy()
    busy = study.cells[0].folder
    busy.mkdir(parents=True)
    held = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl,time; f=open({str(busy / '.lock')!r},'a'); "
         "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1)"], stdout=subprocess.PIPE)  # fmt: skip
    held.stdout.readline()
    assert sweep.run(study, recipes) == []
    assert held.poll() is not None
    held.wait()
    assert [" ".join(line.split()[:2]) for line in open("starts.txt")][-1] == "bias 0"


def test_ctrl_c_lets_runs_save_and_says_how_to_go_on(toy, recipes, capsys):
    Path("behave.json").write_text(json.dumps({"none 0": ["hang"]}))
    study = toy(study={"parallel": 2})

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        with pytest.raises(SystemExit) as ended:
            sweep.run(study, recipes)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended.value.code == 130
    assert (study.cells[1].folder / "saved").exists()
    assert "runs are finished; the same command goes on" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal: the next sweep waits instead")
def test_a_run_does_not_outlive_a_sweep_that_is_killed(toy, recipes):
    Path("behave.json").write_text(json.dumps({"bias 0": ["hang"]}))
    study = toy()
    code = (
        "from pathlib import Path; from moe.study import sweep; from moe.study.grid import load_study;"
        "sweep.run(load_study(['config=toy.yaml']), Path('recipes'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for((study.cells[0].folder / "metrics.jsonl").exists)
    process.kill()
    process.wait()
    wait_for((study.cells[0].folder / "saved").exists)
    assert sweep.run(study, recipes) == [] and starts() == ["bias 0", *ALL]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------- the real recipe


@pytest.mark.slow
def test_kill_9_of_everything_and_a_rerun_give_the_same_table(tmp_path):
    dice = random.Random()
    words = ["".join(dice.choices("abcdefghijklmnop", k=dice.randint(2, 9))) for _ in range(200)]
    (tmp_path / "text.txt").write_text("".join(" ".join(dice.choices(words, k=8)) + ".\n" for _ in range(1500)))
    raw = {**TOY, "study": {**TOY["study"], "parallel": 2}, "log": {"wandb": "disabled"}}
    raw["study"]["metrics"] = [{"name": "val/loss", "margin": 0.01}, {"name": "val/maxvio", "scale": "ratio"}]
    raw["data"] = {"path": "text.txt", "cache": "cache", "seq_len": 32}
    raw["train"] = {**TOY["train"], "steps": 12, "eval_tokens": 512, "eval_every": 6, "save_every": 3, "export": False}
    (tmp_path / "toy.yaml").write_text(json.dumps(raw))
    command = [sys.executable, ROOT / "recipes" / "ablate.py", "config=toy.yaml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen(
            [*command, f"study.folder={folder}"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    whole = start("whole")
    assert whole.wait(300) == 0
    killed = start("killed")
    wait_for(lambda: any((tmp_path / "killed").glob("*/checkpoints/*")))
    runs = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat") if parent_of(p) == killed.pid]
    for pid in (killed.pid, *runs):
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "REPORT.md").exists()
    assert start("killed").wait(300) == 0
    tables = [(tmp_path / folder / "results.csv").read_bytes() for folder in ("whole", "killed")]
    assert tables[0] == tables[1] and tables[0].count(b"\n") == 5
    reports = [(tmp_path / folder / "REPORT.md").read_text().partition("## Cost")[0] for folder in ("whole", "killed")]
    assert reports[0] == reports[1] and "## Differences to the baseline" in reports[0]


def parent_of(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_the_toy_study_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(json.dumps(TOY))
    assert len(load_study(["config=toy.yaml"]).cells) == 4
