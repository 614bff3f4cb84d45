"""Critical values against published tables, intervals against loops and by how often they cover, verdicts branch by branch."""

import math
import random

import numpy as np
import pytest

from moe.study.statistics import Difference, compare, dunnett, dunnett_own, reading, verdict

INF = math.inf


@pytest.mark.parametrize(
    "comparisons, df, published",
    [
        (1, 1, 12.706), (1, 2, 4.303), (1, 10, 2.228), (1, 120, 1.980),  # Student's t
        (2, 5, 3.03), (2, 10, 2.57), (3, 20, 2.54), (9, 30, 2.86), (4, 60, 2.51),  # Dunnett 1964, two-sided 5 %
    ],
)  # fmt: skip
def test_critical_values_are_the_published_ones(comparisons, df, published):
    assert dunnett(comparisons, df) == pytest.approx(published, abs=0.0051)


def test_another_level_is_another_column_of_the_table():
    assert dunnett(1, 10, 0.99) == pytest.approx(3.169, abs=0.002)
    assert dunnett(2, 10, 0.99) == pytest.approx(3.53, abs=0.006)


@pytest.mark.parametrize("comparisons, seeds", [(1, 3), (2, 3), (3, 4)])
def test_own_spreads_lie_between_student_and_bonferroni(comparisons, seeds):
    value = dunnett_own(comparisons, seeds)
    student, bonferroni = (dunnett(1, seeds - 1, 1 - 0.05 / n) for n in (1, comparisons))
    assert student * (1 - 1e-3) <= value <= bonferroni * 1.01
    assert value >= dunnett(comparisons, seeds - 1) * 0.99  # one shared spread makes the comparisons more alike
    assert dunnett_own(comparisons, seeds) == value


@pytest.mark.parametrize("spread", ["own", "pooled"])
def test_intervals_cover_all_arms_at_once_as_often_as_they_say(spread):
    """Equal arms with strong seed effects: in 95 % of studies every interval holds zero."""
    draw, seeds, studies = np.random.default_rng(), 3, 1500
    hits = 0
    for _ in range(studies):
        effect = draw.normal(size=seeds) * 10
        arms = [dict(enumerate(effect + draw.normal(size=seeds))) for _ in range(4)]
        found = compare(arms[0], {str(i): a for i, a in enumerate(arms[1:])}, spread)
        hits += all(d.low <= 0 <= d.high for d in found.values())
    assert abs(hits / studies - 0.95) < 0.0225  # four standard errors


def test_one_arm_is_the_paired_t_test_in_both_spreads():
    dice = random.Random()
    a, b = ({s: dice.gauss(0, 1) for s in range(5)} for _ in range(2))
    d = [b[s] - a[s] for s in range(5)]
    mean = sum(d) / 5
    sd = math.sqrt(sum((x - mean) ** 2 for x in d) / 4)
    for spread in ("own", "pooled"):
        found = compare(a, {"b": b}, spread)["b"]
        assert found.mean == pytest.approx(mean) and found.seeds == 5
        assert found.half == pytest.approx(2.776 * sd / math.sqrt(5), rel=1e-3)


def test_the_pooled_spread_is_that_of_the_residuals_by_loops():
    dice = random.Random()
    table = [[dice.gauss(0, 1) + 5 * s for s in range(4)] for _ in range(3)]  # [arms][seeds]
    grand = sum(map(sum, table)) / 12
    square = 0.0
    for a in range(3):
        for s in range(4):
            seed_mean = sum(table[i][s] for i in range(3)) / 3
            square += (table[a][s] - sum(table[a]) / 4 - seed_mean + grand) ** 2
    found = compare(
        dict(enumerate(table[0])), {"x": dict(enumerate(table[1])), "y": dict(enumerate(table[2]))}, "pooled"
    )
    want = dunnett(2, 6) * math.sqrt(2 * square / 6 / 4)
    assert [d.half for d in found.values()] == pytest.approx([want, want])


