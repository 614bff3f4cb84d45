"""Figures as a reader meets them."""

import math

import pytest

from moe.study import words
from moe.study.grid import Claim, Metric
from moe.study.statistics import Difference

AMOUNT, RATIO = Metric(name="val/loss", label="loss", margin=0.01), Metric(name="val/maxvio", scale="ratio", margin=1.2)


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (3.0, "3"), (1.23456, "1.2346"), (-0.5, "-0.5000"), (12.345, "12.35"), (12345.6, "12,346")],
)
def test_numbers(value, text):
    assert words.number(value) == text


def test_spread_over_seeds():
    assert words.spread([1.0, 2.0, 3.0]) == "2 ± 1" and words.spread([0.5, 0.5]) == "0.5000"
    assert words.spread([0.25]) == "0.2500" and words.spread([]) == ""


def test_differences_are_amounts_or_factors():
    d = Difference(-0.5, 1.0, 3)
    assert (words.estimate(AMOUNT, d), words.interval(AMOUNT, d)) == ("-0.5000", "-1.5000 to +0.5000")
    d = Difference(math.log(0.5), math.log(2), 3)
    assert (words.estimate(RATIO, d), words.interval(RATIO, d)) == ("×0.5", "×0.25 to ×1")
    assert (words.half(RATIO, d), words.half(AMOUNT, Difference(0.0, 0.25, 2))) == ("×2", "0.25")
    assert words.half(RATIO, Difference(0.0, math.inf, 1)) == "?" and "one seed" in words.interval(
        RATIO, Difference(0.0, math.inf, 1)
    )
    assert "inf" not in words.interval(RATIO, Difference(0.0, 1e4, 2))


def test_a_claim_reads_as_verdict_claim_finding_and_power():
    made = Claim(metric="val/maxvio", arm="bias", expect="better", by=3.0, text="Said so.")
    assert words.claim(made, "aux", RATIO, Difference(-math.log(8), math.log(2), 3)) == (
        "**supports**: `bias` is better than `aux` in val/maxvio by at least ×3 (margin ×1.2). Found ×0.125 (×0.0625 to "
        "×0.25; 3 seeds); the smallest effect this could have seen is ×2. Said so."
    )
    made = Claim(metric="val/loss", arm="bias", expect="no_worse")
    text = words.claim(made, "aux", AMOUNT, Difference(0.005, 0.02, 3))
    assert text.startswith(
        "**inconclusive**: `bias` is no worse than `aux` in loss (margin 0.01). Found +0.0050 (-0.0150 to"
    )
    assert words.claim(made, "aux", AMOUNT, Difference(0.0, math.inf, 1)).startswith("**inconclusive**")
    assert "no pair of finished runs" in words.claim(made, "aux", AMOUNT, None)
