"""Intervals, tests and verdicts against values of scipy 1.17.1 and statsmodels 0.15.0, and against simulation."""

import numpy as np
import pytest

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.compare import (
    adjusted_interval,
    bootstrap,
    compare,
    holm,
    interval,
    mcnemar,
    score_interval,
    sign_flip,
    wilson,
)
from llava_moslora.evaluation.scoring import Score, Unit, score_of

# Differences of 400 graded answers: value → how often.
GRADED = {-100: 13, -60: 26, -30: 22, 0: 254, 30: 23, 60: 24, 90: 11, 100: 27}


def units(values, strata=None):
    strata = strata or [""] * len(values)
    return [Unit(str(n), float(value), stratum) for n, (value, stratum) in enumerate(zip(values, strata, strict=True))]


def result(values, strata=None, rules="rules"):
    of = tuple(units(values, strata))
    return Score(score_of(of), rules, (), of, {})


def spread(counts):
    return [value for value, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    "gained, lost, p",  # statsmodels.stats.contingency_tables.mcnemar(table, exact=True)
    [(0, 0, 1.0), (5, 0, 0.0625), (12, 5, 0.143463134765625), (30, 30, 1.0), (61, 40, 0.046044066929342785),
     (700, 600, 0.0060157938610449395), (3, 1, 0.625)],
)  # fmt: skip
def test_mcnemar(gained, lost, p):
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_thousands():
    assert 0 < mcnemar(7200, 6800) < mcnemar(7100, 6900) < 0.1


def test_holm():
    p = [0.01, 0.04, 0.03, 0.005, 0.2, 0.8, 0.5, 0.001, 0.04]
    expected = [0.07, 0.2, 0.18, 0.04, 0.6, 1.0, 1.0, 0.009, 0.2]  # multipletests(p, method="holm")
    assert holm(p) == pytest.approx(expected, abs=1e-12)
    assert holm([0.3]) == [0.3] and holm([]) == []


@pytest.mark.parametrize(
    "right, total, low, high",  # statsmodels.stats.proportion.proportion_confint(method="wilson")
    [(0, 10, 0.0, 27.753279986288927), (10, 10, 72.24672001371107, 100.0),
     (7, 10, 39.677814746114535, 89.2208732593699), (1336, 1784, 72.82354404100228, 76.8452896029914)],
)  # fmt: skip
def test_wilson(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-9)
    assert score_interval(units([100] * right + [0] * (total - right))) == pytest.approx((low, high), abs=1e-9)


def test_the_interval_of_graded_answers_by_hand():
    """Of one stratum, n = 4 with two units of 0 and two of 1 added: mean of (0, .25, 1, 1, 0, 0, 1, 1) = 0.53125; its
    variance is 0.22559 on 8 degrees of freedom and one more of the pooled variance, which is the same."""
    variance = (4.0625 / 8 - 0.53125**2) * (8 + 1) / 8
    half = 1.959963984540054 * (variance / 8) ** 0.5
    expected = (100 * (0.53125 - half), 100 * (0.53125 + half))
    assert score_interval(units([0, 25, 100, 100])) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_two_strata_by_hand():
    """One unit of 0 and one of 100 are added to each: (1, 1, 0, 1) and (.25, 0, 1); pooled (1, 1, .25, 0, 0, 1, 1)."""
    first, second, pooled = [1, 1, 0, 1], [0.25, 0, 1], [1, 1, 0.25, 0, 0, 1, 1]
    variance = sum((len(x) * np.var(x) + np.var(pooled)) / (2 * len(x)) ** 2 for x in (first, second))
    middle, half = (np.mean(first) + np.mean(second)) / 2, 1.959963984540054 * variance**0.5
    expected = (max(0, 100 * (middle - half)), min(100, 100 * (middle + half)))
    assert score_interval(units([100, 25, 100], ["x", "y", "x"])) == pytest.approx(expected, abs=1e-9)


