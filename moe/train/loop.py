"""The frame of every training run: steps, log, validation, checkpoints, and what happens when something goes wrong.

A subclass says what one step is; here is when it is logged, validated and saved. The step number, weights, moments,
router biases, random states and what `extra_state` adds are all of a run, so that a resumed one repeats the
uninterrupted one bit for bit on one CPU machine. Ctrl-C and SIGTERM finish the step, save and say how to go on.
"""

from __future__ import annotations

import signal
from typing import Any

from torch import Tensor

from moe.config import UserError, to_dict
from moe.parallel import Ranks
from moe.train import checkpoint
from moe.train.engine import Engine
from moe.train.log import Console, Metrics, RunFolder, Wandb


class Loop:
    """`fit()` runs to cfg.train.steps, or until `satisfied`, from the newest checkpoint if there is one."""

    def __init__(self, cfg: Any, ranks: Ranks, folder: RunFolder, engine: Engine) -> None:
        self.cfg, self.ranks, self.folder, self.engine = cfg, ranks, folder, engine
        self.objective = engine.objective
        self.model = self.objective.model
        self.console = Console(cfg.train.steps, cfg.log.every)
        self.metrics = Metrics(folder.metrics)
        self.step, self.seconds, self.bad, self.skipped = 0, 0.0, 0, 0
        self.satisfied = False
        self.asked = self.stop = False  # this rank was asked to stop; all ranks agreed to

    # ------------------------------------------------------------------------------------------------------ subclasses

    def train_step(self) -> dict[str, Any]:
        """Step number `self.step`, the same on every rank; -> its record without the keys of `_stamp`."""
        raise NotImplementedError

    def validate(self, last: bool) -> dict[str, Any]:
        """Figures of held-out data; `last`: at the end of the run, on all of it."""
        raise NotImplementedError

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resume needs besides the engine's state: tensors named prefix/name, and plain numbers."""
        return {}, {}

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Inverse of `extra_state`."""

    # ------------------------------------------------------------------------------------------------------------- run

    def fit(self) -> dict[str, Any]:
        """-> the last record. Raises UserError when the loss stays non-finite, KeyboardInterrupt once saved."""
        cfg = self.cfg.train
        if not self.resume():
            self.before(self.validate(last=False))
        self.wandb = Wandb(self.cfg.log, self.folder, to_dict(self.cfg), self.console.warn)
        handlers = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        record: dict[str, Any] = {}
        try:
            with self.console:
                while self.step < cfg.steps and not self.satisfied:
                    self.step += 1
                    record = self.train_step()
                    last = self.step == cfg.steps or self.satisfied
                    if last or (cfg.eval_every and self.step % cfg.eval_every == 0):
                        record |= self.validate(last)
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

    def before(self, figures: dict[str, Any]) -> None:
        """Say where the run starts from."""
        self.console.line(f"before training: validation bpb {figures['val/bpb']:.4f}, loss {figures['val/loss']:.4f}")

    def _ask_to_stop(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.console.line("stopping after this step (again: at once)")

    def agree_to_stop(self, asked: float) -> None:
        """Every rank stops at the step at which any was asked to; `asked` is summed over ranks."""
        self.stop = self.stop or asked > 0

    def count_bad(self, sound: bool) -> None:
        """A step that changed nothing because its loss or gradient was not finite; too many in a row end the run."""
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

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        tensors = self.engine.state()  # all ranks take part; the first one holds the result
        if self.ranks.first:
            self.metrics.sync()
            more, numbers = self.extra_state()
            tensors |= {f"rng/{k}": v for k, v in checkpoint.rng_state().items()} | more
            state = {"seconds": self.seconds, "bad": self.bad, "skipped": self.skipped, "satisfied": self.satisfied}
            checkpoint.save(
                self.folder.checkpoints, self.step, tensors, state | numbers, self.cfg.train.keep_checkpoints,
                warn=self.console.warn,
            )  # fmt: skip
        self.ranks.barrier()

    def resume(self) -> bool:
        found = checkpoint.load_latest(self.folder.checkpoints, self.console.warn)
        if found is None:
            return False
        self.engine.load(found.tensors("model"), found.tensors("optim"))
        checkpoint.set_rng_state(found.tensors("rng"))
        self.step, self.seconds = found.step, found.state["seconds"]
        self.bad, self.skipped = found.state["bad"], found.state["skipped"]
        self.satisfied = found.state.get("satisfied", False)
        self.restore(found)
        self.metrics.truncate(self.step)
        self.console.line(f"resuming after step {self.step} from {found.path}")
        return True


def add(into: dict, more: dict) -> dict:
    """Sum nested dictionaries of tensors or numbers, leaf by leaf."""
    for key, value in more.items():
        into[key] = add(into.get(key, {}), value) if isinstance(value, dict) else into.get(key, 0) + value
    return into


def leaves(tree: dict) -> list[tuple[dict, str]]:
    """Every place of a nested dictionary that holds a value, for sums over ranks in place."""
    return [leaf for k, v in tree.items() for leaf in (leaves(v) if isinstance(v, dict) else [(tree, k)])]
