"""Training on tokens, pretraining and fine-tuning alike: micro-batches, one step, balance, and the figures of both.

Data position, tokens seen and schedules follow from the step number; the state besides it is the counters of the health
check and the recent load of the experts. Not here: when to log, validate and save (loop.py), the data (data/).
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from moe.analysis import diagnostics, planner
from moe.config import PretrainConfig, value_at
from moe.data import Corpus
from moe.data.samples import SampleCorpus
from moe.layers.balance import State, routers
from moe.objectives import count_targets
from moe.parallel import Ranks
from moe.train import checkpoint
from moe.train.engine import Engine
from moe.train.evaluate import Score, evaluate
from moe.train.log import RunFolder
from moe.train.loop import Loop, add, leaves
from moe.train.optim import learning_rate


class Trainer(Loop):
    """The loop over a corpus's rows: `cfg.train.batch_tokens` a step, over all ranks."""

    def __init__(
        self, cfg: PretrainConfig, ranks: Ranks, folder: RunFolder, corpus: Corpus | SampleCorpus, engine: Engine,
        peak_flops: float,
    ) -> None:  # fmt: skip
        super().__init__(cfg, ranks, folder, engine)
        self.corpus: Any = corpus
        self.routers = routers(self.model)
        self.mfu_a_token = planner.mfu_flops(cfg.model, cfg.data.seq_len) / (peak_flops * ranks.world)
        self.health = diagnostics.HealthCheck(cfg.model)
        self.subset = corpus.evaluation(cfg.train.eval_tokens)
        self.loads: dict[str, Tensor] = {}  # tokens of each expert over the last steps, for experts.svg

    def validate(self, last: bool) -> dict[str, Any]:
        return self.evaluate(self.corpus.evaluation() if last else self.subset).record()

    def evaluate(self, held_out) -> Score:
        with self.engine.gathered():
            return evaluate(self.objective, held_out, self.cfg.train.micro_batch_size, self.ranks)

    # ----------------------------------------------------------------------------------------------------------- step

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; -> its record."""
        cfg, began = self.cfg, time.perf_counter()
        progress = (self.step - 1) / cfg.train.steps
        lr = learning_rate(cfg.optim, self.step, cfg.train.steps)
        totals = self._accumulate(value_at(cfg.model.mtp_weight, progress))
        norm = self.engine.reduce()
        self._reduce(totals)
        figures = torch.stack([norm, *(t.double() for t in totals["sums"].values())]).tolist()
        sums = dict(zip(totals["sums"], figures[1:], strict=True))
        self.agree_to_stop(sums["stop"])
        sound = math.isfinite(figures[0]) and math.isfinite(sums["loss"])
        if sound and cfg.train.health_check:
            self._check_health(sums, totals)
        if self.engine.step(lr, figures[0] if sound else math.nan):
            self._balance(totals["balance"], value_at(cfg.model.bias_update_speed, progress))
        self.count_bad(sound)
        elapsed = time.perf_counter() - began
        self.seconds += elapsed
        return self._record(sums, totals, figures[0], lr, elapsed)

    def _accumulate(self, mtp_weight: float) -> dict:
        """Forward and backward over this rank's micro-batches; -> sums of this rank."""
        cfg, ranks = self.cfg, self.ranks
        batch = self.corpus.train.share((self.step - 1) * cfg.rows, cfg.rows, ranks.rank, ranks.world)
        divisor = count_targets(*batch).to(ranks.device)
        ranks.all_reduce([divisor])
        parts = [None if t is None else t.to(ranks.device).split(cfg.train.micro_batch_size) for t in batch]
        totals: dict = {"sums": {"stop": torch.tensor(float(self.asked), device=ranks.device)}}
        first = ranks.rank * (cfg.rows // ranks.world)
        for i, tokens in enumerate(parts[0]):
            segments, mask = (None if p is None else p[i] for p in parts[1:])
            self._last_batch = (tokens, segments, mask)
            losses = self.engine.forward_backward(
                tokens, segments, mask, float(divisor), first + i * cfg.train.micro_batch_size, cfg.rows, mtp_weight
            )
            add(totals, {"sums": losses.sums, "balance": losses.balance, "health": losses.health})
        return totals

    def _reduce(self, totals: dict) -> None:
        spots = leaves(totals)
        self.ranks.all_reduce([tree[key] for tree, key in spots])

    def _balance(self, states: dict[str, State], speed: float) -> None:
        with torch.no_grad():
            for name, state in states.items():
                router = self.routers[name]
                router.bias.copy_(self.objective.balancer.update(state, router.bias, speed))

    def _check_health(self, sums: dict[str, float], totals: dict) -> None:
        """Cheap looks each step, thorough ones at steps 1 and 100; after the backward pass, before the optimizer."""
        check = self.health
        counts = {name: state["counts"] for name, state in totals.get("balance", {}).items()}
        check.observe(counts)
        main = sums["loss"] / max(sums["tokens"], 1)
        told = check.first_loss(main) if self.step == 1 else []
        if self.step in (1, 100):
            grads = self.engine.gradients()
            with self.engine.gathered():
                # where targets are masked, an expert may rightly meet none
                enough = diagnostics.MIN_TOKENS if self._last_batch[2] is None else 10**9
                told += check.gradients(self.model, counts, "mtp" in sums, grads=grads, min_tokens=enough)
                told += check.language_gradients(diagnostics.router_language_gradients(self.objective, *self._last_batch))
        if self.step % self.cfg.log.every == 0:
            told += check.idle()
            if "mtp" in sums:
                told += check.mtp_ratio(sums["mtp"] / max(sums["mtp_tokens"], 1), main, self.step)
        for message in told:
            self.console.warn(message)

    def _record(self, sums: dict, totals: dict, norm: float, lr: float, elapsed: float) -> dict[str, Any]:
        tokens = max(sums["tokens"], 1)
        batch = self.cfg.train.batch_tokens
        loss = sums["loss"] / tokens
        record = {
            "step": self.step,
            "train/loss": loss,
            "train/bpb": loss / math.log(2) / self.bytes_per_token,
            "train/lr": lr,
            "train/grad_norm": norm,
            "train/tokens": self.step * batch,
            "train/skipped": self.skipped,
            "perf/seconds": self.seconds,
            "perf/tokens_per_s": batch / elapsed,
            "perf/mfu": batch / elapsed * self.mfu_a_token,
        }
        if "mtp" in sums:
            record["train/mtp_loss"] = sums["mtp"] / max(sums["mtp_tokens"], 1)
        if "balance" in sums:
            record["train/balance_loss"] = sums["balance"]
        if totals.get("balance"):
            biases = {name: router.bias for name, router in self.routers.items()}
            record |= diagnostics.router_health(totals["balance"], totals["health"], biases, self.cfg.model.num_experts_per_tok)
            for name, state in totals["balance"].items():
                before = self.loads.get(name)
                self.loads[name] = state["counts"].double() + (0.95 * before if before is not None else 0)
        return record

    @property
    def bytes_per_token(self) -> float:
        return self.subset.bytes / max(self.subset.tokens, 1)

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"loads/{k}": v for k, v in self.loads.items()}
        tensors |= {f"idle/{k}": v for k, v in self.health.idle_steps.items()}
        return tensors, {"ratios": list(self.health.ratios)}

    def restore(self, found: checkpoint.Checkpoint) -> None:
        self.loads = {k: v.to(self.ranks.device) for k, v in found.tensors("loads").items()}
        self.health.idle_steps = {k: v.to(self.ranks.device) for k, v in found.tensors("idle").items()}
        self.health.ratios.extend(found.state["ratios"])