def test_unpaired_seeds_are_left_out():
    baseline = {0: 1.0, 1: 2.0, 2: 4.0}
    own = compare(baseline, {"a": {0: 2.0, 1: 3.5, 9: 100.0}, "b": {0: 1.0, 1: 2.5, 2: 4.0}, "c": {}})
    assert {k: d.seeds for k, d in own.items()} == {"a": 2, "b": 3} and own["a"].mean == 1.25
    pooled = compare(baseline, {"a": {0: 2.0, 1: 3.5}, "b": {0: 1.0, 1: 2.5, 2: 50.0}}, "pooled")
    assert {d.seeds for d in pooled.values()} == {2} and pooled["b"].mean == 0.25


def test_one_seed_has_a_difference_and_no_interval():
    for spread in ("own", "pooled"):
        d = compare({7: 1.0}, {"a": {7: 3.0}, "b": {7: 1.0}}, spread)["a"]
        assert (d.mean, d.half, d.seeds) == (2.0, INF, 1)
        assert reading(d, 100.0) == verdict(d, "no_worse", 100.0) == "inconclusive"


E, S, C, N = "equivalent within the margin", "supports", "contradicts", "inconclusive"


@pytest.mark.parametrize(
    "expect, by, interval, word",
    [
        # margin 1, lower is better
        ("no_worse", 0, (-5, -2), S), ("no_worse", 0, (-5, 0.9), S), ("no_worse", 0, (-0.5, 0.5), S),
        ("no_worse", 0, (0.2, 1.0), S), ("no_worse", 0, (0.2, 1.1), N), ("no_worse", 0, (-3, 1.1), N),
        ("no_worse", 0, (1.1, 2), C), ("no_worse", 0, (1.0, 2), N),
        ("better", 0, (-5, -2), S), ("better", 0, (-5, -0.1), S), ("better", 0, (-0.9, -0.1), E), ("better", 0, (-1, 1), E),
        ("better", 0, (-5, 0.1), N), ("better", 0, (0.1, 5), C), ("better", 0, (0.1, 0.9), E),
        ("better", 3, (-5, -3), S), ("better", 3, (-5, -2.9), N), ("better", 3, (-2.9, -1.5), C),
        ("better", 3, (-2.9, 4), C), ("better", 3, (-3.1, 4), N), ("better", 3, (-0.5, 0.5), E),
        ("equivalent", 0, (-1, 1), S), ("equivalent", 0, (-1.1, 1), N), ("equivalent", 0, (-9, 9), N),
        ("equivalent", 0, (1.1, 2), C), ("equivalent", 0, (-2, -1.1), C), ("equivalent", 0, (0.5, 1.5), N),
    ],
)  # fmt: skip
def test_verdicts(expect, by, interval, word):
    low, high = interval
    d = Difference((low + high) / 2, (high - low) / 2, 3)
    d = Difference(round(d.mean, 10), round(d.half, 10), 3)
    assert verdict(d, expect, 1.0, by) == word
    assert verdict(d._replace(mean=-d.mean), expect, 1.0, by, lower_is_better=False) == word


@pytest.mark.parametrize(
    "interval, word",
    [
        ((-2, -1), "better"),
        ((1, 2), "worse"),
        ((-0.25, 0.25), E),
        ((0.25, 0.5), E),
        ((-2, 0.5), N),
        ((0.25, 2), "worse"),
    ],
)
def test_readings(interval, word):
    low, high = interval
    d = Difference((low + high) / 2, (high - low) / 2, 3)
    assert reading(d, 0.5) == word
    other = {"better": "worse", "worse": "better"}.get(word, word)
    assert reading(d, 0.5, lower_is_better=False) == other


def test_without_a_margin_only_equal_figures_are_equivalent():
    assert reading(Difference(0.0, 0.0, 3), 0.0) == E and reading(Difference(0.1, 0.2, 3), 0.0) == N


@pytest.mark.parametrize("spread", ["own", "pooled"])
def test_an_arm_without_a_result_leaves_the_others_compared(spread):
    baseline, arm = {0: 1.0, 1: 2.0, 2: 4.0}, {0: 1.5, 1: 2.75, 2: 4.25}
    with_empty = compare(baseline, {"a": arm, "failed": {}}, spread)
    assert with_empty == compare(baseline, {"a": arm}, spread) and set(with_empty) == {"a"}
