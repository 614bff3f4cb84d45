"""llama.cpp at our shapes, by its own llama-bench: decode at several context depths, and prefill.

    python tools/bench/llama_cpp.py llama_cpp=FOLDER              # shape R: about a minute; or set LLAMA_CPP=FOLDER
    python tools/bench/llama_cpp.py shape=1.7B threads=2 rounds=5

FOLDER is a llama.cpp tree, such as vendor/llama.cpp of the llama-cpp-python source package, built inside it:

    pip download --no-binary :all: --no-deps llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cmake -S FOLDER -B FOLDER/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_SERVER=OFF
    cmake --build FOLDER/build -j 2 --target llama-bench llama-results

The model is random, exported by moe.to_hf in bf16 and converted by the tree's convert_hf_to_gguf.py, run by this Python.
The converter knows pre-tokenizers by a hash of some ids, which a vocabulary of our own cannot have: for the benchmark
only, `TextModel.get_vocab_base_pre` is replaced and answers "deepseek-v3", whose split ours is. Nothing in the tree is
changed. llama.cpp has the group limit, so the shapes keep theirs.

check=true first asks whether both compute the same model, or stops. In fp32 without flash attention (which casts keys to
fp16) logits have to agree; in bf16 both round, and where that turns an expert's near-tie the logits part: ours in bf16
against ours in fp32 stands beside it. Speeds are llama-bench's: wall clock, random ids, no sampling, fp16 cache.

    shape=R0|R|R2|1.7B   threads=1,2   context=0,256,2048   prefill=512   steps=32   rounds=3   check=true   lines=false

1.7B takes 7 GB of memory and of the temporary folder (TMPDIR), its check 11 and 14.
steps: of one decoding run, of which there are `rounds`, median. lines: a JSON line for each row instead of the table.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from train_step import SHAPES, shape_config

SHAPES["1.7B"] = dict(  # V3's proportions at a width whose experts do not fit into any cache; 112 M active
    hidden_size=1024, num_hidden_layers=9, intermediate_size=2560, num_attention_heads=16, q_lora_rank=512,
    kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, moe_intermediate_size=256,
    vocab_size=16384,
)  # fmt: skip
DEFAULTS = dict(
    llama_cpp="", shape="R", threads="1,2", context="0,256,2048", prefill=512, steps=32, rounds=3, check=True, lines=False
)  # fmt: skip
NEEDED = {  # file of the tree -> what to do without it
    "convert_hf_to_gguf.py": "name the folder of a llama.cpp tree",
    "conversion/base.py": "take a newer llama.cpp, whose converter is a package",
    "build/bin/llama-bench": "build it: cmake --build FOLDER/build --target llama-bench llama-results",
    "build/bin/llama-results": "build it: cmake --build FOLDER/build --target llama-bench llama-results",
}
CONVERT = """
import runpy
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
READ = """
import sys
sys.path.insert(0, "gguf-py")
import numpy
from gguf import GGUFReader
numpy.savez(sys.argv[2], **{t.name: t.data for t in GGUFReader(sys.argv[1]).tensors})
"""
CLOSE = 1e-4  # of the largest logit, in fp32: 5e-7 is usual; rope_theta off by 1 % gives 3e-4, one expert less 7e-2


def tree() -> Path:
    """The folder in LLAMA_CPP, with all that is needed inside."""
    from moe.config import UserError

    named = os.environ.get("LLAMA_CPP", "")
    if not named:
        raise UserError("LLAMA_CPP is not set: name a built llama.cpp tree with llama_cpp=FOLDER (--help says how)")
    folder = Path(named).absolute()
    for file, remedy in NEEDED.items():
        if not (folder / file).exists():
            raise UserError(f"LLAMA_CPP={named} has no {file}; {remedy.replace('FOLDER', named)}")
    return folder


def call(*command: str | Path) -> str:
    """Standard output of a command run in the tree; its last words where it fails."""
    from moe.config import UserError

    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    done = subprocess.run(
        list(map(str, command)), cwd=tree(), env=environment, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-1:] or ["no message"]
        what = "the converter" if str(command[0]) == sys.executable else Path(command[0]).name
        raise UserError(f"LLAMA_CPP: {what} ended with code {done.returncode}: {last[0].strip()}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------- the models


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="moe-llama-cpp-")  # gone when this process ends


