"""A Hugging Face model with our experts against the same model with transformers' own.

    python tools/bench/hf_experts.py                       # Qwen3-MoE, random weights, fp32 and bf16, one thread
    python tools/bench/hf_experts.py dtype=bf16 experts=64 threads=2 rounds=9
    python tools/bench/hf_experts.py device=cuda hidden=2048 width=768 experts=128 rows=8 time=1024

One model, whose experts implementation is switched between turns, so that a machine whose speed drifts slows all of them
alike: quote the ratios. train: forward, loss and backward. decode: greedy steps after a prompt of 128 tokens, batch 1.
With one thread on a CPU the figure is CPU seconds, which holds even beside other work; otherwise it is wall seconds.

    dtype=fp32|bf16|both   hidden=256 width=64 experts=128 top_k=8 layers=4   rows=8 time=256   steps=16   rounds=5
    threads=1   device=cpu|cuda
"""

from __future__ import annotations

import os
import statistics
import sys
import time as clock
from collections.abc import Callable

THEIRS = {"train": ("eager", "grouped_mm"), "decode": ("eager", "grouped_mm", "batched_mm")}
DEFAULTS = dict(
    dtype="both", hidden=256, width=64, experts=128, top_k=8, layers=4, rows=8, time=256, steps=16, rounds=5, threads=1,
    device="cpu",
)  # fmt: skip


def build(c: dict):
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=c["hidden"], intermediate_size=4 * c["width"], moe_intermediate_size=c["width"],
        num_hidden_layers=c["layers"], num_attention_heads=8, num_key_value_heads=2, head_dim=max(32, c["hidden"] // 8),
        num_experts=c["experts"], num_experts_per_tok=c["top_k"], norm_topk_prob=True, max_position_embeddings=4096,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(c["device"])


def training(model, tokens) -> Callable[[], None]:
    def run() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def decoding(model, tokens, steps: int) -> Callable[[], None]:
    import torch

    with torch.no_grad():
        filled = model(tokens[:1, :128], use_cache=True).past_key_values
    last = tokens[:1, :1]

    @torch.no_grad()
    def run() -> None:
        token = last
        for _ in range(steps):
            token = model(token, past_key_values=filled, use_cache=True).logits[:, -1:].argmax(-1)
        filled.crop(-steps)

    return run


def turns(model, run: Callable[[], None], names: list[str], c: dict) -> dict[str, float]:
    """Median seconds of `run` by each implementation; the first round warms up."""
    import torch

    read = clock.process_time if c["threads"] == 1 and c["device"] == "cpu" else clock.perf_counter
    wait = torch.cuda.synchronize if c["device"] == "cuda" else lambda: None
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(c["rounds"] + 1):
        for name in names:
            model.set_experts_implementation(name)
            wait()
            start = read()
            run()
            wait()
            found[name].append(read() - start)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def main(**c) -> None:
    import torch

    from moe.interop import hf_experts
    from moe.parallel import keep_memory

    torch.set_num_threads(c["threads"])
    keep_memory()  # for all of them: without it page faults hide the arithmetic
    ours, model = hf_experts.register(), build(c)
    tokens = torch.randint(0, 4096, (c["rows"], c["time"]), device=c["device"])
    print(", ".join(f"{key}={value}" for key, value in c.items()))
    print("| dtype, work | ours, ms | eager / ours | grouped_mm / ours | batched_mm / ours |")
    print("|---|---|---|---|---|")
    for dtype in ("fp32", "bf16") if c["dtype"] == "both" else (c["dtype"],):
        model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        for work, theirs in THEIRS.items():
            run = training(model.train(), tokens) if work == "train" else decoding(model.eval(), tokens, c["steps"])
            seconds = turns(model, run, [ours, *theirs], c)
            own, each = seconds[ours], 1 if work == "train" else c["steps"]
            ratios = (f"{seconds[n] / own:.2f}" if n in seconds else "" for n in THEIRS["decode"])
            print(f"| {dtype} {work} | {own / each * 1e3:.1f} | {' | '.join(ratios)} |", flush=True)


def parse(argv: list[str]) -> dict:
    """key=value words; a mistake ends with one line and exit code 2."""
    from moe.config import UserError, nearest

    chosen, allowed = dict(DEFAULTS), {"dtype": ["fp32", "bf16", "both"], "device": ["cpu", "cuda"]}
    for word in argv:
        key, eq, value = word.partition("=")
        if not eq or key not in DEFAULTS:
            raise UserError(f"{word!r} is not one of {', '.join(f'{k}=...' for k in DEFAULTS)}{nearest(key, DEFAULTS)}")
        if value not in allowed.get(key, [value]):
            raise UserError(f"{key}={value} is not one of {allowed[key]}")
        if key not in allowed and not (value.isdigit() and int(value)):
            raise UserError(f"{key}={value} must be a whole number of at least 1")
        chosen[key] = value if key in allowed else int(value)
    if chosen["top_k"] > chosen["experts"] or chosen["time"] < 128:
        raise UserError(
            "top_k may not exceed experts, and time must be at least 128 (decoding starts from that many tokens)"
        )
    return chosen


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from moe.train.log import entry

    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
    else:
        entry(lambda: main(**parse(sys.argv[1:])))
