"""Problems whose answers can be checked: demonstrations to fine-tune on, an endless stream of prompts for RL, held-out ones.

    sort         52931>      -> 12359        size = digits; one right answer
    countdown    3 5 7>22:   -> 3*5+7        size = numbers (2 to 4); every number once, + - * and parentheses

Problem number i of a stream is a pure function of (seed, i): draws are splitmix64 hashes, not a library's random
generator, whose stream may change. A problem whose content hashes to 0 modulo HELD_OUT is held out, whatever the seed,
so no stream ever meets an evaluation problem. An answer is right or wrong; nothing is executed to find out.

A byte-level BPE joins digits into one token, which hides them from the model: for such tokenizers problems are spelled
with spaces between all characters (`encode_prompt`, `encode_answer`, and `spelled` back).
Not here: rewards (rl/rewards.py), packing (samples.py), curricula, reasoning-gym.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moe.config import TaskConfig, UserError
from moe.data.tokenizer import Tokenizer

ALPHABET = "0123456789+-*=;>: ()|"
HELD_OUT = 8  # one problem in so many is kept from training; the default of 512 needs a few thousand in all
PATIENCE = 20_000  # draws without a new problem after which there are no more: a few times those of a small task
TRAIN, DEMONSTRATIONS, EVALUATION = range(3)  # streams, part of the hash
LONGEST = 100  # characters of an answer worth parsing; also the bound on nested parentheses


class Problem(NamedTuple):
    prompt: str
    answer: str
    """The answer, or one of them: `Task.check` decides."""
    level: int
    """Size of the problem."""


class Task:
    """A family of problems of cfg.min_length to cfg.max_length. A subclass draws one problem and checks one answer."""

    alphabet = ALPHABET
    """Characters of prompts and answers."""
    sizes = range(1, 1000)
    """What min_length and max_length may be."""

    def __init__(self, cfg: TaskConfig) -> None:
        for name in ("min_length", "max_length"):
            if (value := getattr(cfg, name)) not in self.sizes:
                raise UserError(
                    f"task.{name}={value}: task.name={cfg.name} has sizes {self.sizes[0]} to {self.sizes[-1]}; set "
                    "task.min_length and task.max_length to these"
                )
        self.cfg = cfg
        self._held_out = self._distinct("held_out", cfg.held_out, EVALUATION)

    def train(self, seed: int, start: int, count: int) -> list[Problem]:
        """Problems number start .. start + count - 1 of the endless stream of a seed; they may repeat, rarely."""
        return [self._numbered(seed, i, TRAIN) for i in range(start, start + count)]

    def demonstrations(self, seed: int) -> list[Problem]:
        """cfg.demonstrations different problems."""
        return self._distinct("demonstrations", self.cfg.demonstrations, DEMONSTRATIONS, seed)

    def held_out(self) -> list[Problem]:
        """cfg.held_out different problems, the same for every seed."""
        return list(self._held_out)

    def check(self, problem: Problem, completion: str) -> bool:
        """Whether `completion` solves the problem, without anything before or after it."""
        return completion == problem.answer

    def draw(self, size: int, numbers: Iterator[int]) -> Problem | None:
        """A problem made of random 64-bit `numbers`; None: these make none, draw again."""
        raise NotImplementedError

    def content(self, problem: Problem) -> str:
        """What decides whether a problem is held out; the same for two problems that are one in disguise."""
        return problem.prompt

    def is_held_out(self, problem: Problem) -> bool:
        digest = hashlib.sha256(f"{self.cfg.name} {self.content(problem)}".encode()).digest()
        return int.from_bytes(digest, "big") % HELD_OUT == 0

    def _numbered(self, seed: int, number: int, stream: int) -> Problem:
        """The first problem of the stream's side among those that the hash of this place gives."""
        for attempt in range(PATIENCE):
            numbers = draws(stream, seed, number, attempt)
            size = self.cfg.min_length + next(numbers) % (self.cfg.max_length - self.cfg.min_length + 1)
            problem = self.draw(size, numbers)
            if problem is not None and self.is_held_out(problem) == (stream == EVALUATION):
                return problem
        raise self._exhausted("held_out" if stream == EVALUATION else "demonstrations", 0)

    def _distinct(self, knob: str, count: int, stream: int, seed: int = 0) -> list[Problem]:
        found: dict[str, Problem] = {}
        i = last = 0
        while len(found) < count:
            if i - last > PATIENCE:
                raise self._exhausted(knob, len(found))
            problem = self._numbered(seed, i, stream)
            if problem.prompt not in found:
                found[problem.prompt], last = problem, i
            i += 1
        return list(found.values())

    def _exhausted(self, knob: str, found: int) -> UserError:
        c = self.cfg
        return UserError(
            f"task.{knob}={getattr(c, knob)}: problems of size {c.min_length} to {c.max_length} gave only {found} "
            f"different ones on that side of the split; lower it or raise task.max_length"
        )


class Sort(Task):
    """Digits in rising order; a digit stays as often as it was there."""

    def draw(self, size: int, numbers: Iterator[int]) -> Problem:
        digits = "".join(str(n % 10) for n in itertools.islice(numbers, size))
        return Problem(digits + ">", "".join(sorted(digits)), size)


