"""From the runs of a study to its rows: values, the tuned flag's choice, differences, and verdicts.

A verdict never says "equal": runs can only show that no difference above a bound was seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_moslora.errors import Refusal, few
from llava_moslora.files.disk import read_json
from llava_moslora.files.manifest import read_facts
from llava_moslora.runs.checkpoints import checkpoints
from llava_moslora.runs.log import METRICS_FILE, read_rows
from llava_moslora.studies.processes import Failure
from llava_moslora.studies.runs import Run, evaluation_folder
from llava_moslora.studies.statistics import Difference, corrected, difference
from llava_moslora.studies.study_file import MEAN, Measure, Study, label

BASELINE = "baseline"


@dataclass(frozen=True)
class Row:
    """One arm at one point, by one measure.

    Attributes:
        tuned: the chosen value of the tuned flag.
        values: seed → value, of the runs that are complete.
        missing: seeds without a value. diverged: those of them whose loss became NaN or Inf.
        difference: to the baseline at the same point.
        verdict: in words.
        paper: the published value.
    """

    measure: str
    arm: str
    point: int
    tuned: str
    values: dict[int, float]
    missing: tuple[int, ...]
    diverged: tuple[int, ...]
    difference: Difference | None
    verdict: str
    paper: float | None = None

    @property
    def mean(self) -> float:
        return sum(self.values.values()) / len(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Of the seeds, with n − 1; NaN for one."""
        if len(self.values) < 2:
            return math.nan
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.values.values()) / (len(self.values) - 1))


@dataclass
class Choice:
    """The tuned flag of one arm and point: value → mean of the first measure, NaN where a run diverged; ``best`` is
    "" where runs are missing that it depends on."""

    arm: str
    point: int
    curve: dict[str, float]
    best: str
    note: str = ""


@dataclass
class Results:
    """All results of a study: ``failures`` of this call, and ``notes`` about the comparability of rows."""

    rows: list[Row]
    choices: list[Choice] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def value_of(run: Run, measure: Measure) -> float | None:
    """The measure of a run; None if the run or its evaluation is incomplete, or the measure is missing."""
    if not run.done:
        return None
    if measure.metric:
        values = [row[measure.metric] for row in read_rows(run.output / METRICS_FILE) if measure.metric in row]
        numbers = [float(value) for value in values]  # NaN and Inf are strings in the log
        if not numbers or not all(map(math.isfinite, numbers)):
            return None
        best = min if measure.better == "lower" else max
        return best(numbers) if measure.at == "best" else numbers[-1]
    kept = evaluation_folder(run, measure).with_suffix(".json")
    return _of_script(read_json(kept), measure) if kept.is_file() else None


def _of_script(content: Mapping[str, Any], measure: Measure) -> float | None:
    """A number of ``results.json``, in percent: of a benchmark or a set, or the mean of all."""
    if "benchmarks" in content:
        scores = {name: part["score"] for name, part in content["benchmarks"].items()}
        scores[MEAN] = content["average"]
    else:
        scores = {name: part["accuracy"] for name, part in content.items()}
        scores[MEAN] = sum(scores.values()) / len(scores)
    return scores.get(measure.value)


def choose(study: Study, runs: Sequence[Run]) -> list[Choice]:
    """The best value of the tuned flag for each arm and point, by the first measure's mean over the tuning seeds.

    A value at which a run diverged ranks last. If another run is missing, nothing is chosen: the choice could change
    once it is finished.
    """
    if study.tune is None:
        return []
    measure, choices = study.measures[0], []
    for point in range(len(study.points)):
        for arm in (arm.name for arm in study.arms):
            mine = [run for run in runs if run.tuning and (run.arm, run.point) == (arm, point)]
            curve, missing = {}, []
            for value in study.tune.values:
                found = {run: value_of(run, measure) for run in mine if run.tuned == value}
                away = any(run.diverged for run in found)
                missing += [run.name for run, number in found.items() if number is None and not away]
                curve[value] = math.nan if None in found.values() else _mean(found.values())
            choices.append(_choice(study, arm, point, curve, missing))
    return choices


def _choice(study: Study, arm: str, point: int, curve: dict[str, float], missing: list[str]) -> Choice:
    usable = {value: number for value, number in curve.items() if math.isfinite(number)}
    if missing or not usable:
        note = f"not tuned: {few(missing)} missing" if missing else "not tuned: every value diverged"
        return Choice(arm, point, curve, "", note)
    best = (min if study.measures[0].better == "lower" else max)(usable, key=usable.__getitem__)
    edges = (next(iter(curve)), list(curve)[-1]) if len(curve) > 1 else ()
    note = f"{best} is at the edge of the grid: extend it" if best in edges else ""
    return Choice(arm, point, curve, best, note)


