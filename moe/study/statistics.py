"""Many arms against one baseline over a few seeds: paired differences, their intervals, and what they say in words.

A seed sets initialisation and data order in every arm, so arms are compared seed by seed:

    d_s = arm_s - baseline_s,   interval = mean(d) +- c * spread / sqrt(seeds),   `half` = the half width

c covers all arms at once (Dunnett: they share the baseline, so their comparisons correlate by 1/2). Two spreads:

    own      standard deviation of this arm's d, seeds - 1 degrees of freedom. Needs no assumption on other arms, and is
             wide: with three seeds and two arms c is 6.1
    pooled   one for all arms, from the residuals of seed + arm, (arms - 1)(seeds - 1) degrees of freedom (Dunnett in
             randomised blocks): about half as wide, right where all arms scatter alike

Effects smaller than `half` cannot be told from nothing. The same 95 % interval is read for a difference and for
equivalence, which is stricter than two one-sided tests at 5 % (those use 90 %).
Sources: Dunnett, JASA 50 (1955) and Biometrics 20 (1964). Not here: more than one family; each metric is one of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

Values = dict[int, float]  # seed -> figure
DRAWS = 400_000


# ----------------------------------------------------------------------------------------------------- critical values


@lru_cache
def dunnett(comparisons: int, df: int, level: float = 0.95) -> float:
    """c of two-sided Dunnett with equal sample sizes and one pooled spread; Student's t for one comparison.

    P(all |t| < c) is an integral over the spread and the baseline, solved by bisection: three correct digits.
    """
    root = torch.linspace(1e-6, math.sqrt(1 + 9 / math.sqrt(df)), 1001, dtype=torch.float64)
    u = root**2  # sample spread / true spread; steps are finest near 0, where one degree of freedom needs them
    weight = torch.exp((df - 1) * torch.log(u) - df * u**2 / 2) * root
    weight = weight / weight.sum()
    z = torch.linspace(-8, 8, 401, dtype=torch.float64)  # the baseline's error
    normal = torch.exp(-(z**2) / 2)
    normal = normal / normal.sum()

    def covered(c: float) -> float:
        reach = c * math.sqrt(2) * u.unsqueeze(1)  # rho = 1/2: (z / sqrt 2 +- c u) / sqrt(1 - rho)
        inside = torch.special.ndtr(z + reach) - torch.special.ndtr(z - reach)
        return float(weight @ inside**comparisons @ normal)

    return _solve(covered, level)


@lru_cache
def dunnett_own(comparisons: int, seeds: int, level: float = 0.95) -> float:
    """c where each comparison has its own spread: quantile of max |t| over simulated studies of equal arms, within 1 %.

    For one comparison Student's t. Arms of unequal scatter change the correlation alone: each |t| stays Student's, and
    c lies between Student's t and Bonferroni's, which for three seeds and two arms are 4.3 and 6.2.
    """
    if comparisons == 1:
        return dunnett(1, seeds - 1, level)
    draw = torch.Generator().manual_seed(0)
    worst = torch.zeros(DRAWS, dtype=torch.float64)
    baseline = torch.randn(DRAWS, seeds, generator=draw, dtype=torch.float64)
    for _ in range(comparisons):
        d = torch.randn(DRAWS, seeds, generator=draw, dtype=torch.float64) - baseline
        worst = torch.maximum(worst, (d.mean(1) / d.std(1)).abs() * math.sqrt(seeds))
    return float(worst.kthvalue(math.ceil(level * DRAWS)).values)


def _solve(covered, level: float) -> float:
    low, high = 0.0, 1.0
    while covered(high) < level:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) < level else (low, middle)
    return (low + high) / 2


# -------------------------------------------------------------------------------------------------- paired differences


class Difference(NamedTuple):
    """Arm minus baseline; of a metric on the scale `ratio`, of logarithms."""

    mean: float
    half: float
    """Half width of the interval: the smallest effect that could have been seen. Infinite for a single seed."""
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def compare(
    baseline: Values, arms: dict[str, Values], spread: str = "own", level: float = 0.95
) -> dict[str, Difference]:
    """Every arm against the baseline, over the seeds that both have (pooled: that all have)."""
    arms = {name: values for name, values in arms.items() if values.keys() & baseline.keys()}  # others cannot compare
    shared = set(baseline).intersection(*arms.values()) if spread == "pooled" else set(baseline)
    d = {name: np.array([v[s] - baseline[s] for s in sorted(shared & v.keys())]) for name, v in arms.items()}
    d = {name: values for name, values in d.items() if len(values)}
    pooled = _pooled(np.stack([np.zeros(len(shared)), *d.values()])) if spread == "pooled" and len(shared) > 1 else None
    result = {}
    for name, values in d.items():
        n = len(values)
        if n < 2:
            half = math.inf
        elif pooled is not None:
            half = dunnett(len(d), len(d) * (n - 1), level) * pooled / math.sqrt(n)
        else:
            half = dunnett_own(len(d), n, level) * float(values.std(ddof=1)) / math.sqrt(n)
        result[name] = Difference(float(values.mean()), half, n)
    return result


def _pooled(values: np.ndarray) -> float:
    """[arms, seeds] -> standard deviation of a difference of two arms, from the residuals of arm + seed.

    Taking the baseline off every arm beforehand, as `compare` does, only moves the seeds' effect.
    """
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    arms, seeds = values.shape
    return math.sqrt(2 * float((residual**2).sum()) / ((arms - 1) * (seeds - 1)))


# ------------------------------------------------------------------------------------------------------------ verdicts


def reading(d: Difference, margin: float, lower_is_better: bool = True) -> str:
    """What a difference says by itself: better, worse, equivalent within the margin, or inconclusive."""
    if math.isfinite(d.half) and -margin <= d.low and d.high <= margin:
        return "equivalent within the margin"
    if d.low > 0 or d.high < 0:
        return "better" if (d.high < 0) == lower_is_better else "worse"
    return "inconclusive"


def verdict(d: Difference, expect: str, margin: float, by: float = 0.0, lower_is_better: bool = True) -> str:
    """What a difference says of a claim made beforehand: supports, contradicts, equivalent within the margin, or
    inconclusive.

    no_worse     worse by at most the margin
    better       better by at least `by`, and not merely within the margin
    equivalent   within the margin on both sides
    """
    low, high = (d.low, d.high) if lower_is_better else (-d.high, -d.low)  # from here on: positive is worse
    if not math.isfinite(d.half):
        return "inconclusive"
    within = -margin <= low and high <= margin
    if expect == "no_worse":
        return "supports" if high <= margin else "contradicts" if low > margin else "inconclusive"
    if expect == "equivalent":
        return "supports" if within else "contradicts" if low > margin or high < -margin else "inconclusive"
    assert expect == "better", expect
    if within:
        return "equivalent within the margin"
    if high < 0 and high <= -by:
        return "supports"
    return "contradicts" if low > -by else "inconclusive"
