"""A study's results as a table for the terminal and as ``study.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llava_moslora._version import __version__
from llava_moslora.studies.results import Results, Row
from llava_moslora.studies.runs import Run
from llava_moslora.studies.study_file import Measure, Study, label

METHOD = (
    "Differences are paired by seed: runs of one seed see the same batches. 95 % paired t-intervals, not corrected; "
    "verdicts follow the paired t-test after Holm's correction over all rows of a measure."
)


def text(study: Study, results: Results) -> str:
    """The table of every measure, what is missing, and how it was computed."""
    parts = [f"study {study.name}: {len(study.arms)} arms, {len(study.seeds)} seeds, baseline {study.baseline}"]
    for measure in study.measures:
        rows = [row for row in results.rows if row.measure == measure.name]
        parts.append(f"\n{measure.name} ({measure.better} is better)\n{aligned(cells(study, measure, rows))}")
    for title, expected in (("diverged while tuning", True), ("missing", False)):
        failed = [f"  {f.run.name}: {f.what}: {f.line}" for f in results.failures if f.expected == expected]
        if failed:
            parts.append(f"\n{title}\n" + "\n".join(failed))
    if results.notes:
        parts.append("\nnote\n" + "\n".join(f"  {line}" for line in results.notes))
    return "\n".join([*parts, "", METHOD])


def cells(study: Study, measure: Measure, rows: Sequence[Row]) -> list[list[str]]:
    """The table as texts, its head first; columns that no row needs are left out."""
    head = [
        "arm", "at", study.tune.flag if study.tune else "tuned", "seeds", "mean", "sd",
        "difference", "95 %", "p (Holm)", "paper", "verdict",
    ]  # fmt: skip
    body = [_cells(study, measure, row) for row in rows]
    used = [k for k in range(len(head)) if head[k] == "arm" or any(line[k] for line in body)]
    return [[line[k] for k in used] for line in [head, *body]]


def _cells(study: Study, measure: Measure, row: Row) -> list[str]:
    digits, one = measure.digits, row.difference
    seeds = f"{len(row.values)} of {len(study.seeds)}" if row.missing else str(len(row.values))
    compared = ["", "", ""]
    if one is not None:
        between = f"{one.low:+.{digits}f} to {one.high:+.{digits}f}"
        compared = [f"{one.mean:+.{digits}f}", between, f"{one.adjusted:.3f}"]
    mean, deviation = (
        f"{v:.{digits}f}" if math.isfinite(v) else "" for v in (row.mean, row.deviation)
    )  # fmt: skip
    paper = "" if row.paper is None else f"{row.paper:g}"
    point = label(study.points[row.point])
    return [row.arm, point, row.tuned, seeds, mean, deviation, *compared, paper, row.verdict]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; numbers to the right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    right = [all(line[k].lstrip("+-").replace(".", "").isdecimal() for line in lines[1:] if line[k])
             for k in range(len(widths))]  # fmt: skip
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def as_json(study: Study, runs: Sequence[Run], results: Results) -> dict[str, Any]:
    """Everything, for other programs; NaN as null."""
    return {
        "llava_moslora": __version__,
        "study": study.name,
        "about": study.about,
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "points": [{flag: list(words) for flag, words in point.items()} for point in study.points],
        "method": METHOD,
        "measures": [asdict(measure) | {"rows": _rows(results, measure)} for measure in study.measures],
        "tuned": [
            {"arm": c.arm, "point": c.point, "curve": {k: _number(v) for k, v in c.curve.items()}, "best": c.best,
             "note": c.note}
            for c in results.choices
        ],
        "runs": [
            {"name": run.name, "arm": run.arm, "point": run.point, "seed": run.seed, "tuned": run.tuned,
             "tuning": run.tuning, "done": run.done, "flags": list(run.words)}
            for run in runs
        ],
        "failures": [
            {"run": f.run.name, "what": f.what, "status": f.status, "line": f.line} for f in results.failures
        ],
        "notes": results.notes,
    }  # fmt: skip


def _rows(results: Results, measure: Measure) -> list[dict[str, Any]]:
    return [
        asdict(row) | {"mean": _number(row.mean), "deviation": _number(row.deviation)}
        for row in results.rows
        if row.measure == measure.name
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
