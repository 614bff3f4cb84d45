"""The loop keeps its promises: exact resume after anything, sound steps only, one set of numbers for every layout.

Runs go through recipes/pretrain.py itself, in this process where that is enough, on a text of a few kilobytes.
"""

import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.objectives import Pretraining
from moe.train import checkpoint
from moe.train.engine import Engine
from tests.settings import PRETRAIN

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "pretrain.py"
SMALL = [
    *PRETRAIN, "train.micro_batch_size=8", "train.eval_tokens=256", "train.steps=8", "train.save_every=3",
    "train.eval_every=0", "train.export=false", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(300)]
    lines = (" ".join(rng.choices(words, k=rng.randint(3, 12))) + ".\n" for _ in range(3000))
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def arguments(text, tmp_path):
    def build(name, *changes):
        return [*SMALL, f"data.path={text / 'text.txt'}", f"data.cache={text / 'cache'}", f"run.dir={tmp_path / name}", *changes]

    return build


@pytest.fixture
def pretrain(arguments, tmp_path, monkeypatch):
    """pretrain("name", changes...) runs the recipe in this process -> its folder; `.code` is the last exit code."""
    torch.use_deterministic_algorithms(False)

    def run(name, *changes):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments(name, *changes)])
        run.code = 0
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as stop:
            run.code = stop.code
        return tmp_path / name

    return run


def records(folder):
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines]


def weights(folder):
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    shards = {shard: load_file(newest / f"{shard}.safetensors") for shard in ("model", "optim")}
    return {f"{shard}/{k}": v.clone() for shard, tensors in shards.items() for k, v in tensors.items()}  # not a mapped file


def same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different


@pytest.fixture
def whole(pretrain):
    """The uninterrupted run that others must equal."""
    return pretrain("whole")


# ---------------------------------------------------------------------------------------------------------- plain runs


def test_a_run_learns_and_moves_every_bias(whole):
    found = records(whole)
    assert [r["step"] for r in found] == list(range(1, 9))
    assert found[-1]["train/loss"] < found[0]["train/loss"] - 0.2
    biases = [v for k, v in weights(whole).items() if k.endswith("router.bias")]
    assert len(biases) == 2 and all((b != 0).any() for b in biases)  # one layer and the MTP block
    assert found[-1]["val/bpb"] > 0 and (whole / "summary.json").exists()


def test_every_line_is_reproduced_by_the_same_command(pretrain, whole):
    again = pretrain("again")
    assert records(again) == records(whole)
    same(weights(again), weights(whole))


def test_another_seed_gives_another_run(pretrain, whole):
    assert records(pretrain("other", "train.seed=1"))[0]["train/loss"] != records(whole)[0]["train/loss"]


def test_evaluating_changes_nothing_but_the_log(pretrain, whole):
    often = pretrain("often", "train.eval_every=1", "train.eval_tokens=512")
    same(weights(often), weights(whole))
    assert all("val/loss" in r for r in records(often))


@pytest.mark.parametrize("change", ["train.micro_batch_size=3", "train.activation_checkpointing=true"])
def test_the_layout_of_a_step_does_not_change_it(pretrain, whole, change):
    """Unequal micro-batches (3 + 3 + 2 rows) and recomputation: same losses, same counts, same biases."""
    other = pretrain("other", change)
    for a, b in zip(records(other), records(whole), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=2e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=2e-3)
        assert a["train/balance_loss"] == pytest.approx(b["train/balance_loss"], rel=1e-3)
    first, second = records(other)[0], records(whole)[0]
    assert [first[k] for k in first if "maxvio" in k] == [second[k] for k in first if "maxvio" in k]


def test_bf16_keeps_masters_and_follows_fp32(pretrain, whole):
    half = pretrain("half", "train.precision=bf16")
    for a, b in zip(records(half), records(whole), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=0.01)
    saved = weights(half)
    assert saved["model/head.weight"].dtype == torch.bfloat16
    assert saved["optim/model.head.weight/master"].dtype == torch.float32
    assert saved["model/layers.1.ffn.router.bias"].dtype == torch.float32
    assert torch.equal(saved["optim/model.head.weight/master"].bfloat16(), saved["model/head.weight"])


