"""What a configuration costs before it runs: size, FLOPs, cache, memory, tokens an expert, its dense twin.

    python tools/plan.py v3-671b data.seq_len=4096
    python tools/plan.py config=recipes/configs/tiny.yaml train.precision=bf16 --json

PRESET [config=FILE] [key=value ...]. The knobs are those of pretraining (--help lists them): model.* gives the shape,
data.seq_len the row, train.batch_tokens the step, train.micro_batch_size the pass. No model is built.
"""

from __future__ import annotations

import json
import sys

import torch

from moe import ops
from moe.analysis import planner
from moe.config import PretrainConfig, describe, load
from moe.train.log import entry


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        return print(f"{__doc__}\n{describe(PretrainConfig)}")
    words = [arg for arg in argv if arg != "--json"]
    # a word without = is the preset
    words = [arg if "=" in arg or arg.startswith("-") else f"model.preset={arg}" for arg in words]
    cfg = load(PretrainConfig, words)
    on_gpu = cfg.train.device == "cuda" or (cfg.train.device == "auto" and torch.cuda.is_available())
    dtype = torch.float32 if cfg.train.precision == "fp32" else torch.bfloat16
    path = "triton" if on_gpu else ops.path_for(torch.empty(0, dtype=dtype))
    plan = planner.plan(
        cfg.model, cfg.data.seq_len, cfg.train.batch_tokens, cfg.train.micro_batch_size, cfg.train.precision,
        cfg.train.activation_checkpointing, path, recompute_z=cfg.train.recompute_z,
    )  # fmt: skip
    print(json.dumps(plan.to_dict(), indent=1) if "--json" in argv else planner.table(plan))


if __name__ == "__main__":
    entry(lambda: main(sys.argv[1:]))
