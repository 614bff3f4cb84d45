"""Decoding, one token at a time: this project's `generate` against transformers' on the same weights.

    python tools/bench/decode.py                              # shape R, fp32 and bf16, three settings: a few minutes
    python tools/bench/decode.py dtype=bf16 only=b1-c256 rounds=9
    python tools/bench/decode.py shape=1.7B                   # against the memory bandwidth instead
    python tools/bench/decode.py parts=true                   # where our step's time goes (MOE_OPS=torch: by PyTorch)

Ours is measured by its native kernels, where they are built, and by its PyTorch path; MOE_OPS names one of them alone.
Weights travel through moe.to_hf. All paths take turns in one process, a few greedy steps at a time, so that a machine
whose speed drifts slows all of them alike: quote the ratios. Only steps after the first new token count; with one thread
a step is CPU time, which holds even beside other work, with more it is wall time. Each path of transformers (attention,
experts, cache) is timed and the best one of each setting is what we are compared with; all have the allocator tuned
(moe.parallel.keep_memory); after a first round only the two fastest go on. Prompts are random ids, the same for all: a
batch shares four contexts, which spares transformers' prefill, and each row has its own last token.

shape=1.7B has no peer here (llama_cpp.py is one): random weights, made in bf16 right away. Bytes a token are those of the
weights that it meets and of the latents before it; reading is torch's sum over a layer's experts, in the same turns.

    shape=R0|R|R2|1.7B   dtype=fp32|bf16|both   only=b1-c256,b1-c2048,b32-c2048   threads=1   rounds=4   steps=32   parts=false

steps: of a turn at batch 1, an eighth of them at batch 32.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

SETTINGS = {"b1-c256": (1, 256), "b1-c2048": (1, 2048), "b32-c2048": (32, 2048)}
PEERS = {  # name -> attention, experts, whether the cache is allocated once
    "sdpa, grouped_mm": ("sdpa", "grouped_mm", False),
    "sdpa, batched_mm": ("sdpa", "batched_mm", False),
    "sdpa, eager": ("sdpa", "eager", False),
    "eager, grouped_mm": ("eager", "grouped_mm", False),
    "eager, batched_mm": ("eager", "batched_mm", False),
    "sdpa, batched_mm, static": ("sdpa", "batched_mm", True),
}
DEFAULTS = dict(shape="R", dtype="both", only="", threads=1, rounds=4, steps=32, parts=False)


class Clock:
    """Times between tokens; transformers calls `put` with the prompt first, then with each step's ids."""

    def __init__(self, threads: int, prompt: bool) -> None:
        self.read, self.skip = time.process_time if threads == 1 else time.perf_counter, prompt
        self.times: list[float] = []

    def put(self, _) -> None:
        if self.skip:
            self.skip = False
        else:
            self.times.append(self.read())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:])]


def own_paths(dtype) -> list[str]:
    """What MOE_OPS may name for our side; what it does name, if anything."""
    import torch

    from moe import ops

    if os.environ.get("MOE_OPS"):
        return [os.environ["MOE_OPS"]]
    return ["native", "torch"] if ops.path_for(torch.empty(0, dtype=dtype)) == "native" else ["torch"]


def ours(model, prompts: list[list[int]], steps: int, threads: int, path: str) -> tuple[list[float], list[list[int]]]:
    import moe

    clock, last = Clock(threads, prompt=False), len(prompts) - 1
    before = os.environ.get("MOE_OPS")
    os.environ["MOE_OPS"] = path
    try:
        out = moe.generate(model, prompts, steps + 1, stream=lambda i, _: clock.put(None) if i == last else None)
    finally:
        os.environ.pop("MOE_OPS")
        if before is not None:
            os.environ["MOE_OPS"] = before
    return clock.steps(), out.tokens


