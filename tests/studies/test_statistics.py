"""Student's distribution against published tables, the paired t-test against hand-computed values, Holm over arms."""

import math

import numpy as np
import pytest
import torch

from llava_moslora.studies.statistics import corrected, difference, paired_t, student_quantile, student_tail

# Quantiles of Student's distribution: Fisher and Yates's tables, as every textbook prints them.
TABLE = {
    0.975: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093, 30: 2.042, 120: 1.980},
    0.95: {1: 6.314, 2: 2.920, 4: 2.132, 10: 1.812, 19: 1.729},
    0.995: {1: 63.657, 4: 4.604, 19: 2.861},
}


@pytest.mark.parametrize("share", TABLE)
def test_quantiles_are_those_of_the_tables(share):
    for freedom, expected in TABLE[share].items():
        assert student_quantile(share, freedom) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 19, 40])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 9.0])
def test_the_tail_is_the_integral_of_the_density(t, freedom):
    """By Simpson's rule, in the angle atan(t / √ν), where the density is cos^(ν−1)."""
    angle = torch.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20_001, dtype=torch.float64)
    density = torch.cos(angle).clamp_min(0) ** (freedom - 1)
    weights = torch.ones_like(angle)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = float((weights * density).sum() * (angle[1] - angle[0]) / 3)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    assert student_tail(t, freedom) == pytest.approx(scale * integral, abs=1e-10)


def test_a_paired_test_by_hand():
    """Differences 1, 2, 3, 4: mean 2.5, standard error √(5/3)/2 = 0.6455, t = 3.873, and t(0.975; 3) = 3.1824."""
    mean, low, high, p = paired_t([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and (high - low) / 2 == pytest.approx(3.182446 * 0.645497, abs=1e-5)
    assert low + high == pytest.approx(5.0) and p == pytest.approx(0.030466, abs=1e-5)  # t.test of R
    assert paired_t([-1.0, -2.0, -3.0, -4.0])[3] == p


def test_p_and_interval_agree():
    """The interval leaves 0 out exactly where p is below 0.05."""
    generator = np.random.default_rng(1)
    outside = 0
    for _ in range(200):
        _, low, high, p = paired_t(generator.normal(0.8, 1, size=5).tolist())
        assert (low > 0 or high < 0) == (p < 0.05)
        outside += p < 0.05
    assert 20 < outside < 180


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        _, low, high, _ = paired_t(generator.normal(0.3, 1, size=4).tolist())
        held += low <= 0.3 <= high
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_differences_without_spread_claim_no_more_than_their_number_allows():
    assert paired_t([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5, 0.25)  # 2 of 8 signs are as extreme
    assert paired_t([0.0, 0.0])[3] == 1.0


def test_pairs_are_the_seeds_that_both_have():
    one = difference({1: 2.0, 2: 3.0, 3: 9.0}, {1: 1.0, 2: 1.5, 4: 0.0})
    assert one.by_seed == {1: 1.0, 2: 1.5} and one.mean == 1.25
    assert one.low < one.bootstrap[0] == 1.0 and one.bootstrap[1] == 1.5 < one.high
    assert difference({1: 2.0}, {1: 1.0}) is None and difference({1: 2.0, 2: 3.0}, {3: 1.0, 4: 2.0}) is None


def test_holm_over_arms():
    """Smallest p times 3, next times 2, never falling; rows without a test do not count."""
    values = {"a": [1.0, 1.1, 0.9, 1.05], "b": [0.2, 0.5, -0.1, 0.3], "c": [0.6, 0.5, 0.9, 0.2]}
    base = dict.fromkeys(range(4), 0.0)
    found = [difference(dict(enumerate(v)), base) for v in values.values()]
    a, none, b, c = corrected([found[0], None, found[1], found[2]])
    assert none is None and [one.p for one in (a, b, c)] == [one.p for one in found]
    assert a.p < c.p < b.p and a.adjusted == pytest.approx(3 * a.p)
    assert c.adjusted == pytest.approx(2 * c.p) and b.adjusted == pytest.approx(max(b.p, 2 * c.p))