def test_an_interval_is_never_empty_and_holds_the_score():
    """Also where the units of each stratum, or of all, score alike."""
    generator = np.random.default_rng(5)
    cases = [([value] * count, None) for value in (0, 25, 100) for count in (1, 2, 500)]
    cases += [([value] * 28, [str(n % 14) for n in range(28)]) for value in (0, 25, 100)]
    cases += [([100, 0] * 7, [str(n) for n in range(14)])]
    for _ in range(300):
        size = generator.integers(1, 40)
        strata = [str(n) for n in generator.integers(0, generator.integers(1, 15), size)]
        cases.append((generator.choice([0, 25, 30, 100], size, p=generator.dirichlet([0.3] * 4)), strata))
    for values, strata in cases:
        of = units(values, strata)
        for low, high in (score_interval(of), adjusted_interval(of)):
            assert 0 <= low <= score_of(of) <= high <= 100 and high - low > 0.3


@pytest.mark.parametrize("sizes, right, half", [
    ([20, 200, 170, 200, 30, 30, 30, 30, 147, 200, 20, 70, 20, 20], 0.8, 0.5),  # images of MME's subtasks, about
    ([20, 200, 170, 200, 30, 30, 30, 30, 147, 200, 20, 70, 20, 20], 0.98, 0.5),
    ([1] * 14, 0.8, 0.5),
    ([2] * 14, 0.9, 1.0),
    ([3] * 14, 0.6, 0.5),
    ([5] * 14, None, 0.5),  # subtasks from hard to never wrong
    ([218], 0.3, 0.5),
    ([20], 0.9, 0.5),
])  # fmt: skip
def test_the_interval_of_a_score_covers_the_truth(sizes, right, half):
    """Graded units of 0, 25 and 100; a wrong one is a 25 in the share ``half``. Of 400 intervals 380 should hold the
    truth; for few units more do, never much fewer: 367 is three standard errors of simulation below."""
    generator, covered = np.random.default_rng(3), 0
    rights = np.linspace(0.3, 1, len(sizes)) if right is None else [right] * len(sizes)
    truth = 100 * np.mean([share + (1 - share) * half / 4 for share in rights])
    strata = [str(n) for n, size in enumerate(sizes) for _ in range(size)]
    for _ in range(400):
        values = [
            generator.choice([0.0, 25.0, 100.0], size, p=[(1 - share) * (1 - half), (1 - share) * half, share])
            for size, share in zip(sizes, rights, strict=True)
        ]
        low, high = score_interval(units(np.concatenate(values), strata))
        covered += low <= truth <= high
    assert covered >= 367


def test_bootstrap_and_sign_flips_of_graded_answers():
    of = units(spread(GRADED))
    assert score_of(of) == 5.75
    # scipy.stats.bootstrap((d,), np.mean, n_resamples=200000, method="percentile"): 1.70 to 9.85
    assert interval(bootstrap(of, np.random.default_rng(0), 100_000)) == pytest.approx((1.70, 9.85), abs=0.1)
    # scipy.stats.permutation_test((d, 0 * d), mean of x - y, permutation_type="samples", n_resamples=200000): 0.0067
    assert sign_flip(of, np.random.default_rng(0), 100_000) == pytest.approx(0.0067, abs=0.001)
    assert sign_flip(units([0] * 50), np.random.default_rng(0)) == 1.0
    assert sign_flip(units([30] * 50), np.random.default_rng(0)) == pytest.approx(1 / 10_001)


def test_strata_are_drawn_apart():
    """Against a plain bootstrap by index, stratum by stratum."""
    generator = np.random.default_rng(1)
    first, second = generator.choice([0, 50, 100], 40), generator.choice([0, 100], 200)
    of = units([*first, *second], ["x"] * 40 + ["y"] * 200)
    assert score_of(of) == pytest.approx((first.mean() + second.mean()) / 2)
    drawn = [(generator.choice(first, 40).mean() + generator.choice(second, 200).mean()) / 2 for _ in range(20_000)]
    assert interval(bootstrap(of, generator, 100_000)) == pytest.approx(interval(np.array(drawn)), abs=0.15)


def test_the_interval_covers_and_the_verdict_keeps_its_level():
    """200 pairs of models that are equally good: about 95 % of the intervals hold 0, at most about 5 % of the verdicts
    claim a difference."""
    generator, covered, claimed = np.random.default_rng(2), 0, 0
    for _ in range(200):
        same = generator.random(500) < 0.8  # questions that both answer alike
        a, b = (np.where(same, 100, 100 * (generator.random(500) < 0.5)) for _ in range(2))
        difference = compare({"x": result(a)}, {"x": result(b)}).differences["x"]
        covered += difference.low <= 0 <= difference.high
        claimed += difference.verdict != "inside the noise"
    assert covered >= 180 and claimed <= 16


