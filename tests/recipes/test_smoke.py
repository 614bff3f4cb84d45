"""Recipes, started as a user starts them: a small run leaves what the README promises, and a mistake costs one line."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import FinetuneConfig, GrpoRecipe, PretrainConfig, load, resolve, to_dict
from tests.settings import PRETRAIN

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "pretrain.py"
SCHEMAS = {"sft": FinetuneConfig, "grpo": GrpoRecipe}  # configs/<recipe>*.yaml; a file without such a name is pretrain's
SMALL = [*PRETRAIN, "train.micro_batch_size=4", "train.eval_tokens=512", "train.steps=3"]


def start(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MOE_OPS"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )


def torchrun(*command: str | Path, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return start(*launcher, *command, cwd=cwd)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text of its own, from where the recipes are started."""
    folder, rng = tmp_path_factory.mktemp("home"), random.Random()
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(400)]
    lines = (" ".join(rng.choices(words, k=rng.randint(3, 12))) + ".\n" for _ in range(4000))
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def command(home):
    return [RECIPE, *SMALL, f"data.path={home / 'text.txt'}", f"data.cache={home / 'cache'}"]


@pytest.fixture(scope="module")
def run(home, command):
    """The folder of a three-step run under torchrun."""
    done = torchrun(*command, f"run.dir={home / 'run'}", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "run"


# ----------------------------------------------------------------------------------------------------------- what is left


def test_a_run_leaves_one_record_a_step(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(4 < record["train/loss"] < 8 for record in records)  # ln 512 = 6.2
    assert all(record["perf/tokens_per_s"] > 0 and "moe/maxvio" in record for record in records)
    assert all(name in record for record in records for name in ("train/mtp_loss", "train/balance_loss", "train/lr"))
    assert records[-1]["val/bpb"] > 0 and 4 < records[-1]["val/loss"] < 8


def test_a_run_leaves_a_configuration_that_resolves_to_itself(run):
    config = load(PretrainConfig, [f"config={run / 'config.yaml'}"])
    assert (config.train.steps, config.model.n_routed_experts, config.data.seq_len) == (3, 16, 32)
    assert resolve(PretrainConfig, to_dict(config)) == config
    environment = json.loads((run / "env.json").read_text())
    assert environment["versions"]["torch"] and environment["command"]


def test_a_run_leaves_a_checkpoint_plots_and_an_export(run):
    left = tree(run)
    assert any(path.startswith("checkpoints/") and path.endswith("model.safetensors") for path in left)
    assert {"export/config.json", "export/model.safetensors", "loss.svg", "experts.svg"} <= left
    assert not any(path.endswith((".pt", ".pth", ".bin", ".pkl")) for path in left)


def test_an_export_is_a_model_again(run):
    import torch

    import moe

    config = json.loads((run / "export" / "config.json").read_text())
    assert config["n_routed_experts"] == 16 and config["vocab_size"] == 512
    model = moe.from_hf(run / "export").eval()
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_same_command_again_trains_nothing(run, home, command):
    before = (run / "metrics.jsonl").read_text()
    done = start(*command, f"run.dir={run}", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "metrics.jsonl").read_text() == before


def test_another_configuration_does_not_continue_a_run(run, home, command):
    done = start(*command, f"run.dir={run}", "optim.lr=0.5", cwd=home)
    assert done.returncode == 2
    assert "optim.lr" in done.stderr and "run.dir" in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_configuration_file_loads_and_resolves(file):
    schema = SCHEMAS.get(file.stem.split("_")[0], PretrainConfig)
    config = load(schema, [f"config={file}"])
    assert resolve(schema, to_dict(config)) == config


# ---------------------------------------------------------------------------------------------------------- conversation


def test_help_prints_every_knob(tmp_path):
    done = start(RECIPE, "--help", cwd=tmp_path)
    assert done.returncode == 0 and tree(tmp_path) == set()
    sections = {section.name: section.default_factory for section in dataclasses.fields(PretrainConfig)}
    knobs = [f"{name}.{knob.name}=" for name, section in sections.items() for knob in dataclasses.fields(section)]
    knobs = [knob for knob in knobs if knob.rstrip("=") not in PretrainConfig.unused]
    assert len(knobs) > 50
    assert [knob for knob in knobs if f"  {knob}" not in done.stdout] == []


@pytest.mark.parametrize(
    "argument, parts",
    [
        ("train.stps=3", ["train.stps", "train.steps"]),
        ("model.n_routed_expert=3", ["model.n_routed_expert", "model.n_routed_experts"]),
        ("train.steps=few", ["train.steps=few", "integer"]),
        ("model.preset=tinny", ["model.preset", "tiny"]),
        ("config=nowhere.yaml", ["nowhere.yaml", "recipes/configs"]),
        ("data.path=nowhere.txt", ["data.path=nowhere.txt"]),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_line(argument, parts, tmp_path):
    done = start(RECIPE, argument, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.mark.slow
def test_under_torchrun_one_rank_states_a_mistake_before_the_table(tmp_path):
    done = torchrun(RECIPE, "train.stps=3", cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    before, table, _ = done.stderr.partition("pretrain.py FAILED")  # the table repeats each rank's line
    assert table and before.count("error: train.stps") == 1, done.stderr


def test_dry_run_prints_the_size_and_writes_nothing(home, command, tmp_path):
    done = start(*command, f"run.dir={tmp_path / 'run'}", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters" in done.stdout and any(character.isdigit() for character in done.stdout)
    assert tree(tmp_path) == set()
