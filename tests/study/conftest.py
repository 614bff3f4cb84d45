"""A toy study, and a stand-in for the recipe that leaves what a real one leaves, in no time."""

import copy
import json
import textwrap

import pytest

from moe.study.grid import load_study

MODEL = dict(
    num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=16, moe_intermediate_size=8, n_group=1,
    topk_group=1, num_experts_per_tok=3, vocab_size=512, seq_aux_alpha=0, num_nextn_predict_layers=0,
)  # fmt: skip
TOY = {
    "study": {
        "name": "toy",
        "question": "Which way is up?",
        "seeds": 2,
        "metrics": [{"name": "val/loss", "label": "held-out loss", "margin": 0.01}],
    },
    "arms": {"bias": {"model.balance": "bias"}, "none": {"model.balance": "none"}},
    "model": MODEL,
    "data": {"seq_len": 32},
    "train": {"steps": 4, "batch_tokens": 256, "micro_batch_size": 8},
}

RECIPE = """
import json, os, signal, sys, time, yaml
from pathlib import Path
config, folder = Path(sys.argv[1].partition("=")[2]), Path(sys.argv[2].partition("=")[2])
cell = json.loads(config.read_text())
arm, seed = cell["model"]["balance"], cell["train"]["seed"]
with open("starts.txt", "a") as file:
    file.write(f"{arm} {seed} {os.environ['OMP_NUM_THREADS']}\\n")
(folder / "config.yaml").write_text(yaml.safe_dump(cell, sort_keys=False))
(folder / "env.json").write_text(json.dumps({"torch": "x", "threads": 1, "git_commit": "abc", "command": " ".join(sys.argv)}))
def stop(*_):
    (folder / "saved").touch()
    raise SystemExit(130)
signal.signal(signal.SIGTERM, stop)
behave = json.loads(Path("behave.json").read_text()) if Path("behave.json").exists() else {}
todo = behave.get(f"{arm} {seed}", [])
tries = len([line for line in open("starts.txt") if line.startswith(f"{arm} {seed} ")])
what = todo[tries - 1] if tries <= len(todo) else "ok"
print("starting", flush=True)
if what == "fail":
    print("error: out of luck", file=sys.stderr)
    raise SystemExit(1)
loss = {"bias": 3.0, "none": 3.5, "aux": 3.2}[arm] + 0.1 * seed + (0.001 if arm == "none" and seed else 0)
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, cell["train"]["steps"] + 1):
        record = {"step": step, "train/loss": loss + 1 / step, "train/tokens": 256 * step, "perf/seconds": 0.5 * step,
                  "moe/maxvio": 1.0 + seed, "val/loss": loss}
        file.write(json.dumps(record) + "\\n")
        file.flush()
        if what == "hang":
            time.sleep(60)
(folder / "summary.json").write_text(json.dumps({"step": step, "val/loss": loss, "perf/seconds": 2.0}))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(**changes) -> Study in an empty folder; a change is a section, merged, or replaces what is no mapping."""
    monkeypatch.chdir(tmp_path)

    def make(*arguments, **changes):
        raw = copy.deepcopy(TOY)
        for section, values in changes.items():
            raw[section] = (
                {**raw.get(section, {}), **values} if isinstance(values, dict) and section != "arms" else values
            )
        raw = {section: values for section, values in raw.items() if values is not None}
        (tmp_path / "toy.yaml").write_text(json.dumps(raw))
        return load_study(["config=toy.yaml", *arguments])

    return make


@pytest.fixture
def recipes(tmp_path):
    """A folder with the stand-in; behave.json beside it says how each start of a cell ends: ok, fail or hang."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "pretrain.py").write_text(textwrap.dedent(RECIPE))
    return tmp_path / "recipes"
