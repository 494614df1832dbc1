"""Is B better than A? Paired comparison of two results on the same questions.

Separate scores differ by chance as much as the methods of a paper do; on the same questions most of that noise
cancels. A benchmark gets a 95 % interval of the difference from a paired bootstrap over its units (questions, circular
groups, images), and a p-value: McNemar's exact test where every unit is right or wrong, a sign-flip test elsewhere.
Several benchmarks are corrected by Holm's method, and the verdict is one sentence.

Sources: Efron and Tibshirani 1993, chapter 13 (percentile interval); McNemar 1947; Good 2005 (sign flips); Holm 1979.
Bonett and Price 2012 (differences that are all equal). The interval of one score alone is no bootstrap: Wilson 1927;
Price and Bonett 2004; Cochran 1977.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.scoring import Score, Unit, score_of

RESAMPLES = 10_000
ALPHA = 0.05
NORMAL_975 = 1.959963984540054  # quantile of the normal distribution


@dataclass(frozen=True)
class Difference:
    """B − A on one benchmark, in points of the score.

    Attributes:
        low, high: the 95 % interval of ``points``, not corrected for several benchmarks.
        p: two-sided, not corrected.
        adjusted: ``p`` after Holm's correction over the benchmarks compared.
        gained, lost: units on which B is better, and worse.
        units: their total number.
    """

    a: float
    b: float
    points: float
    low: float
    high: float
    p: float
    adjusted: float
    gained: int
    lost: int
    units: int

    @property
    def verdict(self) -> str:
        """``B is better``, ``A is better`` or ``inside the noise``, by the corrected p-value."""
        if self.adjusted >= ALPHA:
            return "inside the noise"
        return "B is better" if self.points > 0 else "A is better"


@dataclass(frozen=True)
class Comparison:
    """All benchmarks that both results have, and the difference of their average with its 95 % interval."""

    differences: dict[str, Difference]
    points: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        names: dict[str, list[str]] = {verdict: [] for verdict in ("B is better", "A is better", "inside the noise")}
        for name, difference in self.differences.items():
            names[difference.verdict].append(name)
        noise = names.pop("inside the noise")
        parts = [f"{verdict} on {', '.join(on)}" for verdict, on in names.items() if on]
        if noise:
            where = "every benchmark" if len(noise) == len(self.differences) else ", ".join(noise)
            parts.append(f"the difference is inside the noise on {where}")
        text = "; ".join(parts) + "."
        if len(self.differences) > 1:
            text += f" Average: {self.points:+.1f} points, 95 % interval {self.low:+.1f} to {self.high:+.1f}"
            text += "." if self.low > 0 or self.high < 0 else ", so inside the noise."
        return text[0].upper() + text[1:]


def compare(a: Mapping[str, Score], b: Mapping[str, Score], *, seed: int = 0) -> Comparison:
    """Benchmark → score of A and of B, without benchmarks that only one of them has or that need a judge.

    Raises:
        Refusal: C-COMPARE, no benchmark in common, other rules, or other questions.
    """
    names = [name for name in a if name in b and a[name].value is not None and b[name].value is not None]
    if not names:
        raise Refusal("C-COMPARE", "the results have no scored benchmark in common", key="--compare")
    generator, differences, samples = np.random.default_rng(seed), {}, []
    for name in names:
        differences[name], resampled = _difference(*paired(name, a[name], b[name]), generator)
        samples.append(resampled)
    adjusted = holm([difference.p for difference in differences.values()])
    differences = {name: replace(d, adjusted=p) for (name, d), p in zip(differences.items(), adjusted, strict=True)}
    average = sum(difference.points for difference in differences.values()) / len(differences)
    return Comparison(differences, average, *interval(np.mean(samples, axis=0)))


def _difference(a: list[Unit], b: list[Unit], generator: np.random.Generator) -> tuple[Difference, np.ndarray]:
    """B − A on the same units, not corrected yet, and its bootstrap samples."""
    units = [Unit(x.id, y.value - x.value, x.stratum) for x, y in zip(a, b, strict=True)]
    gained, lost = sum(unit.value > 0 for unit in units), sum(unit.value < 0 for unit in units)
    right_or_wrong = {x.value for x in (*a, *b)} <= {0.0, 100.0} and len({x.stratum for x in a}) == 1
    p = mcnemar(gained, lost) if right_or_wrong else sign_flip(units, generator)
    samples = bootstrap(with_spread(units), generator)
    low, high = interval(samples)
    points = score_of(units)
    low, high = min(low, points), max(high, points)
    difference = Difference(
        score_of(a), score_of(b), points, low, high, p=p, adjusted=p, gained=gained, lost=lost,
        units=len(units),
    )  # fmt: skip
    return difference, samples


def with_spread(units: list[Unit]) -> list[Unit]:
    """The units of a difference; if all of a stratum are equal, with one of +100 and one of -100 added.

    Otherwise the bootstrap interval of equal units would have zero width, as if a few questions with equal answers
    proved that the models are equal. Bonett and Price (2012) add one discordant pair each way to paired proportions.
    """
    values: dict[str, set[float]] = defaultdict(set)
    for unit in units:
        values[unit.stratum].add(round(unit.value, 9))
    equal = [stratum for stratum, found in values.items() if len(found) == 1]
    return units + [Unit(f"{sign:+d}", 100.0 * sign, stratum) for stratum in equal for sign in (1, -1)]


def paired(name: str, a: Score, b: Score) -> tuple[list[Unit], list[Unit]]:
    """The units of both, in one order.

    Raises:
        Refusal: C-COMPARE.
    """
    if a.rules != b.rules:
        raise Refusal(
            "C-COMPARE", "scored by different rules", key=name, found=f"{a.rules} and {b.rules}",
            fix="score both by the same --rules: the answers are kept",
        )  # fmt: skip
    first, second = ({(unit.stratum, unit.id): unit for unit in score.units} for score in (a, b))
    if first.keys() != second.keys():
        other = len(first.keys() ^ second.keys())
        raise Refusal(
            "C-COMPARE", "not the same questions", key=name, found=f"{other} questions that only one result has",
            fix="evaluate both with the same file and the same --limit",
        )  # fmt: skip
    return list(first.values()), [second[key] for key in first]


def score_interval(units: Sequence[Unit]) -> tuple[float, float]:
    """95 % interval of one score, in percent: Wilson's for right and wrong units, else :func:`adjusted_interval`."""
    values = {unit.value for unit in units}
    if values <= {0.0, 100.0} and len({unit.stratum for unit in units}) == 1:
        return wilson(sum(unit.value == 100.0 for unit in units), len(units))
    return adjusted_interval(units)


