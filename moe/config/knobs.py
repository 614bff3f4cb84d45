"""What a knob is: a dataclass field with its meaning and range, and the one kind of error a user can mend.

Not here: the knobs themselves (model.py, recipes.py), how a run's values are put together (load.py).
"""

from __future__ import annotations

import difflib
import math
import typing
from dataclasses import field, fields
from typing import Any


class UserError(ValueError):
    """Something the user can mend: the message names the key or file, the value, the rule and a way out, in one line."""


def knob(default: Any, meaning: str, *, choices: list | None = None, ge=None, gt=None, le=None, lt=None) -> Any:
    """A dataclass field that knows its meaning and its range; `factory` defaults for mutable values."""
    metadata = dict(meaning=meaning, choices=choices, ge=ge, gt=gt, le=le, lt=lt)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def value_at(schedule: float | list, progress: float) -> float:
    """Value of a schedule at `progress` in [0, 1] of the run.

    A schedule is a number, or points `[[progress, value], ...]` joined by straight lines; two points at one progress
    make a step, the later one counting from there on.
    """
    if isinstance(schedule, (int, float)):
        return float(schedule)
    value = float(schedule[0][1])
    for (p0, v0), (p1, v1) in zip(schedule, schedule[1:]):
        if progress >= p1:
            value = float(v1)
        elif progress >= p0:
            return float(v0 + (v1 - v0) * (progress - p0) / (p1 - p0))
    return value


def check_schedule(name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return
    try:
        points = [(float(p), float(v)) for p, v in value]
        ordered = all(a[0] <= b[0] for a, b in zip(points, points[1:]))
        fits = all(0 <= p <= 1 and v >= 0 and math.isfinite(v) for p, v in points)
        if points and ordered and fits:
            return
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"{name}={value} is not a schedule; write one number >= 0, or points [[progress, value], ...] with progress "
        "rising from 0 to 1, such as [[0, 0.3], [0.67, 0.3], [0.67, 0.1]]"
    )


class Section:
    """Base of every section: checks ranges and choices of its fields, naming the dotted key."""

    section = ""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, m = getattr(self, f.name), f.metadata
            key = f"{self.section}.{f.name}" if self.section else f.name
            if value is None or not m:
                continue
            if m.get("choices") and value not in m["choices"]:
                raise UserError(f"{key}={value!r} is not one of {m['choices']}{nearest(str(value), m['choices'])}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} must be a finite number")
            for rule, sign, ok in (
                ("ge", ">=", lambda v, r: v >= r),
                ("gt", ">", lambda v, r: v > r),
                ("le", "<=", lambda v, r: v <= r),
                ("lt", "<", lambda v, r: v < r),
            ):
                if m.get(rule) is not None and not ok(value, m[rule]):
                    raise UserError(f"{key}={value} must be {sign} {m[rule]}")


def nearest(word: str, options: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no option is close."""
    close = difflib.get_close_matches(word, [str(o) for o in options], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
