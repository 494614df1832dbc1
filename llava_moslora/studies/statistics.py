"""An arm against the baseline, paired by seed: runs of one seed see the same batches, so most of the noise cancels.

The interval is the paired t-interval, the p-value that of the paired t-test (Student 1908). The percentile bootstrap of
the same differences is computed too; with three to five seeds it is too narrow, because it underestimates the spread:
verdicts follow the t-test. Multiple comparisons are corrected by Holm's method (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_moslora.evaluation.compare import ALPHA, bootstrap, holm, interval
from llava_moslora.evaluation.scoring import Unit


@dataclass(frozen=True)
class Difference:
    """Arm − baseline in the unit of the measure, over the seeds that both have.

    Attributes:
        by_seed: seed → difference.
        low, high: 95 % t-interval of ``mean``, not corrected for several comparisons.
        bootstrap: 95 % percentile interval of the same.
        p: two-sided, not corrected. adjusted: after Holm's correction.
    """

    by_seed: dict[int, float]
    mean: float
    low: float
    high: float
    bootstrap: tuple[float, float]
    p: float
    adjusted: float

    @property
    def significant(self) -> bool:
        return self.adjusted < ALPHA

    @property
    def largest(self) -> float:
        """The largest absolute difference in the interval."""
        return max(abs(self.low), abs(self.high))


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Seed → value of both; None with fewer than two seeds in common. ``adjusted`` is ``p`` still."""
    seeds = sorted(arm.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    by_seed = {seed: arm[seed] - baseline[seed] for seed in seeds}
    mean, low, high, p = paired_t(list(by_seed.values()))
    units = [Unit(str(seed), value) for seed, value in by_seed.items()]
    drawn = interval(bootstrap(units, np.random.default_rng(0)))
    return Difference(by_seed, mean, low, high, drawn, p, p)


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The same with ``adjusted`` after Holm's correction over all of them."""
    there = [number for number, one in enumerate(differences) if one is not None]
    adjusted = dict(zip(there, holm([one.p for one in differences if one is not None]), strict=True))
    return [None if one is None else replace(one, adjusted=adjusted[k]) for k, one in enumerate(differences)]


def paired_t(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean of the differences, its 95 % interval, and the two-sided p of a mean of zero.

    For differences that are all the same, and so have no spread, p is that of the exact sign-flip test:
    2 / 2ⁿ, or 1 if they are zero.
    """
    count, mean = len(values), float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    if error <= 1e-12 * max(abs(mean), 1e-300):
        return mean, mean, mean, 1.0 if mean == 0 else 2.0 ** (1 - count)
    half = student_quantile(1 - ALPHA / 2, count - 1) * error
    return mean, mean - half, mean + half, 2 * student_tail(abs(mean) / error, count - 1)


def student_tail(t: float, freedom: int) -> float:
    """The chance of a value above ``t`` ≥ 0 under Student's distribution with ``freedom`` ≥ 1 degrees of freedom.

    The finite sums for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4). Rounding makes the
    result exact to about 1e-15, not to its relative digits.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 0.0, 0.0
    if freedom % 2:
        term = cosine
        for k in range(3, freedom, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        total = (total + (term if freedom > 1 else 0.0)) * math.sin(angle)
        between = 2 / math.pi * (angle + total)
    else:
        term = 1.0
        for k in range(2, freedom, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        between = (total + term) * math.sin(angle)
    return max(0.0, (1 - between) / 2)


def student_quantile(share: float, freedom: int) -> float:
    """The value with ``share`` > 1/2 of Student's distribution below it, by bisection."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > 1 - share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - share else (low, middle)
    return (low + high) / 2
