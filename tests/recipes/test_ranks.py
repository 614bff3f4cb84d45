"""Several processes through torchrun: ZeRO from the command line, a killed rank, and another layout on resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.settings import PRETRAIN

ROOT = Path(__file__).parents[2]
SMALL = [
    *PRETRAIN, "train.micro_batch_size=2", "train.eval_tokens=256", "train.steps=60", "train.save_every=4",
    "train.eval_every=30", "train.precision=fp32", "log.every=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(f"line {i * i} of {i} words, and {i % 7} more.\n" for i in range(4000)))
    return [f"data.path={folder / 'text.txt'}", f"data.cache={folder / 'cache'}"]


def launch(folder, text, *changes, ranks=2, cwd=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "recipes/pretrain.py"), *SMALL, *text, f"run.dir={folder}", *changes]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, seconds=150):
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: (r["train/loss"], r["train/grad_norm"]) for r in map(json.loads, lines)}


def workers(process):
    """Process ids of the ranks, in order."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid:
                variables = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
                found[int(variables["RANK"])] = int(entry.name)
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return [found[r] for r in sorted(found)]


def test_stages_agree_with_one_process_and_a_killed_rank_loses_nothing(text, tmp_path):
    """One process writes the curve. Two ranks at stage 3 write the same; at stage 2 rank 1 is killed (kill -9), the job
    ends within a minute with one clear line, and the rerun on one plain process goes on along the same curve."""
    one = launch(tmp_path / "one", text, ranks=1)
    assert (finish(one), one.returncode)[1] == 0
    curve = losses(tmp_path / "one")

    three = launch(tmp_path / "three", text, "train.zero_stage=3")
    out, err = finish(three)
    assert three.returncode == 0, out + err
    assert losses(tmp_path / "three").keys() == curve.keys()
    for step, figures in losses(tmp_path / "three").items():
        assert figures == pytest.approx(curve[step], rel=1e-4), step
    assert (tmp_path / "three" / "export" / "model.safetensors").exists() and "sample" in out

    two = launch(tmp_path / "two", text, "train.zero_stage=2")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "two" / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline and two.poll() is None, finish(two, 1)
        time.sleep(0.02)
    os.kill(workers(two)[1], signal.SIGKILL)
    began = time.monotonic()
    out, err = finish(two, 60)
    assert time.monotonic() - began < 60 and two.returncode != 0
    ours = err.split("torch/distributed")[0]  # before the launcher's own table
    assert "error: another rank is gone" in ours and "resumes from the last checkpoint" in ours, err
    assert "Traceback" not in ours, err

    rest = launch(tmp_path / "two", text, ranks=1)
    out, err = finish(rest)
    assert rest.returncode == 0 and "resuming after step" in out, out + err
    assert losses(tmp_path / "two").keys() == curve.keys()
    for step, figures in losses(tmp_path / "two").items():
        assert figures == pytest.approx(curve[step], rel=1e-3), step
