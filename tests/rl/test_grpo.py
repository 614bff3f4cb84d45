"""The GRPO recipe as a user runs it, on a model of a few weights: agreement with the sampler, exact resume, two ranks."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe.rl import grpo as loop
from moe.rl import rewards
from tests.settings import TASK

ROOT = Path(__file__).parents[2]
RL = [
    *TASK, "grpo.prompts=6", "grpo.group_size=4", "grpo.max_new_tokens=6", "grpo.reward=prefix", "train.steps=6",
    "train.micro_batch_size=7", "train.save_every=3", "train.eval_every=0", "grpo.cold_start=0",
]  # fmt: skip


def started(recipe, *arguments):
    """Run a recipe in this process -> its exit code."""
    torch.use_deterministic_algorithms(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{recipe}.py", *arguments])
        try:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """init=FOLDER of a model that sorts two to four digits sometimes."""
    folder = tmp_path_factory.mktemp("start") / "sft"
    steps = ["train.steps=120", "train.batch_tokens=256", "train.micro_batch_size=4", "sft.gate=0", "optim.lr=5e-3"]
    assert started("sft", *TASK, *steps, f"run.dir={folder}") == 0
    return f"init={folder}"


@pytest.fixture
def run(tmp_path, init):
    """run("name", arguments...) runs the GRPO recipe -> its folder; `.code` is the exit code."""

    def start(name, *arguments, init=init):
        start.code = started("grpo", *RL, *[init] * bool(init), *arguments, f"run.dir={tmp_path / name}")
        return tmp_path / name

    return start


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines]


def weights(folder):
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    shards = {shard: load_file(newest / f"{shard}.safetensors") for shard in ("model", "optim")}
    return {f"{shard}/{k}": v.clone() for shard, tensors in shards.items() for k, v in tensors.items()}


def test_the_trainer_agrees_with_the_sampler_with_and_without_replay(run):
    """Every step: no choice differs under replay, at most one in 10,000 without; log-probabilities within 1e-4."""
    for replay in ("true", "false"):
        folder = run(f"replay-{replay}", f"grpo.replay={replay}")
        assert run.code == 0
        found = [r for r in records(folder) if r["rl/updates"]]
        assert len(found) >= 3
        for r in found:
            assert r["rl/flip_rate"] <= (0 if replay == "true" else 1e-4)
            assert 0 < r["rl/logp_gap_max"] < 1e-4 and r["rl/logp_gap"] <= r["rl/logp_gap_max"]
            assert abs(r["rl/mismatch_kl"]) < 1e-6


def test_weights_move_and_router_biases_do_not(run):
    folder = run("moved")
    first, last = (load_file(folder / f"checkpoints/step-0000000{step}/model.safetensors") for step in (3, 6))
    assert all(torch.equal(first[k], last[k]) and last[k].any() for k in last if k.endswith("router.bias"))
    still = [k for k in first if not k.endswith("bias") and torch.equal(first[k], last[k])]
    assert not still, still


def test_groups_without_signal_may_be_dropped_without_changing_the_step(run, agree):
    kept, dropped = (
        weights(run(f"drop-{drop}", f"grpo.drop_zero_signal={drop}", "train.steps=3", "grpo.reward=exact"))
        for drop in ("false", "true")
    )
    for name in kept:
        if name.startswith("model/"):
            agree(dropped[name], kept[name], 1e-4, name, scale=1e-2)


class Interrupted(BaseException):
    pass


def test_a_killed_run_resumes_bit_for_bit(run, monkeypatch):
    whole = run("whole", "grpo.beta=0.01", "grpo.correction=token_tis")
    step = loop.Grpo.train_step

    def dying(self):
        if self.step == 5:
            raise Interrupted
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Grpo, "train_step", dying)
        with pytest.raises(Interrupted):
            run("killed", "grpo.beta=0.01", "grpo.correction=token_tis")
    killed = run("killed", "grpo.beta=0.01", "grpo.correction=token_tis")
    assert records(killed) == records(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(killed)[name]), name
    assert records(whole)[-1]["rl/kl"] > 0  # the reference is the policy that the run began with
    a, b = (load_file(f / "checkpoints/step-00000006/reference.safetensors") for f in (whole, killed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, killed)]
    assert summaries[0]["before"] == summaries[1]["before"]


@pytest.mark.parametrize("failure, reason", [("raise", "raised"), ("nan", "nan")])
def test_a_reward_that_fails_counts_as_a_logged_zero(run, monkeypatch, capsys, failure, reason):
    def broken(prompt, answer, completion, truncated):
        if len(completion) % 2:
            if failure == "raise":
                raise RuntimeError("no judge")
            return float("nan")
        return float(len(completion))

    monkeypatch.setitem(rewards.REWARDS, "broken", broken)
    found = records(run("broken", "grpo.reward=broken", "train.steps=2"))
    assert run.code == 0 and all(r["rl/reward_failures"] > 0 for r in found)
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ("grpo.reward=exakt", "grpo.reward='exakt' is not one of"),
        ("grpo.loss=dapoo", "grpo.loss='dapoo' is not one of"),
        ("task.name=sorting", "task.name='sorting' is not one of"),
        ("grpo.max_new_tokens=999", "grpo.max_new_tokens=999 after prompts of"),
        ("task.min_length=9", "exceeds task.max_length"),
        ("model.vocab_size=20", "set model.vocab_size=24"),
        ("data.path=x", "data is not a section"),
        ("init=nowhere", "nowhere does not exist"),
    ],
)
def test_a_mistake_costs_one_line_and_leaves_no_folder(run, capsys, change, message):
    folder = run("wrong", change, init=None)
    text = capsys.readouterr().err
    assert run.code == 2 and message in text and "Traceback" not in text
    assert not (folder / "config.yaml").exists()


def test_a_dry_run_prints_and_writes_nothing(run, tmp_path, capsys):
    folder = run("dry", "--dry-run")
    assert run.code == 0 and not folder.exists() and "6 steps of 6 prompts x 4 answers" in capsys.readouterr().out


def test_another_configuration_is_refused_before_the_cold_start(run, capsys):
    folder = run("taken", "train.steps=1")
    run("taken", "train.steps=1", "grpo.cold_start=0.9", init=None)
    assert run.code == 2 and "was started with another configuration" in capsys.readouterr().err
    assert not (folder / "cold_start").exists()


def test_the_chain_cold_start_grpo_and_summary(run):
    """With a gate: fine-tuning in a folder of its own inside the run's, then GRPO from it; a rerun does nothing."""
    folder = run("chain", "grpo.cold_start=0.01", "train.steps=2", init=None)
    summary = json.loads((folder / "summary.json").read_text())
    assert run.code == 0 and {"val/greedy", "val/pass@1", "val/pass@8", "before"} <= summary.keys()
    assert json.loads((folder / "cold_start" / "summary.json").read_text())["gate_reached"]
    assert (folder / "accuracy.svg").stat().st_size > 1000 and (folder / "tokenizer.json").exists()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    run("chain", "grpo.cold_start=0.01", "train.steps=2", init=None)
    assert run.code == 0 and before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_start_below_the_gate_is_fine_tuned_first(run, init, tmp_path):
    """`init` of a pretrained run that cannot do the task yet; one that can is taken as it is."""
    taken = run("taken", "grpo.cold_start=0.001", "train.steps=1")
    assert run.code == 0 and not (taken / "cold_start").exists()
    tuned = run("tuned", "grpo.cold_start=0.7", "train.steps=1", init=init)
    assert run.code == 0 and json.loads((tuned / "cold_start" / "summary.json").read_text())["step"] >= 1
    saved = yaml.safe_load((tuned / "cold_start" / "config.yaml").read_text())
    assert f"init={saved['run']['init']}" == init  # from that model, not from scratch
    start, end = (load_file(f / "checkpoints/step-00000001/model.safetensors") for f in (taken, tuned))
    assert not torch.equal(start["head.weight"], end["head.weight"])


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_are_one(run, init, tmp_path, stage):
    """Same answers and rewards; weights up to the order of sums. Rows per rank differ: 6 prompts, dropped groups."""
    one = run("one", "train.steps=3")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        str(ROOT / "recipes/grpo.py"),
        *RL,
        init,
        "train.steps=3",
        f"train.zero_stage={stage}",
        f"run.dir={tmp_path / 'two'}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for a, b in zip(records(one), records(tmp_path / "two"), strict=True):
        for key in ("rl/reward", "rl/length", "rl/zero_signal", "train/grad_norm", "rl/entropy"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    mine, theirs = weights(one), weights(tmp_path / "two")
    for name, value in mine.items():
        if name.startswith("model/"):
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5, msg=name)