def test_mtp_on_some_rows_counts_their_targets_only(pretrain):
    some = records(pretrain("some", "model.mtp_rows=0.5", "train.steps=2"))
    assert all(r["train/mtp_loss"] == pytest.approx(r["train/loss"], rel=0.1) for r in some)


def test_the_dense_twin_trains_through_the_same_door(pretrain):
    twin = records(pretrain("twin", "model.dense_twin=true"))
    assert len(twin) == 8 and "moe/maxvio" not in twin[-1] and "train/mtp_loss" in twin[-1]


# ------------------------------------------------------------------------------------------------- interruption and resume


class Crash(BaseException):
    pass


def test_a_crash_between_checkpoints_is_repeated_bit_for_bit(pretrain, whole, monkeypatch):
    step = Engine.step

    def crashing(self, lr, norm):
        crashing.calls += 1
        if crashing.calls == 5:
            raise Crash
        return step(self, lr, norm)

    crashing.calls = 0
    with monkeypatch.context() as m:
        m.setattr(Engine, "step", crashing)
        with pytest.raises(Crash):
            pretrain("crashed")
    folder = pretrain("crashed")
    assert pretrain.code == 0
    assert records(folder) == records(whole)
    same(weights(folder), weights(whole))


def test_a_bf16_run_resumes_exactly_too(pretrain, monkeypatch):
    straight = pretrain("straight", "train.precision=bf16")
    monkeypatch.setattr(Engine, "reduce", _raise_after(Engine.reduce, 7))
    with pytest.raises(Crash):
        pretrain("broken", "train.precision=bf16")
    monkeypatch.undo()
    broken = pretrain("broken", "train.precision=bf16")
    assert records(broken) == records(straight)
    same(weights(broken), weights(straight))


def _raise_after(method, calls):
    def wrapped(self, *args):
        wrapped.calls += 1
        if wrapped.calls == calls:
            raise Crash
        return method(self, *args)

    wrapped.calls = 0
    return wrapped


