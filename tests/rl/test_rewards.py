"""Only right answers score, whatever else is written, and no reward can bring a run down."""

import math
import random
import signal
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from moe.config import TaskConfig
from moe.data.tasks import TASKS
from moe.rl.rewards import REWARDS, Scores, score


def row(completion="12", prompt="21>", answer="12", truncated=False):
    return prompt, answer, completion, truncated


def problems(name, rng, count=60):
    sizes = dict(min_length=3, max_length=4) if name == "countdown" else {}
    return TASKS[name](TaskConfig(name=name, held_out=50, **sizes)), rng.randrange(2**40), count


PAIRS = [("exact", "sort"), ("prefix", "sort"), ("countdown", "countdown")]


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.mark.parametrize("reward, name", PAIRS)
def test_the_right_answer_scores_one(reward, name, rng):
    task, seed, count = problems(name, rng)
    rows = [(p.prompt, p.answer, p.answer, False) for p in task.train(seed, 0, count)]
    assert score(REWARDS[reward], rows, 5.0) == Scores([1.0] * count, {})


@pytest.mark.parametrize("reward, name", PAIRS)
def test_hostile_answers_never_score_and_never_raise(reward, name, rng):
    """Empty, huge, padded, nested, unicode, many tries at once: 0, or less than 1 where the reward is dense."""
    task, seed, count = problems(name, rng, 20)
    rows = []
    for p in task.train(seed, 0, count):
        a = p.answer
        wide = a.translate({ord(c): ord(c) + 0xFEE0 for c in "0123456789()+-*"})
        wrong = ["", " ", a + "0", "0" + a, a + " ", "\n" + a, a[:-1], a * 2, wide, "9" * 10**6, "(" * 10**5 + a, a + "\0",
                 f"({a}", f"{a})", f"{a} {a}", f"{a};{a}", f"answer: {a}", "\ud800", "🧮" * 100, "nan", "None", "1e999",
                 "".join(rng.choices("0123456789+-*() ", k=30)) + "=", "".join(map(chr, range(1, 500)))]  # fmt: skip
        rows += [(p.prompt, a, text, cut) for text in wrong for cut in (False, True)]
        rows.append((p.prompt, a, a, True))  # right so far, but it never ended
    scores = score(REWARDS[reward], rows, 5.0)
    assert not scores.failures and len(scores.values) == len(rows)
    assert all(0 <= v < 1 if reward == "prefix" else v == 0 for v in scores.values)


def test_the_dense_reward_is_the_share_of_leading_characters():
    cases = [("12359", 1.0), ("12395", 3 / 6), ("1235", 4 / 6), ("", 0.0), ("123590", 5 / 7), ("2359", 0.0),
             ("1" * 11, 1 / 12)]  # fmt: skip
    for text, want in cases:
        assert REWARDS["prefix"]("52931>", "12359", text, False) == want
    assert REWARDS["prefix"]("52931>", "12359", "12359", True) == 5 / 6, "the end of text is missing"
    assert REWARDS["prefix"](">", "", "", False) == 1.0


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError


BAD = {
    "raised ValueError (no digits here)": lambda *_: int_of("no digits here"),
    "raised RecursionError (": lambda *_: endless(),
    "raised SystemExit (3)": lambda *_: exit_with(3),
    "raised Unspeakable (a Unspeakable without text)": lambda *_: raise_(Unspeakable()),
    "returned NoneType, not a number (None)": lambda *_: None,
    "returned str, not a number (1.0)": lambda *_: "1.0",
    "returned list, not a number ([1.0])": lambda *_: [1.0],
    "returned Tensor, not a number (": lambda *_: torch.ones(2),
    "returned complex, not a number (1j)": lambda *_: 1j,
    "returned no finite number (nan)": lambda *_: math.nan,
    "returned no finite number (inf)": lambda *_: np.float32("inf"),
    "returned no finite number (1": lambda *_: 10**400,
    "raised TypeError (": lambda prompt: 1.0,
}


def raise_(error):
    raise error


def int_of(text):
    raise ValueError(text)


def endless():
    return endless()


def exit_with(code):
    raise SystemExit(code)


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_reward_counts_as_zero_and_says_why_once(reason):
    good = row("good")

    def reward(*given):
        return 0.25 if given == good else BAD[reason](*given)

    scores = score(reward if "TypeError" not in reason else BAD[reason], [good, row(), good, row("7")], 5.0)
    if "TypeError" in reason:
        assert scores.values == [0.0] * 4
    else:
        assert scores.values == [0.25, 0.0, 0.25, 0.0]
    (told, count), = scores.failures.items()  # fmt: skip
    assert told.startswith(reason) and count == len([v for v in scores.values if v == 0])
    assert "\n" not in told and len(told) < 150


@pytest.mark.parametrize("value", [1, True, 0.5, -2.0, np.float32(0.5), np.float64(0.25), np.int64(3), Fraction(1, 4)])
def test_any_finite_number_is_a_reward(value):
    scores = score(lambda *_: value, [row()], 5.0)
    assert scores == Scores([float(value)], {}) and type(scores.values[0]) is float


def test_different_failures_are_counted_apart():
    def reward(prompt, answer, completion, truncated):
        return {"n": math.nan}[completion]

    scores = score(reward, [row("n"), row("a"), row("b"), row("n")], 5.0)
    assert scores.values == [0.0] * 4
    assert scores.failures == {"returned no finite number (nan)": 2, "raised KeyError ('a')": 2}


def test_no_rows_no_scores():
    assert score(REWARDS["exact"], [], 1.0) == Scores([], {})


def sleeper(prompt, answer, completion, truncated):
    if completion == "slow":
        time.sleep(30)
    if completion == "busy":
        while True:
            pass
    if completion == "stubborn":  # takes every exception for its own
        for _ in range(2):
            try:
                time.sleep(30)
            except BaseException:
                pass
    return 1.0


def test_a_reward_that_hangs_is_cut_off_and_the_next_ones_are_not():
    before = signal.getsignal(signal.SIGALRM)
    began = time.perf_counter()
    scores = score(sleeper, [row("slow"), row("fine"), row("busy"), row("fine"), row("stubborn"), row("fine")], 0.1)
    assert time.perf_counter() - began < 5
    assert scores.values == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    (told, count), = scores.failures.items()  # fmt: skip
    assert told.startswith("took too long (limit 0.1 s") and count == 3
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_of_somebody_else_still_rings():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        score(REWARDS["exact"], [row()] * 50, 5.0)
        deadline = time.perf_counter() + 5
        while not rung and time.perf_counter() < deadline:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [1]


def test_the_smallest_limit_breaks_nothing():
    scores = score(REWARDS["exact"], [row()] * 200, 1e-6)
    assert set(scores.values) <= {0.0, 1.0} and sum(scores.failures.values()) == scores.values.count(0.0)
    time.sleep(0.15)  # an alarm left behind would end the test run here


def test_ctrl_c_passes():
    with pytest.raises(KeyboardInterrupt):
        score(lambda *_: raise_(KeyboardInterrupt()), [row()], 5.0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_outside_the_main_thread_rewards_run_without_a_limit():
    found = []

    def reward(*_):
        time.sleep(0.05)
        return 1.0

    thread = threading.Thread(target=lambda: found.append(score(reward, [row()], 0.001)))
    thread.start()
    thread.join()
    assert found == [Scores([1.0], {})]
