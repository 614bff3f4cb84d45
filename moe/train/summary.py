"""What a run says before and after: header, dry run, and at the end the sample, the pictures, the export, the figures.

summary.json is written last and marks a run as finished: its command says so and changes nothing. Not here: what a run
says on its way (log.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from moe import ops
from moe.analysis import ceiling, chart, planner
from moe.data import Corpus, sources
from moe.files import replace
from moe.inference.decoding import generate
from moe.interop.hf import to_hf
from moe.model import Transformer
from moe.parallel import Ranks, cores
from moe.train.engine import Engine
from moe.train.evaluate import evaluate
from moe.train.log import accuracies, is_leader, read_metrics
from moe.train.trainer import Trainer

PROMPTS = ["def forward(self, x):\n", "import torch\n", "class Linear(Module):\n"]
USUAL_MFU = 0.14  # share of the measured ceiling that the default run reaches on two cores (docs/benchmarks.md)


def say_finished(run_dir: str | Path, summary: dict[str, Any]) -> None:
    if is_leader():
        figures = accuracies(summary) or f"validation {summary['val/bpb']:.4f} bits/byte"
        print(
            f"{run_dir} is finished: step {summary['step']}, {figures}. Nothing to do; "
            "train.seed=1 or another run.dir=... starts a new run."
        )


def dry_run(cfg: Any, run_dir: str | Path) -> None:
    """Size, memory and expected time; builds and writes nothing."""
    if not is_leader():
        return
    c, world = cfg, int(os.environ.get("WORLD_SIZE", 1))
    cuda = c.train.device != "cpu" and torch.cuda.is_available()
    dtype = torch.float32 if c.train.precision == "fp32" else torch.bfloat16
    path = "triton" if cuda else ops.path_for(torch.empty(0, dtype=dtype))
    plan = planner.plan(
        c.model, c.data.seq_len, c.train.batch_tokens, c.train.micro_batch_size, c.train.precision,
        c.train.activation_checkpointing, path, world_size=world, recompute_z=c.train.recompute_z,
    )  # fmt: skip
    with torch.device("meta"):
        Transformer(c.model)  # unknown attentions and routers are told here too; no memory is taken
    print(planner.table(plan))
    print("memory counts tensors; Python, torch and what the allocator keeps come on top (`tiny`: 0.3 becomes 1.1 GB)")
    peak = ceiling.peak_flops("cuda" if cuda else "cpu", dtype, c.train.threads or cores())
    seconds = plan.flops.training * c.train.batch_tokens * c.train.steps / (peak.flops * world * USUAL_MFU)
    print(
        f"\n{c.train.steps} steps of {c.train.batch_tokens:,} tokens: about {_duration(seconds)} at {USUAL_MFU:.0%} of "
        f"{peak.flops / 1e9:,.0f} GFLOP/s ({peak.source}){f' on each of {world} ranks' if world > 1 else ''}"
        f"\nrun folder: {run_dir} (not created: dry run)"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def described(model: Transformer) -> str:
    """`tiny: 256 routed + 1 shared experts, top-8; 7.7 M parameters, 1.1 M active`"""
    c = model.config
    experts = (
        f"{c.n_routed_experts} routed + {c.n_shared_experts} shared experts, top-{c.num_experts_per_tok}"
        if c.n_routed_experts
        else f"dense, feed-forward width {c.intermediate_size}"
    )
    total, active = model.num_parameters(), model.num_parameters(active=True)
    return f"{c.name}: {experts}; {planner.si(total)} parameters, {planner.si(active)} active"


def kernels(engine: Engine) -> dict[str, str]:
    """A row of the header: which kernels answer."""
    answer = ops.answer(engine.ranks.device, engine.dtype)
    on_gpu = engine.ranks.device.type != "cpu"
    return {"kernels": f"experts by {answer}; attention: {engine.attention}" if on_gpu else answer}


def header(trainer: Trainer, peak: ceiling.Peak) -> None:
    """One block: what trains on what, where, and for how long."""
    cfg, model, card = trainer.cfg, trainer.model, trainer.corpus.card
    c, ranks = cfg.model, trainer.ranks
    mtp = model.num_parameters(mtp=True) - model.num_parameters()
    flops = planner.mfu_flops(c, cfg.data.seq_len)
    seconds = flops * cfg.train.batch_tokens * cfg.train.steps / (peak.flops * ranks.world * USUAL_MFU)
    precision = cfg.train.precision
    if precision == "fp8":
        precision = f"fp8 simulated over bf16 with {cfg.train.fp8_scales} scales"
    device = f"{torch.get_num_threads()} CPU threads" if ranks.device.type == "cpu" else torch.cuda.get_device_name()
    trainer.console.header({
        "model": f"{described(model)}, MTP {planner.si(mtp)} apart",
        "corpus": f"{card['name']} ({card['fingerprint']}), {planner.si(card['tokens']['train'])} training tokens",
        "tokenizer": f"{cfg.data.tokenizer} ({card['tokenizer']}), vocabulary {card['vocab_size']}",
        "device": f"{device}, {precision}, {ranks.world} rank(s); ceiling {peak.flops / 1e9:,.0f} GFLOP/s "
        f"({peak.source})",
        **kernels(trainer.engine),
        "work": f"{cfg.train.steps} steps of {cfg.train.batch_tokens:,} tokens, {planner.si(flops, 'FLOP')} a token; "
        f"about {_duration(seconds)} of training, validation apart",
        "folder": str(trainer.folder.path),
    })  # fmt: skip
    floor = trainer.corpus.baselines(trainer.subset)
    trainer.console.line(
        f"to beat, bits/byte on the same {trainer.subset.tokens:,} tokens: unigram {floor.unigram_bpb:.3f}, "
        f"interpolated bigram {floor.bigram_bpb:.3f}"
    )


def report(trainer: Trainer, record: dict[str, Any]) -> None:
    """Sample, pictures, export, figures; then summary.json. Rank 0 works, the others wait."""
    with trainer.engine.gathered() as model:
        if trainer.ranks.first:
            _report(trainer, model, record)
    trainer.ranks.barrier()


def _report(trainer: Trainer, model: Transformer, record: dict[str, Any]) -> None:
    cfg, folder, corpus, console = trainer.cfg, trainer.folder, trainer.corpus, trainer.console
    records = read_metrics(folder.metrics)
    record = record or records[-1]
    held_out = corpus.evaluation()
    floor = corpus.baselines(held_out)
    anchors = {"unigram": floor.unigram_bpb, "bigram": floor.bigram_bpb}
    chart.loss_curves({cfg.model.name: records}, folder.path / "loss.svg", anchors)
    if trainer.loads:
        chart.expert_heat({k: v.tolist() for k, v in trainer.loads.items()}, folder.path / "experts.svg")
    text = sample(model, corpus, cfg.data.path is None)
    replace(folder.path / "sample.txt", text)
    console.line(f"\nsample (temperature 0.7):\n{text}\n")
    if cfg.train.export:
        to_hf(model, folder.export, tokenizer=corpus.tokenizer)
    kept = ("step", "train/tokens", "perf/seconds")
    summary = {k: v for k, v in record.items() if k in kept or k.startswith("val/")}
    summary |= {"unigram_bpb": floor.unigram_bpb, "bigram_bpb": floor.bigram_bpb, "val_tokens": held_out.tokens}
    if cfg.data.path is None:
        summary |= _unseen(trainer)
    replace(folder.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    lines = {
        "validation": f"{record['val/bpb']:.4f} bits/byte on all {held_out.tokens:,} tokens "
        f"(unigram {floor.unigram_bpb:.3f}, bigram {floor.bigram_bpb:.3f})",
        "unseen": ", ".join(f"{k.removesuffix('_bpb')} {summary[k]:.3f}" for k in ("stdlib_bpb", "english_bpb") if k in summary),
        "metrics": folder.metrics,
        "pictures": f"{folder.path}/loss.svg, experts.svg" if trainer.loads else f"{folder.path}/loss.svg",
        "checkpoint": folder.checkpoints,
        "export": folder.export if cfg.train.export else "",
    }
    console.header({k: v for k, v in lines.items() if v})


def _unseen(trainer: Trainer) -> dict[str, float]:
    """Bits a byte of text that no training file resembles: other people's code, and English."""
    alone = Ranks(0, 1, trainer.ranks.device)
    figures = {}
    for name, documents in (("stdlib", sources.unseen_code()), ("english", sources.unseen_english())):
        if documents:
            held_out = trainer.corpus.evaluation(trainer.cfg.train.eval_tokens, trainer.corpus.rows(documents))
            score = evaluate(trainer.objective, held_out, trainer.cfg.train.micro_batch_size, alone)
            figures[f"{name}_bpb"] = score.bpb
    return figures


def sample(model: Transformer, corpus: Corpus, code: bool) -> str:
    """Continuations of fixed prompts, or for text of the user's own of held-out beginnings."""
    tokenizer = corpus.tokenizer
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    if code:
        prompts = [bos + tokenizer.encode(text) for text in PROMPTS]
    else:
        prompts = corpus.val.take(0, 1).tokens[:, :12].tolist()
    room = model.config.max_position_embeddings - max(map(len, prompts))
    drawn = generate(model, prompts, min(64, room), temperature=0.7, eos=tokenizer.eos)
    return "\n---\n".join(tokenizer.decode(p + new, skip_special=True) for p, new in zip(prompts, drawn.tokens, strict=True))

