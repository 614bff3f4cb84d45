"""Before and after reinforcement learning: the gated cold start, the header, and the report at the end.

GRPO strengthens what a policy sometimes does; from a start below about 12 % pass@1 its gradient is mostly noise
(docs/post_training.md). So a model from scratch is first fine-tuned on a few demonstrations until it passes a gate on accuracy,
not on steps.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from moe.analysis import chart
from moe.config import FinetuneConfig, GrpoRecipe, UserError, load, nearest
from moe.data.tasks import Task, encode_answer, encode_prompt
from moe.data.tokenizer import Tokenizer, check_fits
from moe.files import replace
from moe.inference.accuracy import task_accuracy
from moe.interop.hf import to_hf
from moe.model import Transformer
from moe.objectives.reinforcement import check_loss
from moe.parallel import Ranks
from moe.rl.grpo import Grpo
from moe.rl.rewards import REWARDS
from moe.train import summary
from moe.train.finetune import finetune
from moe.train.log import accuracies, is_leader, read_metrics
from moe.train.pretrained import load_model
from moe.train.run_folder import finished


def answer_room(cfg: GrpoRecipe, task: Task, tokenizer: Tokenizer, world: int = 1) -> int:
    """Longest answer in tokens; and everything about prompts and rewards that can be told before a model is built."""
    g = cfg.grpo
    if g.prompts < world:
        raise UserError(f"grpo.prompts={g.prompts} is less than the {world} ranks; raise it, or start fewer")
    if g.reward not in REWARDS:
        raise UserError(f"grpo.reward={g.reward!r} is not one of {list(REWARDS)}{nearest(g.reward, REWARDS)}")
    check_fits(tokenizer, cfg.model.vocab_size, cfg.run.init or "the task's characters")
    prompt = max(len(encode_prompt(p, tokenizer)) for p in task.held_out())
    answer = max(len(encode_answer(p, tokenizer)) for p in task.held_out())
    room = g.max_new_tokens or answer + answer // 4
    if prompt + room > cfg.model.max_position_embeddings:
        raise UserError(
            f"grpo.max_new_tokens={room} after prompts of {prompt} tokens exceeds model.max_position_embeddings="
            f"{cfg.model.max_position_embeddings}; lower it, or task.max_length"
        )
    check_loss(g, room)
    return room


def cold_start(
    cfg: GrpoRecipe, task: Task, tokenizer: Tokenizer, defaults: str, run_dir: str | Path, ranks: Ranks
) -> Path | None:
    """The folder to start from: run.init where that model passes the gate, else a fine-tuned one inside the run folder.

    None: random weights (grpo.cold_start=0 and no run.init).
    """
    gate, init = cfg.grpo.cold_start, cfg.run.init
    if not gate or (init and _passes(cfg, task, tokenizer, ranks)):
        return Path(init) if init else None
    sft: FinetuneConfig = load(FinetuneConfig, [], defaults)
    sft.model, sft.task, sft.log = cfg.model, cfg.task, cfg.log
    shared = ("seed", "device", "threads", "ops", "keep_memory", "zero_stage", "health_check")
    sft.train = dataclasses.replace(sft.train, **{name: getattr(cfg.train, name) for name in shared}, export=False)
    sft.sft = dataclasses.replace(sft.sft, gate=gate)
    sft.run = dataclasses.replace(sft.run, init=init)
    folder = Path(run_dir) / "cold_start"
    if finished(sft, folder) is None:
        finetune(sft, folder, ranks)
    done = finished(sft, folder) or {}
    if is_leader() and not done.get("gate_reached", True):
        print(
            f"warning: the cold start ended at pass@1 {done['val/pass@1']:.1%}, below grpo.cold_start={gate:.0%}; more "
            "task.demonstrations or smaller problems (task.max_length) make it easier"
        )
    return folder


def _passes(cfg: GrpoRecipe, task: Task, tokenizer: Tokenizer, ranks: Ranks) -> bool:
    """Whether run.init solves enough problems, its standard error in its favour."""
    model = load_model(cfg.run.init).model.to(ranks.device)
    room = answer_room(cfg, task, tokenizer)
    found = task_accuracy(model, tokenizer, task, task.held_out()[:256], 4, room, ranks).figures
    passes = found["val/pass@1"] + 2 * found["val/pass@1_se"] >= cfg.grpo.cold_start
    if is_leader():
        verdict = "enough" if passes else "fine-tuning on demonstrations first"
        print(f"{cfg.run.init}: pass@1 {found['val/pass@1']:.1%} for a gate of {cfg.grpo.cold_start:.0%}: {verdict}")
    return passes


def dry_run(cfg: GrpoRecipe, room: int, run_dir: str | Path) -> None:
    """Size and work; builds and writes nothing."""
    if not is_leader():
        return
    with torch.device("meta"):
        model = Transformer(cfg.model)
    g = cfg.grpo
    print(
        f"{summary.described(model)}\n{cfg.train.steps} steps of {g.prompts} prompts x {g.group_size} answers of up to {room} "
        f"tokens, {g.updates} updates each; start: {cfg.run.init or 'a cold start'}, gate {g.cold_start:.0%}\n"
        f"run folder: {run_dir} (not created: dry run)"
    )


def header(trainer: Grpo, start: str | Path | None) -> None:
    cfg = trainer.cfg
    g = cfg.grpo
    trainer.console.header({
        "model": f"{summary.described(trainer.model)}, from {start or 'scratch'}",
        "task": f"{cfg.task.name}, sizes {cfg.task.min_length} to {cfg.task.max_length}; reward {g.reward}; "
        f"{len(trainer.held_out)} problems held out",
        "work": f"{cfg.train.steps} steps of {g.prompts} prompts x {g.group_size} answers, {g.updates} updates each; "
        f"loss {g.loss}, advantage by {g.advantage} std, replay {'on' if g.replay else 'off'}",
        "folder": str(trainer.folder.path),
    })  # fmt: skip


def report(trainer: Grpo, record: dict[str, Any]) -> None:
    """Picture, export, figures before and after; summary.json last."""
    cfg, folder = trainer.cfg, trainer.folder
    with trainer.engine.gathered() as model:
        if trainer.ranks.first:
            records = read_metrics(folder.metrics)
            record = record or records[-1]
            chart.accuracy_curves({cfg.model.name: [{"step": 0, "perf/seconds": 0.0, **trainer.start}, *records]},
                                  folder.path / "accuracy.svg")  # fmt: skip
            if cfg.train.export:
                to_hf(model, folder.export, tokenizer=trainer.tokenizer)
            after = {k: v for k, v in record.items() if k.startswith("val/")}
            figures = {"step": record["step"], "train/rollouts": record["train/rollouts"],
                       "perf/seconds": record["perf/seconds"], **after,
                       "before": trainer.start}  # fmt: skip
            replace(folder.path / "summary.json", json.dumps(figures, indent=2) + "\n")
            trainer.console.header({
                "before": accuracies(trainer.start),
                "after": accuracies(record),
                "work done": f"{record['train/rollouts']:,} answers in {record['perf/seconds']:.0f} s",
                "picture": str(folder.path / "accuracy.svg"),
                "folder": str(folder.path),
            })  # fmt: skip
    trainer.ranks.barrier()