def texts() -> list[str]:
    """The package's own sources: enough to train a vocabulary on, and prompts to compare."""
    import moe

    return [file.read_text(encoding="utf-8") for file in sorted(Path(moe.__file__).parent.rglob("*.py"))]


@functools.cache
def exported(shape: str) -> Path:
    """A random model of that shape as a Hugging Face folder in bf16; moe.from_hf reads the same weights."""
    import torch

    import moe
    from moe.data.tokenizer import Tokenizer

    torch.manual_seed(0)
    config = shape_config(shape)
    model = moe.Transformer(config).to(torch.bfloat16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.data.uniform_(0.5, 1.5)  # ones and zeros would hide a tensor that nobody reads
        elif name.endswith("router.bias"):
            tensor.data.normal_(0, 0.02)
    folder = Path(_scratch().name) / shape
    return moe.to_hf(model, folder, tokenizer=Tokenizer.train(texts(), config.vocab_size), mtp=False)


@functools.cache
def converted(shape: str) -> Path:
    """The same as GGUF in bf16."""
    return convert(shape, "bf16", Path(_scratch().name) / f"{shape}.gguf")


def convert(shape: str, dtype: str, file: Path) -> Path:
    """dtype f32 widens the same bf16 weights."""
    call(sys.executable, "-c", CONVERT, exported(shape), "--outtype", dtype, "--outfile", file)
    return file


# --------------------------------------------------------------------------------------------------------------- speed


def peer(
    shape: str, threads: int, context: int, prefill: int, flash: bool = True, steps: int = 32, rounds: int = 3
) -> float:
    """Tokens/s of llama.cpp after `context` tokens: of a prompt of `prefill` tokens, or with 0 of decoding `steps`.

    Each call is a process of its own, so that others can take turns with it; the model is made and converted once.
    """
    found = call(
        tree() / "build/bin/llama-bench", "-m", converted(shape), "-t", str(threads), "-d", str(context), "-p",
        str(prefill), "-n", "0" if prefill else str(steps), "-r", str(rounds), "-fa", "on" if flash else "off", "-o", "json",
    )  # fmt: skip
    return statistics.median(json.loads(found)[0]["samples_ts"])


# ------------------------------------------------------------------------------------------------------- the same model


class Same(NamedTuple):
    """Differences are the largest of a token's logits, as a share of the largest logit of all."""

    tokens: int
    typical: float
    """Median over tokens, both in fp32."""
    worst: float
    """Largest of all, both in fp32."""
    rounded: dict[str, float]
    """Median over tokens of llama.cpp in bf16, and of ours in bf16, against ours in fp32."""
    greedy: dict[str, float]
    """Share of equal next tokens, of the same two."""


def logits(model: Path, prompt: str, *options: str):
    """llama.cpp's -> (token ids [T], logits [T, V]) of a prompt."""
    import numpy as np
    import torch

    text, out, arrays = (Path(_scratch().name) / name for name in ("prompt.txt", "logits.gguf", "logits.npz"))
    text.write_text(prompt, encoding="utf-8")
    call(tree() / "build/bin/llama-results", "-m", model, "-f", text, "-o", out, "-c", "512", "-t", "1", *options)
    call(sys.executable, "-c", READ, out, arrays)
    with np.load(arrays) as found:
        ids = torch.from_numpy(found["tokens"]).long()
        return ids, torch.from_numpy(found["logits"]).view(len(ids), -1)


def compare(shape: str, prompts: int = 3, length: int = 400) -> Same:
    """Every next-token logit of a few prompts, llama.cpp's against ours in fp32 on the same bf16 weights."""
    import torch

    import moe

    chosen = [text[:length] for text in sorted(texts(), key=len)[-prompts:]]
    wide = convert(shape, "f32", Path(_scratch().name) / f"{shape}-f32.gguf")
    exact = [logits(wide, prompt, "-fa", "off", "-ctk", "f32", "-ctv", "f32") for prompt in chosen]
    wide.unlink()
    theirs = torch.cat([logits(converted(shape), prompt, "-fa", "on")[1] for prompt in chosen])

    def ours(dtype: torch.dtype):
        model = moe.from_hf(exported(shape), dtype=dtype).eval()
        with torch.no_grad():
            return torch.cat([model(ids[None]).logits[0].float() for ids, _ in exact])

    truth = ours(torch.float32)
    off = lambda x: (x - truth).abs().amax(-1) / truth.abs().max()
    fp32, bf16 = off(torch.cat([found for _, found in exact])), {"llama.cpp": theirs, "ours": ours(torch.bfloat16)}
    return Same(
        len(truth),
        float(fp32.median()),
        float(fp32.max()),
        {who: float(off(x).median()) for who, x in bf16.items()},
        {who: float((x.argmax(-1) == truth.argmax(-1)).float().mean()) for who, x in bf16.items()},
    )


def check_same(shape: str) -> None:
    """Print what `compare` found; refuse to time a llama.cpp that computes another model."""
    from moe.config import UserError

    same = compare(shape)
    print(
        f"shape {shape}, {same.tokens} tokens: logits in fp32 differ by {same.typical:.1e} of the largest, median over "
        f"tokens; at most {same.worst:.1e}"
    )
    bf16 = "; ".join(
        f"{who} {same.rounded[who]:.1e}, greedy tokens equal {same.greedy[who]:.0%}" for who in same.rounded
    )
    print(f"bf16 against ours in fp32: {bf16}", flush=True)
    if not same.typical <= CLOSE:
        raise UserError(
            f"LLAMA_CPP={os.environ['LLAMA_CPP']} computes another model at shape={shape}: logits differ by "
            f"{same.typical:.1e} where {CLOSE:.0e} is rounding; take another llama.cpp, or check=false"
        )


# ------------------------------------------------------------------------------------------------------------- command


def main(
    llama_cpp: str, shape: str, threads: list[int], context: list[int], prefill: int, steps: int, rounds: int,
    check: bool, lines: bool,
) -> None:  # fmt: skip
    os.environ["LLAMA_CPP"] = llama_cpp or os.environ.get("LLAMA_CPP", "")
    tree()
    if check:
        check_same(shape)
    places = [(depth, 0) for depth in context] + [(0, prefill)]
    if not lines:
        print(f"tokens/s of llama.cpp, bf16, wall clock, median of {rounds}")
        print(f"| shape, threads, flash attention | {' | '.join(map(str, context))} | prefill {prefill} |")
        print("|---" * (len(places) + 1) + "|")
    for count in threads:
        for flash in (True, False):
            found = [peer(shape, count, *place, flash, steps, rounds) for place in places]
            if lines:
                decode = dict(zip(map(str, context), found))
                row = dict(peer="llama.cpp", shape=shape, threads=count, flash=flash, decode=decode, prefill=found[-1])
                print(json.dumps(row), flush=True)
            else:
                speeds = " | ".join(f"{value:,.0f}" for value in found)
                print(f"| {shape}, {count}, {'on' if flash else 'off'} | {speeds} |", flush=True)


def parse(argv: list[str]) -> dict:
    """key=value words; a mistake ends with one line and exit code 2."""
    from moe.config import UserError, nearest

    chosen: dict = dict(DEFAULTS)
    allowed = {"shape": list(SHAPES), "check": ["true", "false"], "lines": ["true", "false"]}
    for word in argv:
        key, eq, value = word.partition("=")
        if not eq or key not in DEFAULTS:
            raise UserError(f"{word!r} is not one of {', '.join(f'{k}=...' for k in DEFAULTS)}{nearest(key, DEFAULTS)}")
        if value not in allowed.get(key, [value]):
            raise UserError(f"{key}={value} is not one of {allowed[key]}")
        chosen[key] = value == "true" if key in ("check", "lines") else value
    for key, least in {"threads": 1, "context": 0, "prefill": 1, "steps": 1, "rounds": 1}.items():
        parts = str(chosen[key]).split(",") if key in ("threads", "context") else [str(chosen[key])]
        if not all(part.isdigit() and int(part) >= least for part in parts):
            kind = "whole numbers" if key in ("threads", "context") else "a whole number"
            raise UserError(f"{key}={chosen[key]} must be {kind} of at least {least}")
        chosen[key] = [int(part) for part in parts] if key in ("threads", "context") else int(parts[0])
    return chosen


if __name__ == "__main__":
    from moe.train.log import entry

    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
    else:
        entry(lambda: main(**parse(sys.argv[1:])))
