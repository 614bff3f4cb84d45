"""Accuracies and their standard errors against values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from moe.data.tasks import ALPHABET, Problem, encode_answer
from moe.data.tokenizer import Tokenizer
from moe.inference import accuracy
from moe.parallel import Ranks

TOKENIZER = Tokenizer.characters(ALPHABET)
TASK = SimpleNamespace(check=lambda problem, text: text == problem.answer)
PROBLEMS = [Problem(f"{i}>", str(i), 1) for i in range(8)]
ALONE = Ranks(0, 1, torch.device("cpu"))


def answers(known, lucky):
    """A model that is right about `known` greedily, and at temperature 1 in draws numbered `lucky` of four."""

    def generate(model, prompts, max_new_tokens, temperature, seeds, eos):
        out = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            number = int(TOKENIZER.decode(prompt[1:])[:-1])
            right = number in known if temperature == 0 else seed % 4 in lucky.get(number, ())
            out.append(encode_answer(PROBLEMS[number] if right else PROBLEMS[number - 1], TOKENIZER))
        return SimpleNamespace(tokens=out)

    return generate


def measured(monkeypatch, generate, ranks=ALONE, problems=PROBLEMS, samples=4):
    monkeypatch.setattr(accuracy, "generate", generate)
    return accuracy.task_accuracy(None, TOKENIZER, TASK, problems, samples, 4, ranks)


def test_figures_are_those_worked_out_by_hand(monkeypatch):
    found = measured(monkeypatch, answers({0, 3, 5}, {0: {0, 1, 2, 3}, 2: {1}, 3: {0, 2}}))
    figures = found.figures  # right draws of the first four problems: 4, 0, 1, 2 of 4
    assert figures["val/greedy"] == pytest.approx(3 / 8)
    assert figures["val/greedy_se"] == pytest.approx(math.sqrt(3 / 8 * 5 / 8 / 7))
    assert figures["val/pass@1"] == pytest.approx((1 + 0 + 0.25 + 0.5) / 4)
    assert figures["val/pass@4"] == pytest.approx(3 / 4)
    spread = torch.tensor([1, 0, 0.25, 0.5], dtype=torch.float64)
    assert figures["val/pass@1_se"] == pytest.approx(float(spread.std() / 2))
    assert found.shown[0] == ("0>", "0", "0", False) and found.shown[1] == ("1>", "0", "1", False)


def test_an_answer_without_its_end_is_wrong(monkeypatch):
    def generate(model, prompts, *_, **__):
        return SimpleNamespace(tokens=[[TOKENIZER.encode(str(i % 8))[0]] for i in range(len(prompts))])

    assert measured(monkeypatch, generate).figures["val/greedy"] == 0


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_problems(monkeypatch, world):
    model = answers({0, 3, 5}, {0: {0, 1, 2, 3}, 2: {1}, 3: {0, 2}})
    whole = measured(monkeypatch, model).figures
    sums: list[torch.Tensor] = []

    class Part(Ranks):
        def all_reduce(self, tensors):
            sums.append(tensors[0].clone())

    for rank in range(world):
        measured(monkeypatch, model, Part(rank, world, torch.device("cpu")))
    per = len(sums) // world
    for i, name in enumerate(("greedy", "pass@1", "pass@4")):
        total = sum(sums[r * per + i] for r in range(world))
        assert float(total[0] / total[2]) == pytest.approx(whole[f"val/{name}"])


def test_the_same_draws_every_time(monkeypatch):
    asked = []

    def generate(model, prompts, max_new_tokens, temperature, seeds, eos):
        asked.append((temperature, tuple(seeds)))
        return SimpleNamespace(tokens=[[TOKENIZER.eos]] * len(prompts))

    measured(monkeypatch, generate)
    measured(monkeypatch, generate)
    assert asked[:2] == asked[2:] and len(set(asked[1][1])) == 16
