"""The recipe that lets a model continue text: one prompt, the loop over a pipe, broken characters, mistakes in one line."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import moe
from moe.config import UserError
from moe.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "generate.py"
OPTIONS = ["train.threads=1", "train.keep_memory=false", "generate.max_new_tokens=12"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mät, 日本語 and so on. "] * 30, 400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """An exported model that draws any of its ids."""
    shape = dict(
        name="small-test", vocab_size=tokenizer.vocab_size, hidden_size=24, num_hidden_layers=2, intermediate_size=20,
        num_attention_heads=2, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
        max_position_embeddings=40, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=7, n_group=4,
        topk_group=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("exported")
    moe.to_hf(moe.Transformer(moe.ModelConfig(**shape)), path, tokenizer=tokenizer)
    return path


@pytest.fixture
def recipe(folder, monkeypatch, capsys):
    """recipe(*arguments, typed="...") -> what it printed, run in this process."""
    main = runpy.run_path(str(RECIPE))["main"]

    def run(*arguments, typed=""):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), f"run={folder}", *OPTIONS, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        main()
        return capsys.readouterr().out

    return run


def expected(folder, tokenizer, text, new=12, seed=0, **options):
    """What generate draws for this prompt, as text."""
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    options = {"temperature": 0.7, **options}
    drawn = moe.generate(moe.from_hf(folder, mtp=False), [ids], new, seed=[seed], eos=tokenizer.eos, **options).tokens[
        0
    ]
    return tokenizer.decode(ids + drawn, skip_special=True)[len(text) :].rstrip("\ufffd"), len(drawn), len(ids)


def test_one_prompt_prints_it_with_its_continuation_and_what_it_took(recipe, folder, tokenizer):
    text, count, prompt = expected(folder, tokenizer, "the cat")
    said = recipe("prompt=the cat")
    assert said.startswith(f"the cat{text}\n[{count} tokens, ")
    assert said.endswith(f" tokens/s, cache {(12 + 4) * 2 * 4 * (prompt + 12):,} bytes]\n")


def test_samples_differ_and_repeat_with_their_seed(recipe, folder, tokenizer):
    said = recipe("prompt=on", "generate.samples=3", "generate.seed=5")
    for seed in (5, 6, 7):
        text, count, _ = expected(folder, tokenizer, "on", seed=seed)
        assert f"on{text}\n[{count} tokens" in said
    greedy, _, _ = expected(folder, tokenizer, "on", temperature=0)
    assert recipe("prompt=on", "generate.temperature=0").startswith(f"on{greedy}\n[")


def test_half_precision_halves_the_cache(recipe):
    whole, half = (recipe("prompt=so", f"generate.precision={p}").split("cache ")[1] for p in ("fp32", "bf16"))
    whole, half = (int(text.split(" ")[0].replace(",", "")) for text in (whole, half))
    assert whole == 2 * half > 0


def test_the_loop_answers_each_line_tells_mistakes_and_ends_at_an_empty_one(recipe, folder, tokenizer):
    said = recipe(typed="the cat\n" + "日本語 " * 40 + "\non\n\nthe mat\n")
    for text in ("the cat", "on"):
        assert f"> {expected(folder, tokenizer, text)[0]}\n[" in said
    assert "error: generate.prompt has " in said and "the model reads 40; shorten it\n" in said
    assert said.count("tokens/s") == 2  # nothing after the empty line
    assert recipe(typed="on").count("tokens/s") == 1  # the end of the pipe ends it too


def test_a_continuation_is_cut_to_the_room_left_and_says_so(recipe, tokenizer):
    text = "the cat sat on the " * 6
    room = 40 - 1 - len(tokenizer.encode(text))
    assert 0 < room < 12
    assert f"generate.max_new_tokens is cut from 12 to {room}: the model reads 40 tokens\n" in recipe(f"prompt={text}")


@pytest.mark.parametrize("words", ["日本語", "mät 日本 🙂 x", "🙂"])
def test_only_whole_characters_are_printed(tokenizer, capsys, words):
    ids = tokenizer.encode(words)
    assert any("\ufffd" in tokenizer.decode(ids[:n]) for n in range(len(ids))) or words == "日本語"
    written = runpy.run_path(str(RECIPE))["Written"](tokenizer, tokenizer.encode("the cat"))
    said = ""
    for token in [*ids, *tokenizer.encode(" and so on" * 20), *ids]:
        written(0, token)
        said += capsys.readouterr().out
        assert "\ufffd" not in said
    assert said == words + " and so on" * 20 + words


def test_ctrl_c_stops_one_continuation_and_the_loop_goes_on(recipe, monkeypatch):
    calls, real = [], moe.generate

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setitem(runpy_globals(recipe), "generate", interrupted)
    assert recipe(typed="on\nthe\n\n").count("tokens/s") == 1 and len(calls) == 2


def runpy_globals(recipe):
    return recipe.__closure__[[*recipe.__code__.co_freevars].index("main")].cell_contents.__globals__


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["prompt="], ["generate.prompt is empty"]),
        ([f"prompt={'日本語 ' * 40}"], ["generate.prompt has", "the model reads 40; shorten it"]),
        (["prompt=on", "run="], ["run.init is not set"]),
        (["prompt=on", "run=nowhere/at/all"], ["nowhere/at/all", "does not exist"]),
        (["prompt=on", "generate.top_p=0"], ["generate.top_p=0"]),
    ],
)
def test_mistakes_are_told_in_one_line(recipe, arguments, words):
    with pytest.raises(UserError) as error:
        recipe(*arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_started_as_a_user_starts_it(folder):
    def start(*arguments):
        command = [sys.executable, str(RECIPE), *arguments, *OPTIONS]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, input="the cat\n", capture_output=True, text=True, timeout=300, env=env)

    done = start(f"run={folder}")
    assert done.returncode == 0 and "tokens/s" in done.stdout, done.stderr
    done = start(f"run={folder}", "prompt=on", "generate.tmeperature=1")
    assert done.returncode == 2 and done.stdout == "" and "did you mean 'generate.temperature'" in done.stderr
    assert done.stderr.count("\n") == 1
