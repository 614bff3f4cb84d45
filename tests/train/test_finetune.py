"""The fine-tuning recipe as a user runs it: demonstrations, own files, gates, resume, and mistakes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.data.tokenizer import Tokenizer
from moe.train.pretrained import load_model
from moe.train.trainer import Trainer
from tests.settings import TASK

ROOT = Path(__file__).parents[2]
SMALL = [
    *TASK, "train.batch_tokens=256", "train.micro_batch_size=4", "train.steps=6", "train.save_every=3", "sft.gate=0",
]  # fmt: skip


@pytest.fixture
def sft(tmp_path, monkeypatch):
    """sft("name", arguments...) -> its folder; `.code` is the exit code."""
    torch.use_deterministic_algorithms(False)

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", ["sft.py", *SMALL, *arguments, f"run.dir={tmp_path / name}"])
        start.code = 0
        try:
            runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")
        except SystemExit as stop:
            start.code = stop.code
        return tmp_path / name

    return start


@pytest.fixture
def chats(tmp_path):
    """A jsonl of both kinds of lines, and a tokenizer for it."""
    lines = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(30)]
    lines += [
        {"messages": [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Tokenizer.train([json.dumps(lines)] * 3, 400).save(tmp_path / "tokenizer.json")
    return [
        f"data.path={tmp_path / 'chats.jsonl'}",
        f"data.tokenizer={tmp_path / 'tokenizer.json'}",
        "model.vocab_size=400",
    ]


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines]


def weights(folder, step=None):
    newest = (
        sorted((folder / "checkpoints").glob("step-*"))[-1] if step is None else folder / f"checkpoints/step-{step:08d}"
    )
    return {k: v.clone() for k, v in load_file(newest / "model.safetensors").items()}


def test_demonstrations_teach_and_held_out_problems_are_solved(sft):
    folder = sft("run", "train.steps=60", "optim.lr=5e-3", "train.export=true")
    summary = json.loads((folder / "summary.json").read_text())
    found = records(folder)
    assert sft.code == 0 and found[-1]["train/loss"] < 0.6 * found[0]["train/loss"]
    assert {"val/loss", "val/greedy", "val/pass@1", "val/pass@8"} <= summary.keys()
    exported, own = load_model(folder / "export"), load_model(folder)
    tokens = torch.randint(0, 24, (1, 6))
    with torch.no_grad():
        assert torch.equal(exported.model(tokens).logits, own.model(tokens).logits)


def test_the_gate_ends_the_run_once_it_is_reached(sft, monkeypatch):
    import moe.train.finetune as finetune

    looks = iter([0.1, 0.2, 0.3, 0.9])
    accuracy = finetune.Finetuner._accuracy

    def staged(self, problems, samples):
        figures = accuracy(self, problems, samples)
        return figures | {"val/pass@1": next(looks)} if problems else figures

    monkeypatch.setattr(finetune.Finetuner, "_accuracy", staged)
    folder = sft("gated", "sft.gate=0.25", "sft.gate_every=2", "train.steps=20")
    assert [r["gate/pass@1"] for r in records(folder) if "gate/pass@1" in r] == [0.1, 0.2, 0.3]
    assert records(folder)[-1]["step"] == 6 and json.loads((folder / "summary.json").read_text())["gate_reached"]
    assert (folder / "checkpoints/step-00000006").exists()


class Interrupted(BaseException):
    pass


def test_a_killed_run_resumes_bit_for_bit(sft, monkeypatch):
    whole, step = sft("whole"), Trainer.train_step

    def dying(self):
        if self.step == 5:
            raise Interrupted
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(Interrupted):
            sft("killed")
    killed = sft("killed")
    assert records(killed) == records(whole)
    assert all(torch.equal(v, weights(killed)[k]) for k, v in weights(whole).items())


def test_a_file_of_samples_trains_from_scratch_and_from_a_run(sft, chats, tmp_path):
    first = sft("first", *chats, "sft.gate=0.25", "sft.gate_every=2")  # a gate is for tasks, and the default has one
    assert sft.code == 0
    again = sft("again", *chats[:1], f"init={first}", "train.steps=3")
    assert sft.code == 0
    start, end = weights(first), weights(again)
    assert start.keys() == end.keys() and 0 < float((start["head.weight"] - end["head.weight"]).abs().max()) < 0.1
    assert load_model(again).tokenizer.fingerprint == load_model(first).tokenizer.fingerprint
    assert json.loads((again / "summary.json").read_text())["val/loss"] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (["init=nowhere"], "nowhere does not exist"),
        (["task.name=sorting"], "task.name='sorting' is not one of"),
        (["data.seq_len=8", "train.batch_tokens=64"], "data.seq_len=8 is shorter than a problem"),
        (["data.path=missing.jsonl", "data.tokenizer=x"], "x does not exist"),
        (["data.path=missing.jsonl"], "needs data.tokenizer=FILE"),
        (["model.vocab_size=20"], "set model.vocab_size=24"),
    ],
)
def test_a_mistake_costs_one_line_and_leaves_no_folder(sft, capsys, changes, message):
    folder = sft("wrong", *changes)
    text = capsys.readouterr().err
    assert sft.code == 2 and message in text and "Traceback" not in text and text.count("\n") == 1, text
    assert not (folder / "config.yaml").exists()


def test_another_shape_than_that_of_the_start_is_named(sft, chats, capsys):
    first = sft("first", *chats)
    sft("wider", *chats[:1], f"init={first}", "model.n_routed_experts=16")
    assert sft.code == 2 and "model.n_routed_experts=16, but the model in" in capsys.readouterr().err


def test_a_line_without_an_answer_is_named_before_anything_is_trained(sft, chats, tmp_path, capsys):
    with open(tmp_path / "chats.jsonl", "a") as file:
        file.write('{"prompt": "why"}\n')
    folder = sft("wrong", *chats)
    assert sft.code == 2 and "chats.jsonl, line 40" in capsys.readouterr().err and not folder.exists()
