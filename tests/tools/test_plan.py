"""The planner as a command: presets, files and overrides; a table, JSON, or one line of complaint."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "plan.py"


@pytest.fixture
def plan(capsys):
    """plan(*words) -> what the command prints."""
    spec = importlib.util.spec_from_file_location("plan_tool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words):
        module.main(list(words))
        return capsys.readouterr().out

    return run


def test_a_preset_is_planned(plan):
    text = plan("v3-671b", "data.seq_len=4096")
    assert text.startswith("plan of v3-671b\n")
    assert "671.0 B" in text and "36.6 B" in text and "at S = 4096" in text


def test_json_holds_exact_numbers(plan):
    found = json.loads(plan("tiny", "--json", "model.num_hidden_layers=2", "train.precision=bf16"))
    assert found["cache"]["elements"] == (32 + 16) * 2
    assert found["precision"] == "bf16" and found["memory"]["master"] > 0
    assert found["balance"]["tokens_per_expert"] == 128


def test_a_file_is_planned_and_the_command_line_wins(plan, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {preset: small, num_hidden_layers: 3}\ndata: {seq_len: 128}\n")
    found = json.loads(plan(f"config={file}", "model.num_hidden_layers=5", "--json"))
    assert found["name"] == "small"
    assert found["flops"]["seq_len"] == 128
    assert found["cache"]["elements"] == (128 + 32) * 5


def test_a_dense_model_has_no_twin_and_no_experts(plan):
    found = json.loads(plan("tiny", "model.n_routed_experts=0", "--json"))
    assert found["twin"] is None and found["balance"] is None


def test_help_lists_the_knobs(plan):
    text = plan("--help")
    assert "python tools/plan.py v3-671b" in text and "model.kv_lora_rank=" in text


@pytest.mark.parametrize(
    "words, part",
    [
        (["v3-617b"], "did you mean 'v3-671b'"),
        (["tiny", "model.hiden_size=3"], "did you mean 'model.hidden_size'"),
        (["tiny", "train.batch_tokens=100"], "must be a multiple of data.seq_len"),
        (["tiny", "model.n_group=7"], "must divide n_routed_experts"),
        (["config=nowhere.yaml"], "does not exist"),
    ],
)
def test_a_mistake_is_named(plan, words, part):
    with pytest.raises(UserError, match=part) as error:
        plan(*words)
    assert "\n" not in str(error.value)


def test_a_mistake_costs_one_line_and_exit_code_2(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "v3-617b"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: model.preset='v3-617b'")
