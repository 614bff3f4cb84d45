"""Group-relative policy optimisation: sample groups of answers, score them, move towards the better ones.

One step of the loop: `grpo.prompts` fresh prompts, `grpo.group_size` answers each, then `grpo.updates` optimizer steps
over disjoint halves (thirds, ...) of the prompts. Advantages are rewards relative to the answers of the same prompt; no
critic. Each rank samples and trains on whole groups of its own prompts; rewards are summed over ranks, so every decision
is the same everywhere. Router biases are frozen. `step`, weights and moments are the whole state.

Source: DeepSeekMath (arXiv 2402.03300) section 4; DeepSeek-V3 (arXiv 2412.19437) section 5.2.2; DAPO (2503.14476).
Not here: losses (objectives/policy.py), the cold start (train/finetune.py), external samplers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.config import GrpoRecipe
from moe.data.tasks import Problem, Task, encode_prompt, spelled
from moe.data.tokenizer import Tokenizer
from moe.inference.accuracy import task_accuracy
from moe.layers.precision import use_fp8
from moe.model import Transformer
from moe.objectives import group_advantages, live_groups
from moe.objectives.reinforcement import Samples
from moe.parallel import Ranks
from moe.rl.rewards import REWARDS, score
from moe.rl.rollout import Rollouts, rollout, sample_seed
from moe.train import checkpoint
from moe.train.engine import Engine
from moe.train.log import RunFolder, accuracies
from moe.train.loop import Loop
from moe.train.optim import learning_rate


class Batch(NamedTuple):
    """What this rank sampled in one step, and what all ranks know about it."""

    problems: list[Problem]
    mine: list[int]
    """Numbers of this rank's prompts among those of the step."""
    rollouts: Rollouts
    rewards: Tensor
    """[P, G] float64, of all ranks."""
    failures: Counter


