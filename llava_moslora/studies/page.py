"""``study.html``: the tables, figures and runs of a study on one page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from llava_moslora import pages
from llava_moslora.studies import plots
from llava_moslora.studies.report import METHOD, cells
from llava_moslora.studies.results import Choice, Results, Row
from llava_moslora.studies.runs import Run
from llava_moslora.studies.study_file import Flags, Measure, Study, label

STYLE = (
    plots.STYLE
    + """
td, th { padding: .15em .9em .15em 0; text-align: left; vertical-align: top; } pre { overflow-x: auto; }
"""
)


def study_page(study: Study, runs: Sequence[Run], results: Results) -> str:
    """The page; it includes the study's file verbatim."""
    parts = [f"<p>{html.escape(study.about)}</p>" if study.about else ""]
    for measure in study.measures:
        parts.append(_measure(study, measure, [row for row in results.rows if row.measure == measure.name]))
    parts.append(_tuned(study, results.choices))
    for note in results.notes:
        parts.append(f"<p>{html.escape(note)}</p>")
    if results.failures:
        failed = [(f.run.name, f.what, f.status, f.line) for f in results.failures]
        parts.append("<h2>Failed</h2>" + pages.table(failed, ("run", "", "exit status", "last line of its log")))
    parts.append(f"<p><small>{html.escape(METHOD)}</small></p>")
    made = [(run.name, "done" if run.done else "diverged" if run.diverged else "not done") for run in runs]
    parts.append(f"<details><summary>{len(made)} runs</summary>{pages.table(made)}</details>")
    source = html.escape(study.file.read_text(encoding="utf-8-sig"))
    parts.append(f"<details><summary>{html.escape(study.file.name)}</summary><pre>{source}</pre></details>")
    return pages.page(f"Study: {study.name}", "\n".join(parts), STYLE)


def _measure(study: Study, measure: Measure, rows: Sequence[Row]) -> str:
    head, *body = cells(study, measure, rows)
    compared = [
        plots.Interval(_name(study, row), one.mean, one.low, one.high, tuple(one.by_seed.values()))
        for row in rows
        if (one := row.difference) is not None
    ]
    figures = plots.differences(compared, f"difference to {study.baseline}, 95 % interval; small dots are seeds")
    if axis := axis_of(study.points):
        lines = [
            plots.Line(arm.name, tuple(
                (float(study.points[row.point][axis][0]), tuple(row.values.values()))
                for row in rows if row.arm == arm.name
            ))
            for arm in study.arms
        ]  # fmt: skip
        figures = plots.curves(lines, f"--{axis}", measure.name, logarithmic=_spread(study.points, axis)) + figures
    title = f"{html.escape(measure.name)} <small>({measure.better} is better)</small>"
    return f"<h2>{title}</h2>{pages.table(body, head)}{figures}"


def _tuned(study: Study, choices: Sequence[Choice]) -> str:
    """The whole curve of the tuned flag, for every arm."""
    if study.tune is None or not choices:
        return ""
    measure, flag = study.measures[0], study.tune.flag
    parts = [f"<h2>Tuning of {html.escape(f'--{flag}')}</h2>"]
    for point, flags in enumerate(study.points):
        mine = [choice for choice in choices if choice.point == point]
        rows = [
            (c.arm, *("–" if math.isnan(m) else f"{m:.{measure.digits}f}" for m in c.curve.values()), c.best, c.note)
            for c in mine
        ]
        title = f"<h3>{html.escape(label(flags))}</h3>" if flags else ""
        table = pages.table(rows, ("", *study.tune.values, "chosen", ""))
        lines = [plots.Line(choice.arm, _curve(choice)) for choice in mine]
        parts.append(title + table + plots.curves(lines, f"--{flag}", measure.name, logarithmic=True))
    seeds = ", ".join(map(str, study.tune.seeds))
    said = f"Means of {html.escape(measure.name)} over the seeds {seeds}, which are used for nothing else."
    return "".join([*parts, f"<p>{said}</p>"])


def _curve(choice: Choice) -> tuple[tuple[float, tuple[float, ...]], ...]:
    numbers = [(float(value), mean) for value, mean in choice.curve.items() if _number(value)]
    return tuple((value, () if math.isnan(mean) else (mean,)) for value, mean in numbers)


def axis_of(points: Sequence[Flags]) -> str:
    """The flag of the x-axis: the first flag of each point, if it is one number; else ""."""
    flags = {next(iter(point), "") for point in points}
    if len(points) < 2 or len(flags) != 1 or not (flag := flags.pop()):
        return ""
    return flag if all(len(point[flag]) == 1 and _number(point[flag][0]) for point in points) else ""


def _spread(points: Sequence[Flags], axis: str) -> bool:
    """Whether the points are so far apart that the axis should be logarithmic."""
    places = [float(point[axis][0]) for point in points]
    return min(places) > 0 and max(places) >= 8 * min(places)


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _name(study: Study, row: Row) -> str:
    return f"{row.arm}, {label(study.points[row.point])}" if study.points[row.point] else row.arm
