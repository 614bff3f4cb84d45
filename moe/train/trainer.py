"""The training loop: micro-batches, step, balance, log, evaluate, save; and what happens when something goes wrong.

The loop's whole state is the step number: rows seen, tokens, schedules follow from it. A checkpoint also holds weights,
moments, router biases, random states and the counters of the health check, so a resumed run repeats the uninterrupted
one bit for bit on one CPU machine. Ctrl-C and SIGTERM finish the step, save and say how to go on.
"""

from __future__ import annotations

import math
import signal
import time
from typing import Any

import torch
from torch import Tensor

from moe.analysis import diagnostics, planner
from moe.config import PretrainConfig, UserError, to_dict, value_at
from moe.data import Corpus
from moe.layers.balance import State, routers
from moe.objectives import count_targets
from moe.parallel import Ranks
from moe.train import checkpoint
from moe.train.engine import Engine
from moe.train.evaluate import Score, evaluate
from moe.train.log import Console, Metrics, RunFolder, Wandb
from moe.train.optim import learning_rate


def add(into: dict, more: dict) -> dict:
    """Sum nested dictionaries of tensors or numbers, leaf by leaf."""
    for key, value in more.items():
        into[key] = add(into.get(key, {}), value) if isinstance(value, dict) else into.get(key, 0) + value
    return into


def leaves(tree: dict) -> list[tuple[dict, str]]:
    return [leaf for k, v in tree.items() for leaf in (leaves(v) if isinstance(v, dict) else [(tree, k)])]


