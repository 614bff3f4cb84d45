"""Rewards: what an answer is worth, and how a reward of anybody's is called without bringing the run down.

    reward(prompt, answer, completion, truncated) -> number        truncated: cut at the longest length, no end of text

    exact        1 for the very answer, ended; else 0
    prefix       share of leading characters that are right, the end of text counted as one; 1 for the very answer alone.
                 Dense: a wrong answer earns something, so it measures progress and not success
    countdown    1 for any expression over the given numbers that reaches the target, ended; else 0

A reward is a pure function of text. Not here: what rewards are good for (objectives/), learned reward models, processes
of their own: code that never returns to Python cannot be interrupted.
"""

from __future__ import annotations

import math
import numbers
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from moe.data.tasks import countdown_solved

Reward = Callable[[str, str, str, bool], float]


def exact(prompt: str, answer: str, completion: str, truncated: bool) -> float:
    return float(completion == answer and not truncated)


def prefix(prompt: str, answer: str, completion: str, truncated: bool) -> float:
    right = len(os.path.commonprefix([answer, completion]))
    ended = completion == answer and not truncated
    return (right + ended) / (max(len(answer), len(completion)) + 1)


def countdown(prompt: str, answer: str, completion: str, truncated: bool) -> float:
    return float(not truncated and countdown_solved(prompt, completion))


REWARDS: dict[str, Reward] = {"exact": exact, "prefix": prefix, "countdown": countdown}


# ------------------------------------------------------------------------------------------------------------- scoring


class Scores(NamedTuple):
    values: list[float]
    failures: Counter[str]
    """What went wrong, with its first message -> rewards that counted as 0 for it."""


def score(reward: Reward, rows: Sequence[tuple], timeout: float) -> Scores:
    """`reward` of every row (prompt, answer, completion, truncated).

    One that raises, takes longer than `timeout` seconds or returns no finite number counts as 0. The limit holds in the
    main thread of systems with interval timers; elsewhere there is none. Ctrl-C passes.
    """
    values, counts, examples = [], Counter[str](), {}
    for row in rows:
        value, failure, example = _one(reward, row, timeout)
        values.append(value)
        if failure:
            counts[failure] += 1
            examples.setdefault(failure, example)
    return Scores(values, Counter({f"{reason} ({examples[reason]})": n for reason, n in counts.items()}))


def _one(reward: Reward, row: tuple, timeout: float) -> tuple[float, str, str]:
    """-> (value, reason of a failure or "", example)."""
    try:
        with _limit(timeout):
            value = reward(*row)
    except KeyboardInterrupt:
        raise
    except _Late:
        return 0.0, "took too long", f"limit {timeout:g} s, row {_short(row)}"
    except BaseException as error:  # SystemExit too: an answer must not end the run
        return 0.0, f"raised {type(error).__name__}", _short(error)
    try:
        number = float(value) if isinstance(value, numbers.Real) else None
    except Exception:  # such as an integer of a thousand digits
        number = math.inf
    if number is None:
        return 0.0, f"returned {type(value).__name__}, not a number", _short(value)
    return (number, "", "") if math.isfinite(number) else (0.0, "returned no finite number", _short(value))


class _Late(BaseException):
    """Not an Exception, which a reward may well catch."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises _Late inside the block once `seconds` are over, and again every tenth of a second if it is caught."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    running, rung = True, False

    def ring(*_: object) -> None:
        nonlocal rung
        if running:
            rung = True
            raise _Late

    handler, timer = signal.signal(signal.SIGALRM, ring), signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
            yield
            if rung:  # and the reward took it for an error of its own
                raise _Late
        finally:
            running = False
    finally:  # of its own: the bell may ring in the one before
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _short(value: object) -> str:
    """One line of at most 80 characters."""
    try:
        text = " ".join(str(value).split())
    except Exception:
        text = f"a {type(value).__name__} without text"
    return text if len(text) <= 80 else text[:77] + "..."
