"""How often a model solves a task's problems: greedy, pass@1 and pass@k, each with its standard error.

Greedy accuracy is one answer to every problem; pass@1 and pass@k come from `samples` answers at temperature 1 to half of
them (unbiased estimator, Chen et al. 2021, arXiv 2107.03374). A standard error is that of a mean over problems.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.data.tasks import Problem, Task, encode_prompt, spelled
from moe.data.tokenizer import Tokenizer
from moe.inference.decoding import generate
from moe.model import Transformer
from moe.objectives import pass_at_k
from moe.parallel import Ranks


class Accuracy(NamedTuple):
    figures: dict[str, float]
    """val/greedy, val/pass@1, val/pass@<samples>, each with `_se`."""
    shown: list[tuple[str, str, str, bool]]
    """(prompt, greedy answer, right answer, whether it was cut before its end) of the first problems."""


def task_accuracy(
    model: Transformer, tokenizer: Tokenizer, task: Task, problems: list[Problem], samples: int, max_new_tokens: int,
    ranks: Ranks, show: int = 3,
) -> Accuracy:  # fmt: skip
    """Each rank answers its share of `problems`. The same draws every time: differences are the model's."""
    mine = problems[ranks.rank :: ranks.world]
    greedy, answers, ended = _solved(model, tokenizer, task, mine, 0.0, max_new_tokens, [0] * len(mine))
    half = [(i, p) for i, p in enumerate(problems[: (len(problems) + 1) // 2])][ranks.rank :: ranks.world]
    many = [(i * samples + s, p) for i, p in half for s in range(samples)]
    drawn, _, _ = _solved(model, tokenizer, task, [p for _, p in many], 1.0, max_new_tokens, [i for i, _ in many])
    right = drawn.view(-1, samples).sum(1)
    figures: dict[str, float] = {}
    each = {"greedy": greedy, "pass@1": right / samples}
    if samples > 1:
        each[f"pass@{samples}"] = pass_at_k(torch.full_like(right, samples), right, samples)
    for name, values in each.items():
        figures |= _mean(f"val/{name}", values, ranks)
    shown = [(p.prompt, text, p.answer, not done) for p, text, done in zip(mine, answers, ended, strict=True)][:show]
    return Accuracy(figures, shown)


def _solved(model, tokenizer, task, problems, temperature, max_new_tokens, seeds) -> tuple[Tensor, list[str], list[bool]]:
    """-> [problems] float64, 1 where the answer is right; the answers' texts; whether each came to its end."""
    prompts = [encode_prompt(p, tokenizer) for p in problems]
    out = generate(model, prompts, max_new_tokens, temperature, seeds, eos=tokenizer.eos)
    texts = [spelled(new, tokenizer) for new in out.tokens]
    ended = [bool(new) and new[-1] == tokenizer.eos for new in out.tokens]
    right = [done and task.check(p, text) for p, text, done in zip(problems, texts, ended, strict=True)]
    return torch.tensor(right, dtype=torch.float64), texts, ended


def _mean(name: str, values: Tensor, ranks: Ranks) -> dict[str, float]:
    sums = torch.stack([values.sum(), (values**2).sum(), torch.tensor(float(len(values)), dtype=torch.float64)])
    sums = sums.to(ranks.device)
    ranks.all_reduce([sums])
    total, squares, n = sums.tolist()
    mean = total / max(n, 1)
    variance = max(squares / max(n, 1) - mean**2, 0.0) * n / max(n - 1, 1)
    return {name: mean, f"{name}_se": math.sqrt(variance / max(n, 1))}
