"""The peer llama.cpp without one: its shapes and words, what a tree lacks, and a tree of stand-ins that answers."""

import importlib
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

import moe
from moe.config import ModelConfig, UserError

FOLDER = Path(__file__).parents[2] / "tools" / "bench"
SMALL = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, n_routed_experts=16, num_experts_per_tok=3)
BENCH = """#!/bin/sh
echo "$@" >> words.txt
[ -f "$2" ] || { echo "failed to load $2" >&2; exit 3; }
echo '[{"samples_ts": [5.0, 900.0, 7.0]}]'
"""
CONVERTER = """
import sys
from conversion.base import TextModel
assert sys.argv[2:5:2] == ["--outtype", "--outfile"]
open(sys.argv[5], "w").write(f"{TextModel().get_vocab_base_pre(None)} {sys.argv[3]} {sys.argv[1]}")
"""


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    module = importlib.import_module("llama_cpp")
    monkeypatch.setitem(module.SHAPES, "small", SMALL)
    yield module
    for name in ("llama_cpp", "train_step"):
        sys.modules.pop(name, None)


@pytest.fixture
def stand_in(tool, tmp_path, monkeypatch):
    """A tree whose converter and llama-bench only write down what they were asked."""
    root = tmp_path / "tree with space"
    for name, text in {
        "convert_hf_to_gguf.py": CONVERTER,
        "conversion/base.py": "class TextModel:\n    def get_vocab_base_pre(self, t): raise NotImplementedError",
        "build/bin/llama-bench": BENCH,
        "build/bin/llama-results": "#!/bin/sh",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        os.chmod(root / name, 0o755)
    monkeypatch.setenv("LLAMA_CPP", str(root))
    return root


def test_the_large_shape_has_its_size_and_v3s_experts(tool):
    c = tool.shape_config("1.7B")
    with torch.device("meta"):
        size = sum(p.numel() for p in moe.Transformer(c).parameters())
    assert 1.65e9 < size < 1.75e9
    v3 = ModelConfig.preset("v3-671b")
    for name in "n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group scoring_func".split():
        assert getattr(c, name) == getattr(v3, name), name
    assert c.num_nextn_predict_layers == 0
    assert c.num_hidden_layers not in (26, 27)  # which llama.cpp takes for V2-Lite, without a query latent


def test_words_become_settings(tool):
    assert tool.parse([])["context"] == [0, 256, 2048] and tool.parse([])["threads"] == [1, 2]
    found = tool.parse(["shape=1.7B", "threads=2", "context=0,64", "check=false", "llama_cpp=/a=b"])
    assert found["shape"] == "1.7B" and found["threads"] == [2] and found["context"] == [0, 64]
    assert found["check"] is False and found["lines"] is False and found["llama_cpp"] == "/a=b"


@pytest.mark.parametrize(
    "word, part",
    [
        ("shap=R", "did you mean 'shape'"),
        ("shape=R9", "shape=R9 is not one of"),
        ("threads=0", "threads=0 must be whole numbers of at least 1"),
        ("context=1,,2", "context=1,,2 must be whole numbers of at least 0"),
        ("prefill=0", "prefill=0 must be a whole number of at least 1"),
        ("steps=x", "steps=x must be"),
        ("check=no", "check=no is not one of"),
        ("fast", "'fast' is not one of"),
    ],
)
def test_a_mistake_is_named(tool, word, part):
    with pytest.raises(UserError) as error:
        tool.parse([word])
    assert part in str(error.value) and "\n" not in str(error.value)


def test_what_a_tree_lacks_is_named_with_the_way_out(tool, stand_in, monkeypatch):
    assert tool.tree() == stand_in
    (stand_in / "build/bin/llama-results").unlink()
    with pytest.raises(
        UserError, match="has no build/bin/llama-results; build it: cmake --build .*tree with space/build"
    ):
        tool.tree()
    (stand_in / "conversion/base.py").unlink()
    with pytest.raises(UserError, match="has no conversion/base.py; take a newer"):
        tool.tree()
    monkeypatch.delenv("LLAMA_CPP")
    with pytest.raises(UserError, match="LLAMA_CPP is not set"):
        tool.main(**tool.parse([]))


def test_a_speed_is_the_median_of_one_bench_of_the_converted_model(tool, stand_in):
    assert tool.peer("small", 2, 64, 0, steps=5, rounds=3) == 7.0
    assert tool.peer("small", 1, 0, 48, flash=False) == 7.0
    model = tool.converted("small")
    pre, dtype, export = model.read_text().split(" ")
    assert (pre, dtype) == ("deepseek-v3", "bf16")  # the check of the pre-tokenizer is out of the way
    decode, prefill = (shlex.split(line) for line in (stand_in / "words.txt").read_text().splitlines())
    assert decode == shlex.split(f"-m {model} -t 2 -d 64 -p 0 -n 5 -r 3 -fa on -o json")
    assert prefill == shlex.split(f"-m {model} -t 1 -d 0 -p 48 -n 0 -r 3 -fa off -o json")
    ours = moe.from_hf(export)
    assert ours.embed.weight.dtype == torch.bfloat16 and ours.config.hidden_size == 32
    assert ours.layers[1].ffn.router.bias.abs().min() > 0 and ours.norm.weight.std() > 0.1
    assert (Path(export) / "tokenizer.json").exists()


def test_the_table_and_its_lines_hold_every_setting(tool, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(tool, "peer", lambda shape, threads, context, prefill, flash, *_: (
        1e4 * threads + 5e3 * flash + context + prefill
    ))  # fmt: skip
    words = ["check=false", "context=0,7", "prefill=9"]
    tool.main(**tool.parse(words))
    assert "| R, 2, on | 25,000 | 25,007 | 25,009 |" in capsys.readouterr().out
    tool.main(**tool.parse([*words, "lines=true"]))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["threads"], r["flash"]) for r in rows] == [(1, True), (1, False), (2, True), (2, False)]
    assert rows[1]["decode"] == {"0": 10000.0, "7": 10007.0} and rows[1]["prefill"] == 10009.0


def test_a_failing_program_costs_one_line(tool, stand_in, tmp_path):
    bench = stand_in / "build/bin/llama-bench"
    with pytest.raises(UserError, match="llama-bench ended with code 3: failed to load nowhere"):
        tool.call(bench, "-m", "nowhere")
    (stand_in / "convert_hf_to_gguf.py").write_text("raise ValueError('no such\\nshape')")
    with pytest.raises(UserError, match="the converter ended with code 1: shape"):
        tool.call(sys.executable, "-c", tool.CONVERT)


@pytest.mark.parametrize("same", [True, False])
def test_another_model_is_not_timed(tool, stand_in, monkeypatch, capsys, same):
    """llama.cpp played by our own model in fp32, once with a final norm that somebody forgot."""

    def logits(file, prompt, *options):
        ids = torch.tensor(moe.data.tokenizer.Tokenizer.load(tool.exported("small")).encode(prompt[:40]))
        model = moe.from_hf(tool.exported("small"), dtype=torch.float32).eval()
        if not same:
            model.norm.weight.data.fill_(1)
        with torch.no_grad():
            return ids, model(ids[None]).logits[0]

    monkeypatch.setattr(tool, "logits", logits)
    if same:
        tool.check_same("small")
        assert "llama.cpp 0.0e+00, greedy tokens equal 100%; ours" in capsys.readouterr().out
        assert tool.compare("small").rounded["ours"] > 0
    else:
        with pytest.raises(UserError, match="computes another model at shape=small: logits differ by"):
            tool.check_same("small")