def adjusted_interval(units: Sequence[Unit]) -> tuple[float, float]:
    """95 % interval of a mean of strata with graded units; in percent, with nonzero width, containing the score.

    A normal interval after 2 / strata units of 0 and as many of 100 were added to every stratum (Price and Bonett 2004,
    for linear functions of proportions; of one stratum Agresti and Coull's), because a stratum whose units score alike
    says less than that it has no variance. As every mean takes a degree of freedom, which may be the only one of its
    stratum, each gets one of the variance of all units (as in collapsed strata: Cochran 1977, section 5A.12).
    """
    strata = [values / 100 for values in _strata(units)]
    added = 2 / len(strata)
    pooled = np.concatenate([*strata, [0.0, 0.0, 1.0, 1.0]]).var()
    middle = variance = 0.0
    for values in strata:
        count = len(values) + 2 * added
        mean = (values.sum() + added) / count
        squares = (values**2).sum() + added - count * mean**2
        middle += mean / len(strata)
        variance += (squares + pooled) / (count * len(strata)) ** 2
    half, score = NORMAL_975 * sqrt(variance), score_of(units)
    return max(0.0, min(100 * (middle - half), score)), min(100.0, max(100 * (middle + half), score))


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of ``right`` out of ``total``, in percent (Wilson 1927)."""
    share, z = right / total, NORMAL_975
    middle = share + z * z / (2 * total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 100.0 / (1 + z * z / total)
    low, high = scale * (middle - half), scale * (middle + half)
    return max(0.0, min(low, 100 * share)), min(100.0, max(high, 100 * share))  # of none or all, but for rounding


def bonett_price(gained: int, lost: int, total: int) -> tuple[float, float]:
    """95 % interval of (gained − lost) / total, in percent, with nonzero width: one unit each way is added to the
    shares and to their variance (Bonett and Price 2012, the adjusted Wald interval of paired proportions)."""
    plus, minus = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    middle = plus - minus
    half = NORMAL_975 * sqrt((plus + minus - middle**2) / (total + 2))
    points = 100 * (gained - lost) / total
    return max(-100.0, min(100 * (middle - half), points)), min(100.0, max(100 * (middle + half), points))


def bootstrap(units: Sequence[Unit], generator: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """Scores of ``resamples`` draws of the units with replacement, within each stratum; float64[resamples].

    A draw of n units out of n is, for the mean, a multinomial draw of how often each distinct value comes.
    """
    means = []
    for values in _strata(units):
        distinct, counts = np.unique(values, return_counts=True)
        draws = generator.multinomial(len(values), counts / len(values), size=resamples)
        means.append(draws @ distinct / len(values))
    return np.mean(means, axis=0)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap samples."""
    low, high = np.quantile(samples, (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of a split at least this uneven of the units on which A and B differ (McNemar's test)."""
    total, ways, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):
        tail += ways  # ways = total over k
        ways = ways * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def sign_flip(differences: Sequence[Unit], generator: np.random.Generator, flips: int = RESAMPLES) -> float:
    """Two-sided p of the mean difference if A and B were exchangeable on every unit, from random exchanges.

    At least 1 / (flips + 1).
    """
    means = []
    for values in _strata(differences):
        size, counts = np.unique(np.abs(values), return_counts=True)
        flipped = generator.binomial(counts, 0.5, size=(flips, len(counts)))
        means.append((2 * flipped - counts) @ size / len(values))
    observed, flipped = abs(score_of(differences)), np.abs(np.mean(means, axis=0))
    return float((1 + np.count_nonzero(flipped >= observed - 1e-9)) / (flips + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of one false claim among all stays below the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _strata(units: Sequence[Unit]) -> Iterator[np.ndarray]:
    values = defaultdict(list)
    for unit in units:
        values[unit.stratum].append(unit.value)
    return (np.round(np.asarray(v, dtype=np.float64), 9) for v in values.values())