class Peer:
    """transformers' model, prefilled once a setting: each turn decodes from a copy of that cache."""

    def __init__(self, folder: str, dtype, prompts: list[list[int]], contexts: int, steps: int, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = self.model.generation_config.pad_token_id = None
        self.ids, self.steps, self.threads = torch.tensor(prompts), steps, threads
        self.cache = DynamicCache(config=self.model.config)
        self.model.set_attn_implementation("sdpa")
        self.model.set_experts_implementation("grouped_mm")
        rows = len(prompts) // contexts
        with torch.no_grad():
            self.model(self.ids[::rows, :-1], past_key_values=self.cache, logits_to_keep=1)
        self.cache.batch_repeat_interleave(rows)

    def run(self, attention: str, experts: str, static: bool) -> tuple[list[float], list[list[int]]]:
        import torch

        self.model.set_attn_implementation(attention)
        self.model.set_experts_implementation(experts)
        clock = Clock(self.threads, prompt=True)
        with torch.no_grad():
            out = self.model.generate(
                self.ids, past_key_values=self._static() if static else copy.deepcopy(self.cache), do_sample=False,
                max_new_tokens=self.steps + 1, streamer=clock, attention_mask=torch.ones_like(self.ids),
            )  # fmt: skip
        return clock.steps(), out[:, self.ids.shape[1] :].tolist()

    def _static(self):
        import torch
        from transformers import StaticCache

        length = self.ids.shape[1] - 1
        cache = StaticCache(config=self.model.config, max_cache_len=length + self.steps + 2)
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, layer.values, i, {"cache_position": torch.arange(length)})
        return cache

    def cache_bytes(self) -> float:
        """Bytes of one token over all layers."""
        held = sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))
        return held / (self.ids.shape[0] * (self.ids.shape[1] - 1))


class Result(NamedTuple):
    seconds: dict[str, float]
    """Median seconds of a step of each path; those out of the race after one round."""
    best: str
    cache_bytes: float
    same: dict[str, float]
    """By our path: share of greedy tokens that both chose alike."""