def test_kill_minus_nine_at_any_moment_is_survived(arguments, pretrain, whole, tmp_path):
    """A process killed at two random moments; the third start ends where the uninterrupted run ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder, command = tmp_path / "killed", [sys.executable, str(RECIPE), *arguments("killed")]
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(random.random() * 0.3)
        process.kill()
        process.wait()
        process.stdout.close()
    resumed = pretrain("killed")
    assert pretrain.code == 0 and resumed == folder
    assert records(folder) == records(whole)
    same(weights(folder), weights(whole))


def test_ctrl_c_saves_and_says_how_to_go_on(pretrain, whole, monkeypatch, capsys):
    reduce = Engine.reduce

    def interrupting(self):
        interrupting.calls += 1
        if interrupting.calls == 4:
            signal.raise_signal(signal.SIGINT)
        return reduce(self)

    interrupting.calls = 0
    with monkeypatch.context() as m:
        m.setattr(Engine, "reduce", interrupting)
        folder = pretrain("stopped")
    assert pretrain.code == 130
    assert "resumes" in capsys.readouterr().err
    assert 4 <= records(folder)[-1]["step"] <= 5
    assert sorted((folder / "checkpoints").glob("step-*"))[-1].name == f"step-{records(folder)[-1]['step']:08d}"
    pretrain("stopped")
    assert records(folder) == records(whole)
    same(weights(folder), weights(whole))


def test_a_finished_run_says_so_and_stays_as_it_is(pretrain, whole, capsys):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in whole.rglob("*")}
    pretrain("whole")
    assert pretrain.code == 0 and "is finished" in capsys.readouterr().out
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in whole.rglob("*")} == before


def test_a_damaged_checkpoint_costs_a_warning_and_a_few_steps(pretrain, whole, capsys):
    (whole / "summary.json").unlink()
    newest = sorted((whole / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    expected, lines = weights(whole), records(whole)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    pretrain("whole")
    assert "damaged" in capsys.readouterr().err
    assert records(whole) == lines
    same(weights(whole), expected)


def test_a_changed_configuration_is_refused_in_one_line(pretrain, whole, capsys):
    pretrain("whole", "optim.lr=0.002")
    assert pretrain.code == 2
    error = capsys.readouterr().err
    assert "optim.lr" in error and "run.dir" in error and len(error.strip().splitlines()) == 1


def test_a_full_disk_keeps_the_checkpoint_before(pretrain, monkeypatch, capsys):
    write = checkpoint._write

    def full(folder, step, *rest):
        if step > 3:
            raise OSError(28, "No space left on device")
        return write(folder, step, *rest)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "_write", full)
        folder = pretrain("full")
    assert pretrain.code == 2 and "No space left" in capsys.readouterr().err
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    pretrain("full")
    assert pretrain.code == 0 and records(folder)[-1]["step"] == 8


# ------------------------------------------------------------------------------------------------------- unsound steps


def _poison(steps, calls_before=0):
    forward = Pretraining.forward

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.training and kwargs.get("divisor") is None:
            poisoned.step += 1
            if poisoned.step in steps:
                return out._replace(loss=out.loss * float("nan"))
        return out

    poisoned.step = calls_before
    return poisoned


def test_a_step_with_nan_changes_nothing_and_is_counted(pretrain, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr(Pretraining, "forward", _poison({3}))
        folder = pretrain("poisoned", "train.health_check=false")
    found = records(folder)
    assert [r["train/skipped"] for r in found] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert "step 3" in capsys.readouterr().err
    assert all(torch.isfinite(v).all() for v in weights(folder).values() if v.is_floating_point())
    assert found[-1]["train/loss"] < found[0]["train/loss"]


def test_nan_in_a_row_stops_the_run_and_names_the_last_good_checkpoint(pretrain, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr(Pretraining, "forward", _poison(set(range(4, 20))))
        folder = pretrain("lost", "train.max_bad_steps=2", "train.health_check=false")
    error = capsys.readouterr().err
    assert pretrain.code == 2
    assert re.search(r"2 steps in a row.*step-00000003", error), error
    assert records(folder)[-1]["step"] == 4  # the step that stopped the run is not part of it


# ------------------------------------------------------------------------------------------------------------ two ranks


def test_two_ranks_take_the_steps_of_one(arguments, whole, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(RECIPE), *arguments("pair")], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 1/8") == 1  # rank 0 alone speaks
    straight = records(whole)
    for a, b in zip(records(tmp_path / "pair")[:3], straight[:3], strict=True):
        assert a["train/mtp_loss"] == pytest.approx(b["train/mtp_loss"], rel=2e-5)
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=2e-5)
    first, second = records(tmp_path / "pair")[0], straight[0]
    assert first["train/grad_norm"] == pytest.approx(second["train/grad_norm"], rel=1e-4)
    assert [first[k] for k in first if "maxvio" in k] == [second[k] for k in first if "maxvio" in k]


@pytest.mark.parametrize(
    "change, words",
    [
        ("optim.schedule=cosin", "did you mean 'cosine'"),
        ("model.balance=bais", "did you mean 'bias'"),
        ("model.attention=mal", "did you mean 'mla'"),
        ("model.router=topp", "did you mean 'topk'"),
    ],
)
def test_an_unknown_entry_of_a_table_is_told_before_a_folder_is_made(pretrain, capsys, change, words):
    folder = pretrain("unknown", change)
    error = capsys.readouterr().err
    assert pretrain.code == 2 and words in error and len(error.strip().splitlines()) == 1
    assert not folder.exists()


def test_rows_that_ranks_cannot_share_are_refused():
    from moe.config import UserError
    from moe.parallel import Ranks

    ranks = Ranks(0, 3, torch.device("cpu"))
    ranks.check_rows(9, 32)
    with pytest.raises(UserError, match="8 rows a step cannot be shared equally by 3 ranks.*multiple of 96"):
        ranks.check_rows(8, 32)
