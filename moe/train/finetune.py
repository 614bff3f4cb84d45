"""Supervised fine-tuning: demonstrations of a task or samples of a file, loss on answers only, perhaps up to a gate.

Samples are packed and isolated from each other (DeepSeek-V3, arXiv 2412.19437, section 5.1). Where the samples come from
a task, held-out problems are solved along the way, and `sft.gate` ends the run once pass@1 reaches it: what follows
(GRPO) depends on that more than on the number of steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moe.analysis import chart
from moe.analysis.ceiling import Peak, peak_flops
from moe.config import FinetuneConfig, UserError, nearest
from moe.data.samples import prepare_samples
from moe.data.tasks import TASKS, Task, encode_answer
from moe.data.tokenizer import Tokenizer, check_fits
from moe.files import replace
from moe.inference.accuracy import task_accuracy
from moe.interop.hf import to_hf
from moe.model import Transformer
from moe.objectives import OBJECTIVES
from moe.parallel import Ranks
from moe.train import engine as engines
from moe.train import summary
from moe.train.log import accuracies, read_metrics
from moe.train.pretrained import load_tokenizer, start_from
from moe.train.run_folder import RunFolder, open_run
from moe.train.trainer import Trainer

GATE_PROBLEMS, GATE_SAMPLES = 256, 2  # answers behind one look at the gate: a standard error of 2 to 3 points


def make_task(cfg: Any) -> Task:
    """The task of a configuration's `task` section."""
    if cfg.task.name not in TASKS:
        raise UserError(f"task.name={cfg.task.name!r} is not one of {list(TASKS)}{nearest(cfg.task.name, TASKS)}")
    return TASKS[cfg.task.name](cfg.task)


def make_tokenizer(cfg: Any, task: Task | None, start: str | Path | None) -> Tokenizer:
    """That of the folder to start from; else one id a character of the task."""
    if start:
        if getattr(getattr(cfg, "data", None), "tokenizer", "train") != "train":
            raise UserError(f"data.tokenizer={cfg.data.tokenizer} beside init={start}: a model keeps its own; leave one out")
        return load_tokenizer(start)
    if task is not None:
        return Tokenizer.characters(task.alphabet)
    if cfg.data.tokenizer == "train":
        raise UserError("data.path without init needs data.tokenizer=FILE; or start from a run: init=runs/...")
    return Tokenizer.load(cfg.data.tokenizer)


def make_model(cfg: Any, start: str | Path | None) -> Transformer:
    """Fresh from train.seed, or with the weights of a folder."""
    torch.manual_seed(cfg.train.seed)
    model = Transformer(cfg.model)
    if start:
        start_from(model, start)
    return model


class Finetuner(Trainer):
    """A Trainer on a SampleCorpus that also solves held-out problems of its task."""

    def train_step(self) -> dict[str, Any]:
        record, s = super().train_step(), self.cfg.sft
        if self.corpus.task and s.gate and self.step % s.gate_every == 0:
            figures = self._accuracy(GATE_PROBLEMS, GATE_SAMPLES)
            self.satisfied = figures["val/pass@1"] >= s.gate
            record["gate/pass@1"] = figures["val/pass@1"]
        return record

    def validate(self, last: bool) -> dict[str, Any]:
        figures = super().validate(last)
        return figures | (self._accuracy(None, 8) if self.corpus.task else {})

    def _accuracy(self, problems: int | None, samples: int) -> dict[str, float]:
        task, tokenizer = self.corpus.task, self.corpus.tokenizer
        room = max(len(encode_answer(p, tokenizer)) for p in task.held_out())
        with self.engine.gathered() as model:
            return task_accuracy(
                model, tokenizer, task, task.held_out()[:problems], samples, room, self.ranks
            ).figures

    def before(self, figures: dict[str, Any]) -> None:
        super().before(figures)
        if self.corpus.task:
            self.console.line("before: " + accuracies(figures))


def finetune(cfg: FinetuneConfig, run_dir: str | Path, ranks: Ranks) -> RunFolder:
    """The whole stage in one folder; a finished one is left as it is."""
    ranks.check_rows(cfg.rows, cfg.data.seq_len)
    task = None if cfg.data.path else make_task(cfg)
    tokenizer = make_tokenizer(cfg, task, cfg.run.init)
    check_fits(tokenizer, cfg.model.vocab_size, cfg.run.init or cfg.data.tokenizer)
    corpus = prepare_samples(task, cfg.data, cfg.sft, tokenizer, cfg.train.seed, ranks.rank)
    model = make_model(cfg, cfg.run.init)
    engine = engines.build(OBJECTIVES["sft"](model, cfg.model.balance), cfg.optim, cfg.train, ranks)
    folder = open_run(cfg, run_dir, {"corpus": corpus.card}, tokenizer.text)
    peak = peak_flops(ranks.device, engine.dtype)
    trainer = Finetuner(cfg, ranks, folder, corpus, engine, peak.flops)
    header(trainer, peak)
    report(trainer, trainer.fit())
    return folder


def header(trainer: Finetuner, peak: Peak) -> None:
    cfg, card = trainer.cfg, trainer.corpus.card
    start = f"from {cfg.run.init}" if cfg.run.init else "from scratch"
    gate = f", until pass@1 reaches {cfg.sft.gate:.0%}" if cfg.sft.gate and trainer.corpus.task else ""
    trainer.console.header({
        "model": f"{summary.described(trainer.model)}, {start}",
        "samples": f"{card['name']}: {card['docs']['train']:,} for training, {card['docs']['val']:,} held out",
        **summary.kernels(trainer.engine),
        "work": f"at most {cfg.train.steps} steps of {cfg.train.batch_tokens:,} tokens{gate}",
        "folder": str(trainer.folder.path),
    })  # fmt: skip


def report(trainer: Finetuner, record: dict[str, Any]) -> None:
    """Picture, export, figures; summary.json last."""
    cfg, folder = trainer.cfg, trainer.folder
    with trainer.engine.gathered() as model:
        if trainer.ranks.first:
            records = read_metrics(folder.metrics)
            record = record or records[-1]
            chart.loss_curves({cfg.model.name: records}, folder.path / "loss.svg")
            if cfg.train.export:
                to_hf(model, folder.export, tokenizer=trainer.corpus.tokenizer)
            kept = ("step", "train/tokens", "perf/seconds")
            figures = {k: v for k, v in record.items() if k in kept or k.startswith("val/")}
            figures |= {"gate_reached": trainer.satisfied} if cfg.sft.gate and trainer.corpus.task else {}
            replace(folder.path / "summary.json", json.dumps(figures, indent=2) + "\n")
            done = accuracies(record) or f"loss {record['val/loss']:.4f} on held-out answers"
            trainer.console.header(
                {"held out": done, "seconds": f"{record['perf/seconds']:.0f}", "folder": str(folder.path)}
            )
    trainer.ranks.barrier()