def compare(model, folder: str, setting: str, rounds: int, steps: int, threads: int) -> Result:
    import torch

    batch, context = SETTINGS[setting]
    contexts, steps = min(4, batch), steps if batch == 1 else max(1, steps // 8)
    ids = torch.randint(0, model.config.vocab_size, (contexts, context)).repeat_interleave(batch // contexts, 0)
    ids[:, -1] = torch.randint(0, model.config.vocab_size, (batch,))
    prompts = ids.tolist()
    peer = Peer(folder, model.embed.weight.dtype, prompts, contexts, steps, threads)
    own = own_paths(model.embed.weight.dtype)
    paths: dict[str, Callable] = {path: lambda path=path: ours(model, prompts, steps, threads, path) for path in own}
    paths |= {name: lambda how=how: peer.run(*how) for name, how in PEERS.items()}
    first = {name: run() for name, run in paths.items()}  # warms up, and finds the peers worth timing
    seconds = {name: statistics.median(times) for name, (times, _) in first.items()}
    racing = [*own, *sorted(PEERS, key=seconds.__getitem__)[:2]]
    found: dict[str, list[float]] = {name: [] for name in racing}
    for _ in range(rounds):
        for name in racing:
            found[name] += paths[name]()[0]
    seconds |= {name: statistics.median(times) for name, times in found.items()}
    tokens = {name: made for name, (_, made) in first.items()}
    best = min(racing[len(own) :], key=seconds.__getitem__)
    same = {
        path: sum(a == b for x, y in zip(tokens[path], tokens[best]) for a, b in zip(x, y)) / (batch * (steps + 1))
        for path in own
    }
    return Result(seconds, best, peer.cache_bytes(), same)


def main(shape: str, dtype: str, only: str, threads: int, rounds: int, steps: int, parts: bool) -> None:
    import torch
    from llama_cpp import SHAPES  # noqa: F401  1.7B among them
    from train_step import shape_config

    from moe.parallel import keep_memory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_memory()
    warnings.filterwarnings("ignore")
    config = shape_config(shape)
    config.max_position_embeddings = 4096
    print(f"shape {shape}, {threads} thread(s), {'CPU' if threads == 1 else 'wall'} time, {rounds} interleaved rounds")
    if shape == "1.7B":
        against_memory(config, only.split(",") if only else ["b1-c256", "b1-c2048"], rounds, steps, threads)
    else:
        against_transformers(config, dtype, only.split(",") if only else list(SETTINGS), rounds, steps, threads, parts)


def against_transformers(
    config, dtype: str, settings: list[str], rounds: int, steps: int, threads: int, parts: bool
) -> None:
    import torch

    import moe
    from moe.layers.cache import LatentCache

    transformers_logging()
    model = moe.Transformer(config).eval()
    print(
        "| dtype, setting, our path | ms | tokens/s | transformers ms | ratio | its path | cache bytes: ours, its | same |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("fp32", "bf16") if dtype == "both" else (dtype,):
        model.to(torch.bfloat16 if kind == "bf16" else torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            moe.to_hf(model, folder, mtp=False)
            for setting in settings:
                if parts:
                    profile(model, setting)
                    continue
                r = compare(model, folder, setting, rounds, steps, threads)
                its, held = (
                    r.seconds[r.best],
                    LatentCache.for_model(config, 1, 1, dtype=model.embed.weight.dtype).nbytes,
                )
                for path, same in r.same.items():
                    own = r.seconds[path]
                    print(
                        f"| {kind} {setting} {path} | {own * 1e3:.2f} | {SETTINGS[setting][0] / own:,.0f} | {its * 1e3:.2f} | "
                        f"{its / own:.2f} | {r.best} | {held}, {r.cache_bytes:.0f} | {same:.0%} |",
                        flush=True,
                    )
                others = ", ".join(f"{name} {r.seconds[name] * 1e3:.1f}" for name in PEERS)
                print(f"  transformers, ms: {others}", file=sys.stderr, flush=True)


def random_model(config):
    """Made in bf16: no copy in fp32 ever exists."""
    import torch

    import moe

    torch.set_default_dtype(torch.bfloat16)
    try:
        return moe.Transformer(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def against_memory(config, settings: list[str], rounds: int, steps: int, threads: int) -> None:
    import torch

    from moe.layers.cache import LatentCache

    model = random_model(config)
    weights = 2 * model.num_parameters(active=True)
    held = LatentCache.for_model(config, 1, 1, dtype=torch.bfloat16).nbytes
    whole = model.layers[-1].ffn.experts.w13.data.view(torch.int64)
    read = time.process_time if threads == 1 else time.perf_counter
    print(f"{model.num_parameters() / 1e9:.2f} B parameters, {weights / 2e6:.0f} M active")
    print("| setting, our path | ms | tokens/s | MB a token | GB/s | GB/s of reading alone | share |")
    print("|---|---|---|---|---|---|---|")
    for setting in settings:
        batch, context = SETTINGS[setting]
        prompts = torch.randint(0, config.vocab_size, (batch, context)).tolist()
        paths = own_paths(torch.bfloat16)
        found: dict[str, list[float]] = {path: [] for path in paths}
        speeds = []
        for _ in range(rounds):
            for path in paths:
                found[path] += ours(model, prompts, max(2, steps // 4), threads, path)[0]
            start = read()
            whole.sum()
            speeds.append(whole.numel() * 8 / (read() - start))
        size, speed = weights + held * context, statistics.median(speeds)
        for path in paths:
            own = statistics.median(found[path])
            share = f"{size / 1e6:.0f} | {size / own / 1e9:.1f} | {speed / 1e9:.1f} | {size / own / speed:.0%}"
            share = share if batch == 1 else "| | |"  # tokens of a batch share weights
            print(f"| {setting} {path} | {own * 1e3:.2f} | {batch / own:,.1f} | {share} |", flush=True)


def transformers_logging() -> None:
    """Its progress bars and hints would stand between the rows of the table."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def profile(model, setting: str, steps: int = 8) -> None:
    """Operators of decoding steps by their own time."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as Profiler

    import moe

    batch, context = SETTINGS[setting]
    prompts = torch.randint(0, model.config.vocab_size, (batch, context)).tolist()
    profiler = Profiler(activities=[ProfilerActivity.CPU])
    seen = []

    def stream(i: int, _: int) -> None:
        seen.append(i)
        if len(seen) == batch:  # prefill is over
            profiler.start()

    moe.generate(model, prompts, steps + 1, stream=stream)
    profiler.stop()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=28, max_name_column_width=40))


def parse(argv: list[str]) -> dict:
    """key=value words; a mistake ends with one line and exit code 2."""
    from moe.config import UserError, nearest

    chosen = dict(DEFAULTS)
    allowed = {"shape": ["R0", "R", "R2", "1.7B"], "dtype": ["fp32", "bf16", "both"], "parts": ["true", "false"]}
    for word in argv:
        key, eq, value = word.partition("=")
        if not eq or key not in DEFAULTS:
            raise UserError(f"{word!r} is not one of {', '.join(f'{k}=...' for k in DEFAULTS)}{nearest(key, DEFAULTS)}")
        if value not in allowed.get(key, [value]):
            raise UserError(f"{key}={value} is not one of {allowed[key]}")
        if key == "only" and (unknown := [name for name in value.split(",") if name not in SETTINGS]):
            raise UserError(f"only={value}: {unknown[0]!r} is not one of {list(SETTINGS)}")
        if isinstance(DEFAULTS[key], int) and key != "parts" and not (value.isdigit() and int(value)):
            raise UserError(f"{key}={value} must be a whole number of at least 1")
        chosen[key] = value == "true" if key == "parts" else type(DEFAULTS[key])(value)
    return chosen


if __name__ == "__main__":
    from moe.train.log import entry

    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
    else:
        entry(lambda: main(**parse(sys.argv[1:])))
