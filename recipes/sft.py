"""Fine-tune on demonstrations or on your own samples, the loss on answers only.

    torchrun --standalone recipes/sft.py                          # tiny-rl learns to sort digits from 300 demonstrations
    torchrun --standalone recipes/sft.py config=recipes/configs/sft_chat.yaml init=runs/tiny data.path=chats.jsonl
    python recipes/sft.py --help

Source: DeepSeek-V3 (arXiv 2412.19437) section 5.1: samples packed but masked from each other.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: two threads that spin starve each other (docs/benchmarks.md)

from pathlib import Path

from moe import config, parallel
from moe.train import summary
from moe.train.finetune import finetune
from moe.train.log import entry
from moe.train.pretrained import model_values
from moe.train.run_folder import finished

DEFAULT = str(Path(__file__).parent / "configs" / "sft.yaml")


def main() -> None:
    cfg = config.load(config.FinetuneConfig, default_file=DEFAULT, init_model=model_values)
    run_dir = cfg.run.dir or f"runs/sft-{cfg.model.name}-{config.fingerprint(cfg)}"
    if cfg.run.dry_run:
        return summary.dry_run(cfg, run_dir)
    if done := finished(cfg, run_dir):
        return summary.say_finished(run_dir, done)
    with parallel.session(cfg.train) as ranks:
        finetune(cfg, run_dir, ranks)


if __name__ == "__main__":
    entry(main)
