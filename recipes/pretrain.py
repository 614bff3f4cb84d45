"""Pretrain a DeepSeek-V3-style model.

    torchrun --standalone recipes/pretrain.py                                   # tiny, embedded text, about 5 minutes
    torchrun --standalone recipes/pretrain.py config=recipes/configs/small.yaml data.path=my_texts/
    python recipes/pretrain.py --help

The order is the paper's (arXiv 2412.19437): data (4.1), model (2), recipe (4.2), and what came of it.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: two threads that spin starve each other (docs/benchmarks.md)

from pathlib import Path

import torch

from moe import Transformer, config, parallel
from moe.analysis.ceiling import peak_flops
from moe.data import prepare
from moe.objectives import OBJECTIVES
from moe.train import engine as engines
from moe.train import summary
from moe.train.log import entry
from moe.train.run_folder import finished, open_run
from moe.train.trainer import Trainer

DEFAULT = str(Path(__file__).parent / "configs" / "tiny.yaml")


def main() -> None:
    cfg = config.load(config.PretrainConfig, default_file=DEFAULT)
    run_dir = cfg.run.dir or f"runs/pretrain-{cfg.model.name}-{config.fingerprint(cfg)}"
    if cfg.run.dry_run:
        return summary.dry_run(cfg, run_dir)
    if done := finished(cfg, run_dir):
        return summary.say_finished(run_dir, done)
    with parallel.session(cfg.train) as ranks:
        ranks.check_rows(cfg.rows, cfg.data.seq_len)
        corpus = prepare(cfg.data, cfg.model.vocab_size, ranks.rank, ranks.barrier, cfg.train.seed)
        torch.manual_seed(cfg.train.seed)
        model = Transformer(cfg.model)
        objective = OBJECTIVES["pretrain"](model, cfg.model.balance)
        engine = engines.build(objective, cfg.optim, cfg.train, ranks)
        folder = open_run(cfg, run_dir, {"corpus": corpus.card}, corpus.tokenizer.text)
        peak = peak_flops(ranks.device, engine.dtype)
        trainer = Trainer(cfg, ranks, folder, corpus, engine, peak.flops)
        summary.header(trainer, peak)
        record = trainer.fit()
        summary.report(trainer, record)


if __name__ == "__main__":
    entry(main)