def test_equal_differences_have_an_interval_too():
    """Of 10 questions that both answer alike one more pair each way is drawn: near Bonett and Price's by hand."""
    ten = compare({"x": result([100] * 10)}, {"x": result([100] * 10)}).differences["x"]
    half = 100 * 1.959963984540054 * (2 / 12 / 12) ** 0.5  # adjusted Wald: (0 + 1 + 0 + 1 - 0) / 12 over 12
    assert (ten.points, ten.low, ten.high) == (0, pytest.approx(-half, abs=3), pytest.approx(half, abs=3))
    all_gained = compare({"x": result([0] * 10)}, {"x": result([100] * 10)}).differences["x"]
    assert all_gained.high == all_gained.points == 100 and 40 < all_gained.low < 80
    many = compare({"x": result([100] * 1000)}, {"x": result([100] * 1000)}).differences["x"]
    assert -0.5 < many.low < 0 < many.high < 0.5


def test_what_a_comparison_says():
    a = {"seed": result([100, 0] * 100), "textvqa": result([30, 60] * 100), "mmvet": Score(None, "rules", (), (), {})}
    b = {"seed": result([100, 100, 100, 0] * 50), "textvqa": result([60, 30] * 100), "mme": result([0, 100])}
    found = compare(a, b)
    assert list(found.differences) == ["seed", "textvqa"]
    seed, textvqa = found.differences.values()
    assert (seed.a, seed.b, seed.points) == (50, 75, 25) and (seed.gained, seed.lost, seed.units) == (50, 0, 200)
    assert seed.low == pytest.approx(19, abs=1) and seed.high == pytest.approx(31, abs=1)
    assert seed.p == 2 / 2**50 and seed.adjusted == 2 * seed.p and seed.verdict == "B is better"
    assert (textvqa.points, textvqa.gained, textvqa.lost, textvqa.verdict) == (0, 100, 100, "inside the noise")
    assert found.points == 12.5 and 8 < found.low < 12.5 < found.high < 17
    assert found.sentence.startswith(
        "B is better on seed; the difference is inside the noise on textvqa. Average: +12.5 points, 95 % interval +"
    )
    back = compare(b, a)
    assert back.sentence.startswith("A is better on seed;") and back.points == -12.5
    same = compare(a, a)
    average = f"Average: +0.0 points, 95 % interval {same.low:+.1f} to {same.high:+.1f}, so inside the noise."
    assert same.sentence == f"The difference is inside the noise on every benchmark. {average}"
    assert -2 < same.low < 0 < same.high < 2  # 200 questions that are answered alike prove something, not all
    assert compare({"seed": a["seed"]}, b).sentence == "B is better on seed."


def test_mme_is_tested_by_its_images():
    """More than one stratum: no McNemar, the images of each subtask apart."""
    a, b = [0, 50, 100] * 20, [100, 50, 100] * 20
    strata = ["OCR", "count"] * 30
    difference = compare({"mme": result(a, strata)}, {"mme": result(b, strata)}).differences["mme"]
    assert difference.points == pytest.approx(100 / 3) and difference.verdict == "B is better"
    assert difference.p == pytest.approx(1 / 10_001) and (difference.gained, difference.lost) == (20, 0)


def test_the_order_of_questions_does_not_matter_and_the_seed_does_not_change():
    a, b = result([100, 0, 0, 100]), result([0, 100, 100, 100])
    other = Score(b.value, "rules", (), tuple(reversed(b.units)), {})
    assert compare({"x": a}, {"x": b}) == compare({"x": a}, {"x": other}) == compare({"x": a}, {"x": b}, seed=0)


@pytest.mark.parametrize(
    "b, message",
    [
        ({"y": result([0])}, "the results have no scored benchmark in common"),
        ({"x": result([100, 0], rules="rules-2024")}, "found rules and rules-2024"),
        ({"x": result([100])}, "found 1 questions that only one result has"),
        ({"x": Score(None, "rules", (), (), {})}, "the results have no scored benchmark in common"),
    ],
)
def test_what_cannot_be_compared(b, message):
    with pytest.raises(Refusal, match=message) as refused:
        compare({"x": result([100, 0])}, b)
    assert refused.value.code == "C-COMPARE"
