"""How the figures of a study read: numbers, differences with their intervals, claims with their verdicts."""

from __future__ import annotations

import math
import statistics as basic

from moe.study.grid import Claim, Metric
from moe.study.statistics import Difference, verdict

EXPECT = {"no_worse": "no worse than", "better": "better than", "equivalent": "equivalent to"}


def number(value: float) -> str:
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{value:g}"
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:,.0f}"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; the mean alone where all are equal."""
    if not values:
        return ""
    alike = min(values) == max(values)
    return number(basic.fmean(values)) + ("" if alike else f" ± {number(basic.stdev(values))}")


def seeds(count: int) -> str:
    return f"{count} seed" + ("s" if count != 1 else "")


def amount(metric: Metric, value: float) -> str:
    """A margin, a distance or a factor, as the YAML writes it."""
    return f"×{value:.3g}" if metric.scale == "ratio" else f"{value:.3g}"


def estimate(metric: Metric, d: Difference) -> str:
    return f"×{math.exp(d.mean):.3g}" if metric.scale == "ratio" else f"{d.mean:+.4f}"


def interval(metric: Metric, d: Difference) -> str:
    if not math.isfinite(d.half):
        return "no interval from one seed"
    if metric.scale == "ratio":
        return " to ".join(f"×{_exp(end):.3g}" for end in (d.low, d.high))
    return f"{d.low:+.4f} to {d.high:+.4f}"


def half(metric: Metric, d: Difference) -> str:
    """The smallest effect that could have been seen."""
    if not math.isfinite(d.half):
        return "?"
    return amount(metric, _exp(d.half) if metric.scale == "ratio" else d.half)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # further than any ratio; e^710 overflows


def claim(made: Claim, baseline: str, metric: Metric, d: Difference | None) -> str:
    """The verdict, the claim, what was found, and what could not have been."""
    says = f"`{made.arm}` is {EXPECT[made.expect]} `{baseline}` in {metric.label or metric.name}"
    says += f" by at least {amount(metric, made.by)}" if made.by is not None else ""
    says += f" (margin {amount(metric, metric.margin)})" if metric.margin is not None else ""
    said = f" {made.text}" if made.text else ""
    if d is None:
        return f"**inconclusive**: {says}: no pair of finished runs.{said}"
    word = verdict(d, made.expect, metric.distance(metric.margin), metric.distance(made.by), metric.better == "lower")
    seen = f"; the smallest effect this could have seen is {half(metric, d)}" if math.isfinite(d.half) else ""
    return f"**{word}**: {says}. Found {estimate(metric, d)} ({interval(metric, d)}; {seeds(d.seeds)}){seen}.{said}"
