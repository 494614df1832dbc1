"""Verdicts in words, values of measures, and the figures, without a run."""

import json
import math
import re

import pytest

from llava_moslora import drawings
from llava_moslora.studies import plots
from llava_moslora.studies.results import choose, collect, value_of, verdict
from llava_moslora.studies.runs import DIVERGED, DONE, Recipe, evaluation_folder, runs_of, tuning_runs
from llava_moslora.studies.statistics import corrected, difference
from llava_moslora.studies.study_file import Measure, read_study
from support.studies import write_study

LOSS = Measure("loss", "lower", metric="eval_loss")
ACCURACY = Measure("accuracy", "higher", script="evaluate.py")


def says(arm: list[float], measure: Measure = LOSS, others: int = 0) -> str:
    base = dict.fromkeys(range(len(arm)), 0.0)
    weak = difference({0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0})
    one = corrected([difference(dict(enumerate(arm)), base), *[weak] * others])[0]
    return verdict("LoRA", measure, one, len(arm), len(arm))


def test_a_verdict_never_says_equal():
    """The bound is the far end of the interval, rounded up."""
    text = says([0.01, -0.01, 0.004])  # mean 0.00133, t(0.975; 2) · s/√3 = 4.3027 · 0.0102632/1.7320508
    assert text == "no difference to LoRA above 0.0269 was seen"
    assert 0.00133333 + 4.302653 * 0.010263203 / math.sqrt(3) == pytest.approx(0.0268, abs=1e-4)
    assert says([0.0, 0.0]) == "2 differences of exactly +0.0000: no spread to test against"
    assert says([0.3]) == "one seed in common with LoRA: no verdict"
    assert verdict("LoRA", LOSS, None, 0, 0) == "no result"


def test_better_is_lower_of_a_loss_and_higher_of_a_score():
    down, up = [-0.10, -0.11, -0.12, -0.11], [0.10, 0.11, 0.12, 0.11]
    assert says(down).startswith("better than LoRA by 0.1100 (0.09") and says(up).startswith("worse than LoRA by 0.11")
    assert says(up, ACCURACY).startswith("better than LoRA by 0.11 (0.10 to 0.12)")
    assert says(down, ACCURACY).startswith("worse than LoRA by 0.11")


def test_many_arms_are_corrected_for():
    values = [0.10, 0.16, 0.04, 0.13]  # p = 0.025 alone
    assert says(values).startswith("worse than LoRA")
    assert says(values, others=3) == (
        "no difference to LoRA above 0.1891 was seen (its interval excludes 0, but not after Holm's correction)"
    )