def _mean(values: Iterable[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers)


def collect(
    study: Study, runs: Sequence[Run], choices: Sequence[Choice] = (), failures: Sequence[Failure] = ()
) -> Results:
    """The rows of a study, measure by measure, point by point.

    Args:
        runs: of the result, those of tuning left out.
    """
    rows = [row for measure in study.measures for row in _rows(study, measure, runs, choices)]
    notes = [f"{_place(study, choice.arm, choice.point)}: {choice.note}" for choice in choices if choice.note]
    notes += other_data(study, runs)
    for measure in study.measures:
        if all(not row.values for row in rows if row.measure == measure.name) and any(run.done for run in runs):
            notes.append(f"{measure.name}: no finished run has a value of {measure.metric or measure.script}")
    return Results(rows, list(choices), list(failures), notes)


def _rows(study: Study, measure: Measure, runs: Sequence[Run], choices: Sequence[Choice]) -> list[Row]:
    chosen = {(choice.arm, choice.point): choice.best for choice in choices}
    cells = [(arm, point) for point in range(len(study.points)) for arm in study.arms]
    found = {
        (run.arm, run.point, run.seed): value for run in runs if (value := value_of(run, measure)) is not None
    }  # fmt: skip
    values = {
        (arm.name, point): {s: found[arm.name, point, s] for s in study.seeds if (arm.name, point, s) in found}
        for arm, point in cells
    }
    compared = corrected([
        None if arm.name == study.baseline else difference(values[arm.name, point], values[study.baseline, point])
        for arm, point in cells
    ])  # fmt: skip
    rows = []
    for (arm, point), one in zip(cells, compared, strict=True):
        mine = values[arm.name, point]
        missing = tuple(seed for seed in study.seeds if seed not in mine)
        shared = mine.keys() & values[study.baseline, point].keys()
        is_baseline = arm.name == study.baseline
        text = BASELINE if is_baseline and mine else verdict(study.baseline, measure, one, len(mine), len(shared))
        away = tuple(run.seed for run in runs if (run.arm, run.point) == (arm.name, point) and run.diverged)
        for what, seeds in (("diverged", away), ("missing", set(missing) - set(away))):
            if seeds:  # a mean over the rest may be misleading
                text += f"; {len(seeds)} of {len(study.seeds)} seeds {what}"
        paper = arm.paper[point] if arm.paper and measure is study.measures[0] else None
        tuned = chosen.get((arm.name, point), "")
        rows.append(Row(measure.name, arm.name, point, tuned, mine, missing, away, one, text, paper))
    return rows


def verdict(baseline: str, measure: Measure, found: Difference | None, values: int, pairs: int) -> str:
    """The verdict on an arm."""
    if not values:
        return "no result"
    if found is None:
        what = "no seed" if pairs == 0 else "one seed"
        return f"{what} in common with {baseline}: no verdict"
    digits = measure.digits
    if found.low == found.high:
        return f"{pairs} differences of exactly {found.mean:+.{digits}f}: no spread to test against"
    if found.significant:
        better = (found.mean < 0) == (measure.better == "lower")
        low, high = sorted((abs(found.low), abs(found.high)))
        text = f"{'better' if better else 'worse'} than {baseline} by {abs(found.mean):.{digits}f}"
        return f"{text} ({low:.{digits}f} to {high:.{digits}f})" if found.low * found.high > 0 else text
    above = math.ceil(found.largest * 10**digits - 1e-9) / 10**digits
    text = f"no difference to {baseline} above {above:.{digits}f} was seen"
    if found.low > 0 or found.high < 0:
        text += " (its interval excludes 0, but not after Holm's correction)"
    return text


def other_data(study: Study, runs: Sequence[Run]) -> list[str]:
    """Arms whose checkpoints were not trained on the same records as the baseline's of the same seed and point."""
    data = {(run.arm, run.point, run.seed): _records(run) for run in runs if run.done}
    other = sorted({
        _place(study, arm, point)
        for (arm, point, seed), keys in data.items()
        if keys is not None and (first := data.get((study.baseline, point, seed))) is not None and keys != first
    })  # fmt: skip
    return [f"not trained on the same records as {study.baseline}: {few(other)}"] if other else []


def _records(run: Run) -> Any:
    """The fingerprint of the records that a run's newest checkpoint was trained on; None without one."""
    for checkpoint in checkpoints(run.output)[:1]:
        try:
            return read_facts(checkpoint).get("data")
        except Refusal:
            return None
    return None


def _place(study: Study, arm: str, point: int) -> str:
    return f"{arm} at {label(study.points[point])}" if study.points[point] else arm