class Grpo(Loop):
    """`engine` wraps an `objectives.Reinforcement`; `task` gives prompts and checks answers of up to `room` tokens."""

    def __init__(
        self, cfg: GrpoRecipe, ranks: Ranks, folder: RunFolder, engine: Engine, task: Task, tokenizer: Tokenizer,
        room: int,
    ) -> None:  # fmt: skip
        super().__init__(cfg, ranks, folder, engine)
        self.task, self.tokenizer, self.room = task, tokenizer, room
        self.held_out = task.held_out()
        self.objective.eval()  # no auxiliary losses, no statistics: the router's balance is not trained here
        self.reference: Transformer | None = None
        if cfg.grpo.beta > 0:  # a new module and not a copy: the engine may have hooks on the trained one
            self.reference = Transformer(cfg.model).to(ranks.device, engine.dtype).eval().requires_grad_(False)
            with engine.gathered() as model:
                self.reference.load_state_dict(model.state_dict())
            if cfg.train.precision == "fp8":  # or the two would differ before the first step
                use_fp8(self.reference, cfg.train.fp8_scales)

    # ----------------------------------------------------------------------------------------------------------- step

    def train_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        batch = self._sample()
        sampled = time.perf_counter()
        advantages = group_advantages(batch.rewards, self.cfg.grpo.advantage)
        samples = self._samples(batch, advantages)
        lr = learning_rate(self.cfg.optim, self.step, self.cfg.train.steps)
        totals: dict[str, float] = {}
        norms = []
        for number in range(self.cfg.grpo.updates):
            if (norm := self._update(number, batch, samples, lr, totals)) is not None:
                norms.append(norm)
        ended = time.perf_counter()
        self.seconds += ended - began
        times = {"perf/rollout_seconds": sampled - began, "perf/update_seconds": ended - sampled}
        return self._record(batch, totals, norms, lr) | times

    def _sample(self) -> Batch:
        """This rank's answers to its share of the step's prompts, and everybody's rewards."""
        g, ranks = self.cfg.grpo, self.ranks
        problems = self.task.train(self.cfg.train.seed, (self.step - 1) * g.prompts, g.prompts)
        mine = list(range(ranks.rank, g.prompts, ranks.world))
        prompts = [encode_prompt(problems[i], self.tokenizer) for i in mine]
        seeds = [sample_seed(self.cfg.train.seed, self.step, i, s) for i in mine for s in range(g.group_size)]
        with self.engine.gathered() as model:
            drawn = rollout(model, self.tokenizer, prompts, g.group_size, self.room, g.temperature, seeds)
        texts = [spelled(new, self.tokenizer) for new in drawn.new]
        many = [problems[i] for i in mine for _ in range(g.group_size)]
        rows = [(p.prompt, p.answer, text, cut) for p, text, cut in zip(many, texts, drawn.truncated, strict=True)]
        scores = score(REWARDS[g.reward], rows, g.reward_timeout)
        rewards = torch.zeros(g.prompts, g.group_size, dtype=torch.float64)
        rewards[mine] = torch.tensor(scores.values, dtype=torch.float64).view(len(mine), g.group_size)
        shared = rewards.to(ranks.device)
        ranks.all_reduce([shared])
        return Batch(problems, mine, drawn, shared.cpu(), scores.failures)

    @torch.no_grad()
    def _samples(self, batch: Batch, advantages: Tensor) -> Samples:
        """This rank's samples as the objective takes them."""
        g, r, device = self.cfg.grpo, batch.rollouts, self.ranks.device
        answer = r.answer
        if g.mask_truncated:
            answer = answer & ~torch.tensor(r.truncated, device=device).unsqueeze(1)
        own = advantages[batch.mine].reshape(-1).to(device, torch.float32)
        samples = Samples(r.tokens, answer, r.valid, r.logp, r.logp, own, r.routings)
        if g.correction != "off":  # else the sampler's own log-probabilities anchor the clip: one pass less
            samples = samples._replace(logp_old=self._scored(samples))
        if self.reference is not None:
            samples = samples._replace(logp_ref=self._scored(samples, self.reference))
        return samples

    def _scored(self, samples: Samples, model: Transformer | None = None) -> Tensor:
        """[S, T] log-probabilities under `model` (default: the trained one), without gradient."""
        size = self.cfg.train.micro_batch_size
        with self.engine.gathered():
            parts = [
                self.objective.score(samples.rows(slice(i, i + size)), model)[0]
                for i in range(0, len(samples.tokens), size)
            ]
        return torch.cat(parts) if parts else samples.logp_rollout

    def _update(self, number: int, batch: Batch, samples: Samples, lr: float, totals: dict[str, float]) -> float | None:
        """One optimizer step on minibatch `number`; -> its gradient norm, None when no group has a signal."""
        g, ranks = self.cfg.grpo, self.ranks
        here = [p for p in range(g.prompts) if p * g.updates // g.prompts == number]
        live = live_groups(batch.rewards) | (g.beta > 0)  # the KL pulls at every answer
        if not any(live[p] for p in here):
            return None  # AdamW would move on old momentum alone
        trained = [p for p in here if live[p] or not g.drop_zero_signal]
        size = self.cfg.train.micro_batch_size
        most = max(len([p for p in trained if p % ranks.world == r]) for r in range(ranks.world)) * g.group_size
        passes = -(-most // size)  # the same on all ranks, which meet in collectives
        rows = self._rows(batch.mine, trained)
        counts = samples.answer[self._rows(batch.mine, here), 1:]
        # dead groups count in the divisors: to drop them must not change the step
        divisors = torch.stack([counts.sum(), counts.any(1).sum()]).double()
        ranks.all_reduce([divisors])
        if not divisors[0] and not g.beta:
            return None  # every live answer was cut and masked
        tokens, sequences = divisors.clamp_min(1).tolist()
        sums: dict[str, Tensor] = {}
        for i in range(passes):
            part = samples.rows(rows[i * size : (i + 1) * size])
            if not len(part.tokens):  # nothing left on this rank: a row in which nothing counts
                part = samples.rows(slice(0, 1))
                part = part._replace(answer=torch.zeros_like(part.answer))
            for key, value in self.engine.forward_backward(part, tokens, sequences).sums.items():
                joined = torch.maximum if key.startswith("max_") else torch.add
                sums[key] = joined(sums[key], value.detach()) if key in sums else value.detach()
        norm = float(self.engine.reduce())
        sound = self.engine.step(lr, norm)
        self.count_bad(sound)
        self._join(totals, sums, first=not totals)
        return norm

    def _rows(self, mine: list[int], prompts: list[int]) -> Tensor:
        """Sample numbers on this rank of those of `prompts` that are its own."""
        wanted, size = set(prompts), self.cfg.grpo.group_size
        rows = [j * size + s for j, p in enumerate(mine) if p in wanted for s in range(size)]
        return torch.tensor(rows, dtype=torch.int64, device=self.ranks.device)

    def _join(self, totals: dict[str, float], sums: dict[str, Tensor], first: bool) -> None:
        """Sums over ranks into `totals`; the gap between sampler and trainer is that of the first, untouched weights."""
        plain = {k: v.double() for k, v in sums.items() if not k.startswith("max_")}
        largest = {
            k: torch.zeros(self.ranks.world, dtype=torch.float64, device=v.device)
            for k, v in sums.items()
            if k.startswith("max_")
        }
        for key, spread in largest.items():
            spread[self.ranks.rank] = sums[key].double()
        self.ranks.all_reduce([*plain.values(), *largest.values()])
        for key, value in plain.items():
            totals[key] = totals.get(key, 0.0) + float(value)
            if first:
                totals[f"first/{key}"] = float(value)
        for key, spread in largest.items():
            totals[key] = max(totals.get(key, 0.0), float(spread.max()))
            if first:
                totals[f"first/{key}"] = float(spread.max())

    # --------------------------------------------------------------------------------------------------------- figures

    def _record(self, batch: Batch, totals: dict[str, float], norms: list[float], lr: float) -> dict[str, Any]:
        rewards, r = batch.rewards, batch.rollouts
        right, live = (rewards >= 1).double().mean(1), live_groups(rewards)
        lengths = torch.stack([r.answer.sum(), torch.tensor(sum(r.truncated), device=r.answer.device)]).double()
        failed = torch.tensor([float(sum(batch.failures.values())), float(self.asked)], dtype=torch.float64)
        lengths = torch.cat([lengths, failed.to(lengths.device)])
        self.ranks.all_reduce([lengths])
        tokens, cut, failures, stop = lengths.tolist()
        self.agree_to_stop(stop)
        samples, seen = rewards.numel(), max(totals.get("tokens", 0.0), 1.0)
        for reason, count in batch.failures.items():
            self.console.warn(f"step {self.step}: {count} rewards counted as 0: {reason}")
        record = {
            "step": self.step,
            "rl/reward": float(rewards.mean()),
            "rl/solved": float(right.mean()),
            "rl/zero_signal": 1 - float(live.double().mean()),
            "rl/all_right": float((right == 1).double().mean()),
            "rl/all_wrong": float((right == 0).double().mean()),
            "rl/length": tokens / samples,
            "rl/truncated": cut / samples,
            "rl/reward_failures": failures,
            "rl/updates": len(norms),
            "train/lr": lr,
            "train/skipped": self.skipped,
            "train/rollouts": self.step * samples,
            "perf/seconds": self.seconds,
            "perf/sampled_tokens": tokens,
        }
        if norms:
            first = max(totals["first/tokens"], 1.0)
            record |= {
                "train/grad_norm": max(norms),
                "rl/entropy": totals["entropy"] / seen,
                "rl/clip_low": totals["clip_low"] / seen,
                "rl/clip_high": totals["clip_high"] / seen,
                "rl/ratio_max": totals["max_ratio"],
                "rl/flip_rate": totals["first/flips"] / max(totals["first/choices"], 1.0),
                "rl/logp_gap": totals["first/mismatch"] / first,
                "rl/logp_gap_max": totals["first/max_mismatch"],
                "rl/mismatch_kl": totals["first/mismatch_k3"] / first,
            }
            if self.reference is not None:
                record["rl/kl"] = totals["kl"] / seen
        return record

    def validate(self, last: bool) -> dict[str, Any]:
        g = self.cfg.grpo
        with self.engine.gathered() as model:
            found = task_accuracy(
                model, self.tokenizer, self.task, self.held_out, g.eval_samples, self.room, self.ranks, g.show
            )
        shown = [(prompt, right, answer, cut) for prompt, answer, right, cut in found.shown]
        for row, reward in zip(shown, score(REWARDS[g.reward], shown, g.reward_timeout).values, strict=True):
            prompt, right, answer, _ = row
            self.console.line(f"    {prompt} {answer:<14} reward {reward:g}{'' if reward >= 1 else f', wanted {right}'}")
            if self.ranks.first:
                with open(self.folder.path / "samples.jsonl", "a", encoding="utf-8") as file:
                    kept = {"step": self.step, "prompt": prompt, "answer": answer, "right": right, "reward": reward}
                    file.write(json.dumps(kept) + "\n")
        return found.figures

    def before(self, figures: dict[str, Any]) -> None:
        self.start = figures
        self.console.line("before: " + accuracies(figures))

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        reference = self.reference.state_dict() if self.reference is not None else {}
        return {f"reference/{k}": v for k, v in reference.items()}, {"start": self.start}

    def restore(self, found: checkpoint.Checkpoint) -> None:
        self.start = found.state["start"]
        if self.reference is not None:
            self.reference.load_state_dict(found.tensors("reference"))