@pytest.fixture
def made(tmp_path):
    """``made(losses by (arm, seed), **changes)``: a study and its runs, with logs as a training leaves them."""

    def made(losses: dict, **changes):
        study = read_study(write_study(tmp_path, **changes))
        recipe = Recipe(study.recipe, None, tmp_path)
        runs = tuning_runs(study, recipe, tmp_path) or runs_of(study, recipe, tmp_path)
        for run in runs:
            found = losses.get((run.arm, run.seed, run.tuned) if run.tuned else (run.arm, run.seed))
            run.output.mkdir(parents=True)
            if found is None:
                continue
            (run.folder / (DONE if found != "NaN" else DIVERGED)).write_text("{}")
            rows = [{"step": 1, "eval_loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "eval_loss": found}]
            (run.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return study, runs

    return made


def test_diverged_and_missing_seeds_are_counted(made):
    losses = {("LoRA", 1): 1.0, ("LoRA", 2): 1.1, ("LoRA", 3): 1.3, ("MoSLoRA", 1): 0.9, ("MoSLoRA", 2): "NaN"}
    study, runs = made(losses, seeds=["1", "2", "3"])
    lora, mosl = collect(study, runs).rows
    assert lora.mean == pytest.approx(3.4 / 3) and lora.deviation == pytest.approx(0.152753, abs=1e-6)
    assert mosl.values == {1: 0.9} and mosl.missing == (2, 3) and mosl.diverged == (2,)
    assert mosl.verdict == ("one seed in common with LoRA: no verdict; 1 of 3 seeds diverged; 1 of 3 seeds missing")


def test_the_last_or_the_best_value_of_a_metric(made):
    _, runs = made({("LoRA", 1): 0.7})
    assert value_of(runs[0], LOSS) == 0.7 and value_of(runs[1], LOSS) is None
    assert value_of(runs[0], Measure("l", "lower", metric="eval_loss", at="best")) == 0.5
    assert value_of(runs[0], Measure("l", "higher", metric="eval_loss", at="best")) == 0.7
    assert value_of(runs[0], Measure("l", "lower", metric="eval_other")) is None


def test_values_of_scripts(made):
    _, runs = made({("LoRA", 1): 0.7})
    sets = {"boolq": {"right": 3, "asked": 4, "accuracy": 75.0}, "piqa": {"right": 1, "asked": 2, "accuracy": 50.0}}
    whole = {"benchmarks": {"seed": {"score": 61.0}, "mme": {"score": 40.0}}, "average": 50.5}
    for content, expected in (
        (sets, {"mean": 62.5, "piqa": 50.0, "seed": None}),
        (whole, {"mean": 50.5, "seed": 61.0}),
    ):
        for value, number in expected.items():
            measure = Measure("a", "higher", script="evaluate.py", value=value)
            folder = evaluation_folder(runs[0], measure)
            folder.with_suffix(".json").write_text(json.dumps(content))
            assert value_of(runs[0], measure) == number
    other = Measure("a", "higher", script="evaluate.py", flags=(("limit", ("5",)),))
    assert evaluation_folder(runs[0], other) != folder and value_of(runs[0], other) is None


def test_tuning_waits_for_runs_that_are_missing_and_names_an_edge(made):
    tune = {"flag": "learning_rate", "values": ["1e-3", "2e-3", "4e-3"], "seeds": ["11", "12"]}
    lora = {
        ("LoRA", seed, rate): loss for seed in (11, 12) for rate, loss in zip(tune["values"], (3, 2, 4), strict=True)
    }
    mosl = {("MoSLoRA", seed, rate): loss for (_, seed, rate), loss in lora.items()}
    mosl |= {("MoSLoRA", 11, "2e-3"): "NaN"}
    study, runs = made({**lora, **mosl}, tune=tune)
    first, second = choose(study, runs)
    assert (first.best, first.note) == ("2e-3", "") and first.curve == {"1e-3": 3, "2e-3": 2, "4e-3": 4}
    assert second.best == "1e-3" and second.note == "1e-3 is at the edge of the grid: extend it"
    (runs[0].folder / DONE).unlink()
    first, second = choose(study, runs)
    assert first.best == "" and first.note == f"not tuned: {runs[0].name} missing" and second.best == "1e-3"


def test_figures_place_values_on_their_scale():
    line = plots.Interval("a<b", 1.0, 0.0, 2.0, (0.5, 1.5))
    drawing = plots.differences([line], "x & y")
    assert "a&lt;b" in drawing and "x &amp; y" in drawing
    low, high = map(float, re.search(r'class="bar" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', drawing).groups())
    zero = float(re.search(r'class="zero" x1="([\d.]+)"', drawing)[1])
    centre = float(re.search(r'class="mean"[^>]*cx="([\d.]+)"', drawing)[1])
    assert low == zero and centre == pytest.approx((low + high) / 2, abs=0.1)
    lines = [plots.Line("arm", ((1.0, (3.0, 5.0)), (10.0, (6.0,)), (100.0, (7.0,))))]
    drawing = plots.curves(lines, "--flag", "loss", logarithmic=True)
    points = re.search(r'points="([^"]+)"', drawing)[1].split()
    across = [float(point.split(",")[0]) for point in points]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)  # decades are equally wide
    heights = [float(point.split(",")[1]) for point in points]  # 4, 6, 7
    assert (heights[0] - heights[1]) / (heights[1] - heights[2]) == pytest.approx(2, abs=0.02)
    assert plots.curves(lines[:0], "--flag", "loss", logarithmic=True) == ""


def test_ticks_hold_all_values():
    for values in (
        [0.0, 0.013],
        [-3.0, 7.5],
        [1.0],
        [0.0],
        [2.5, 2.5001],
        [-1e-9, 1e-9],
        [0.0, 1e-14],
        [3.0, 3.0000000000000004],
        [-2e-13, -1e-13],
    ):
        ticks = drawings.ticks_of(values)
        assert ticks[0] <= min(values) and ticks[-1] >= max(values) and 2 <= len(ticks) <= 9
        assert len(set(ticks)) == len(ticks)