class Countdown(Task):
    """Reach a target of 0 to 99 from numbers of 1 to 9; the stored answer is one of usually several."""

    sizes = range(2, 5)

    def draw(self, size: int, numbers: Iterator[int]) -> Problem | None:
        given = [1 + next(numbers) % 9 for _ in range(size)]
        parts = [
            (str(n), n, 3) for n in given
        ]  # text, value, how tightly it holds together: 1 sum, 2 product, 3 number
        while len(parts) > 1:
            a, b = (parts.pop(next(numbers) % len(parts)) for _ in range(2))
            parts.append(_joined(a, b, "+-*"[next(numbers) % 3]))
        text, target, _ = parts[0]
        return Problem(f"{' '.join(map(str, given))}>{target}:", text, size) if 0 <= target <= 99 else None

    def content(self, problem: Problem) -> str:
        given, target = _countdown(problem.prompt)
        return f"{sorted(given)}{target}"  # the same numbers in another order are the same problem

    def check(self, problem: Problem, completion: str) -> bool:
        return countdown_solved(problem.prompt, completion)


TASKS: dict[str, type[Task]] = {"sort": Sort, "countdown": Countdown}


# ----------------------------------------------------------------------------------------------------------- countdown


def countdown_solved(prompt: str, completion: str) -> bool:
    """Whether `completion` is an expression over exactly the numbers of the prompt that equals its target."""
    given, target = _countdown(prompt)
    if len(completion) > LONGEST:
        return False
    used: list[int] = []
    completion = _closed(completion)
    try:
        value, end = _sum(completion, 0, used)
    except (ValueError, IndexError):
        return False
    return end == len(completion) and value == target and sorted(used) == sorted(given)


def _countdown(prompt: str) -> tuple[list[int], int]:
    given, target = prompt.replace(" ", "").rstrip(":").split(">")
    return [int(n) for n in given], int(target)


def _joined(a: tuple[str, int, int], b: tuple[str, int, int], sign: str) -> tuple[str, int, int]:
    """Two parts of an expression as one, with parentheses where they are needed."""
    tight = 2 if sign == "*" else 1
    left = f"({a[0]})" if a[2] < tight else a[0]
    right = f"({b[0]})" if b[2] < tight or (sign == "-" and b[2] == 1) else b[0]
    value = a[1] * b[1] if sign == "*" else a[1] + b[1] if sign == "+" else a[1] - b[1]
    return f"{left}{sign}{right}", value, tight


def _sum(text: str, at: int, used: list[int]) -> tuple[int, int]:
    """Value and end of the longest sum that starts at `at`; IndexError or ValueError where there is none."""
    value, at = _product(text, at, used)
    while text[at : at + 1] in ("+", "-"):
        sign = 1 if text[at] == "+" else -1
        more, at = _product(text, at + 1, used)
        value += sign * more
    return value, at


def _product(text: str, at: int, used: list[int]) -> tuple[int, int]:
    value, at = _number(text, at, used)
    while text[at : at + 1] == "*":
        more, at = _number(text, at + 1, used)
        value *= more
    return value, at


def _number(text: str, at: int, used: list[int]) -> tuple[int, int]:
    if text[at] == "(":
        value, at = _sum(text, at + 1, used)
        if text[at] != ")":
            raise ValueError
        return value, at + 1
    value = "0123456789".index(text[at])  # a digit of ASCII; int() knows many more
    used.append(value)
    return value, at + 1


# ------------------------------------------------------------------------------------------------- text to ids and back


def spaced(problem: Problem) -> Problem:
    """`5 2 9 3 1 >` -> `1 2 3 5 9`."""
    prompt, answer = (" ".join(text.replace(" ", "")) for text in (problem.prompt, problem.answer))
    return problem._replace(prompt=prompt, answer=answer)


def render(problem: Problem, tokenizer: Tokenizer, alphabet: str = ALPHABET) -> Problem:
    """The problem as this tokenizer should see it: as it is where every character is a token, else spaced."""
    return problem if tokenizer.keeps_apart(alphabet) else spaced(problem)


def encode_prompt(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """BOS and the rendered prompt: what a model is given to answer."""
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    return before + tokenizer.encode(render(problem, tokenizer).prompt)


def encode_answer(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """The rendered answer and EOS: what a model is to say."""
    return [*tokenizer.encode(render(problem, tokenizer).answer), tokenizer.eos]


def spelled(ids: Iterable[int], tokenizer: Tokenizer, alphabet: str = ALPHABET) -> str:
    """What was said up to EOS, as `Task.check` reads it: without the spaces that `render` put in, and no others.

    An id that stands for nothing becomes U+FFFD: dropped silently, it would leave a right answer.
    """
    said = list(itertools.takewhile(lambda i: i != tokenizer.eos, ids))
    if any(i >= tokenizer.vocab_size for i in said):
        return "\ufffd"
    text = tokenizer.decode(said)
    return text if tokenizer.keeps_apart(alphabet) else _closed(text)


def _closed(text: str) -> str:
    """Inverse of spacing; other text stays what it is."""
    return text[::2] if text == " ".join(text[::2]) else text


# --------------------------------------------------------------------------------------------------------------- draws


def mix(*numbers: int) -> int:
    """splitmix64 over several integers: 64 bits that look unrelated for neighbouring ones (as packing.py's order)."""
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x


def draws(*place: int) -> Iterator[int]:
    """Endless random 64-bit numbers that belong to `place`."""
    start = mix(*place)
    return (mix(start, k) for k in itertools.count())
