"""Reinforcement learning with GRPO on a task whose answers can be checked.

    torchrun --standalone recipes/grpo.py                     # sort: a gated cold start, then GRPO, minutes on two cores
    torchrun --standalone recipes/grpo.py init=runs/sft-...   # from any run; fine-tuned first if it fails the gate
    python recipes/grpo.py --help

The order is the paper's (DeepSeek-V3, arXiv 2412.19437, section 5): fine-tuning to start from, then groups of answers,
their rewards, and the policy moved towards the better ones. The loss column is not shown: on-policy it is 0 by
construction. Watch the reward.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: two threads that spin starve each other (docs/benchmarks.md)

from pathlib import Path

from moe import config, parallel
from moe.objectives import OBJECTIVES
from moe.rl.grpo import Grpo
from moe.rl.start import answer_room, cold_start, dry_run, header, report
from moe.train import engine as engines
from moe.train import summary
from moe.train.finetune import make_model, make_task, make_tokenizer
from moe.train.log import entry
from moe.train.pretrained import model_values
from moe.train.run_folder import finished, open_run, refuse_another

DEFAULT = str(Path(__file__).parent / "configs" / "grpo.yaml")
SFT = str(Path(__file__).parent / "configs" / "sft.yaml")


def main() -> None:
    cfg = config.load(config.GrpoRecipe, default_file=DEFAULT, init_model=model_values)
    run_dir = cfg.run.dir or f"runs/grpo-{cfg.model.name}-{config.fingerprint(cfg)}"
    if done := finished(cfg, run_dir):
        return summary.say_finished(run_dir, done)
    refuse_another(cfg, run_dir)
    task = make_task(cfg)
    tokenizer = make_tokenizer(cfg, task, cfg.run.init)
    with parallel.session(cfg.train) as ranks:
        room = answer_room(cfg, task, tokenizer, ranks.world)
        if cfg.run.dry_run:
            return dry_run(cfg, room, run_dir)
        start = cold_start(cfg, task, tokenizer, SFT, run_dir, ranks)
        objective = OBJECTIVES["grpo"].from_config(make_model(cfg, start), cfg.grpo, room)
        engine = engines.build(objective, cfg.optim, cfg.train, ranks)
        folder = open_run(cfg, run_dir, tokenizer=tokenizer.text)
        trainer = Grpo(cfg, ranks, folder, engine, task, tokenizer, room)
        header(trainer, start)
        report(trainer, trainer.fit())


if __name__ == "__main__":
    entry(main)