class Trainer:
    """`fit()` runs to cfg.train.steps, from the newest checkpoint if there is one."""

    def __init__(
        self, cfg: PretrainConfig, ranks: Ranks, folder: RunFolder, corpus: Corpus, engine: Engine, peak_flops: float
    ) -> None:
        self.cfg, self.ranks, self.folder, self.corpus, self.engine = cfg, ranks, folder, corpus, engine
        self.objective = engine.objective
        self.model = self.objective.model
        self.routers = routers(self.model)
        self.mfu_a_token = planner.mfu_flops(cfg.model, cfg.data.seq_len) / (peak_flops * ranks.world)
        self.console = Console(cfg.train.steps, cfg.log.every)
        self.metrics = Metrics(folder.metrics)
        self.health = diagnostics.HealthCheck(cfg.model)
        self.subset = corpus.evaluation(cfg.train.eval_tokens)
        self.step, self.seconds, self.bad, self.skipped = 0, 0.0, 0, 0
        self.loads: dict[str, Tensor] = {}  # tokens of each expert over the last steps, for experts.svg
        self.stop = False

    # ------------------------------------------------------------------------------------------------------------ run

    def fit(self) -> dict[str, Any]:
        """-> the last record. Raises UserError when the loss stays non-finite, KeyboardInterrupt once saved."""
        cfg = self.cfg.train
        if not self.resume():
            start = self.evaluate(self.subset)
            self.console.line(f"before training: validation bpb {start.bpb:.4f}, loss {start.loss:.4f}")
        self.wandb = Wandb(self.cfg.log, self.folder, to_dict(self.cfg), self.console.warn)
        handlers = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        record: dict[str, Any] = {}
        try:
            with self.console:
                while self.step < cfg.steps:
                    record = self.train_step()
                    last = self.step == cfg.steps
                    if last or (cfg.eval_every and self.step % cfg.eval_every == 0):
                        score = self.evaluate(self.corpus.evaluation() if last else self.subset)
                        record |= {"val/loss": score.loss, "val/bpb": score.bpb}
                    self.metrics.write(record)
                    self.wandb.log(record)
                    self.console.step(record)
                    if last or self.stop or (cfg.save_every and self.step % cfg.save_every == 0):
                        self.save()
                    if self.stop and not last:
                        raise KeyboardInterrupt
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            self.metrics.close()
            self.wandb.finish()
        return record

    def evaluate(self, held_out) -> Score:
        return evaluate(self.objective, held_out, self.cfg.train.micro_batch_size, self.ranks)

    def _ask_to_stop(self, *_: object) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        self.console.line("stopping after this step (again: at once)")

    # ----------------------------------------------------------------------------------------------------------- step

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; -> its record."""
        cfg, began, self.step = self.cfg, time.perf_counter(), self.step + 1
        progress = (self.step - 1) / cfg.train.steps
        lr = learning_rate(cfg.optim, self.step, cfg.train.steps)
        totals = self._accumulate(value_at(cfg.model.mtp_weight, progress))
        norm = self.engine.reduce()
        self._reduce(totals)
        figures = torch.stack([norm, *(t.double() for t in totals["sums"].values())]).tolist()
        sums = dict(zip(totals["sums"], figures[1:], strict=True))
        self.stop = self.stop or sums["stop"] > 0
        sound = math.isfinite(figures[0]) and math.isfinite(sums["loss"])
        if sound and cfg.train.health_check:
            self._check_health(sums, totals)
        if self.engine.step(lr, figures[0] if sound else math.nan):
            self._balance(totals["balance"], value_at(cfg.model.bias_update_speed, progress))
        self._count_bad(sound)
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
        totals: dict = {"sums": {"stop": torch.tensor(float(self.stop), device=ranks.device)}}
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
            told += check.gradients(self.model, counts, "mtp" in sums, grads=self.engine.gradients())
            told += check.language_gradients(diagnostics.router_language_gradients(self.objective, *self._last_batch))
        if self.step % self.cfg.log.every == 0:
            told += check.idle()
            if "mtp" in sums:
                told += check.mtp_ratio(sums["mtp"] / max(sums["mtp_tokens"], 1), main, self.step)
        for message in told:
            self.console.warn(message)

    def _count_bad(self, sound: bool) -> None:
        self.bad = 0 if sound else self.bad + 1
        self.skipped += not sound
        if not sound:
            self.console.warn(f"step {self.step}: loss or gradient is not finite; step skipped ({self.bad} in a row)")
        if self.bad >= self.cfg.train.max_bad_steps:
            good = checkpoint.load_latest(self.folder.checkpoints, self.console.warn)
            where = f"the last good checkpoint is {good.path}" if good else "no checkpoint was written yet"
            raise UserError(
                f"{self.bad} steps in a row had a non-finite loss or gradient (train.max_bad_steps="
                f"{self.cfg.train.max_bad_steps}); {where}; lower optim.lr and start in a new run.dir"
            )

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

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        if self.ranks.first:
            self.metrics.sync()
            tensors = self.engine.state()
            tensors |= {f"rng/{k}": v for k, v in checkpoint.rng_state().items()}
            tensors |= {f"loads/{k}": v for k, v in self.loads.items()}
            tensors |= {f"idle/{k}": v for k, v in self.health.idle_steps.items()}
            state = {"seconds": self.seconds, "bad": self.bad, "skipped": self.skipped, "ratios": list(self.health.ratios)}
            checkpoint.save(
                self.folder.checkpoints, self.step, tensors, state, self.cfg.train.keep_checkpoints, warn=self.console.warn
            )
        self.ranks.barrier()

    def resume(self) -> bool:
        found = checkpoint.load_latest(self.folder.checkpoints, self.console.warn)
        if found is None:
            return False
        self.engine.load(found.tensors("model"), found.tensors("optim"))
        self.loads = {k: v.to(self.ranks.device) for k, v in found.tensors("loads").items()}
        self.health.idle_steps = {k: v.to(self.ranks.device) for k, v in found.tensors("idle").items()}
        self.health.ratios.extend(found.state["ratios"])
        checkpoint.set_rng_state(found.tensors("rng"))
        self.step, self.seconds = found.step, found.state["seconds"]
        self.bad, self.skipped = found.state["bad"], found.state["skipped"]
        self.metrics.truncate(self.step)
        self.console.line(f"resuming after step {self.step} from {found.path}")
        return True
