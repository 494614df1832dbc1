"""Results of an evaluation: saved values of every benchmark, and the table next to the paper's row.

An output folder contains ``NAME/answers-RANK.jsonl`` and ``NAME/score.json`` for every benchmark, and ``results.json``
and ``results.md`` for all of them. A comparison needs two such folders and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_moslora._version import __version__
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import BENCHMARKS, PAPER
from llava_moslora.evaluation.compare import Comparison, score_interval
from llava_moslora.evaluation.prompts import PROMPTS
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.scoring import JUDGED, Score
from llava_moslora.files.disk import read_json, replace_file, replace_json

SCORE, RESULTS, TABLE, PAGE = "score.json", "results.json", "results.md", "mistakes.html"
# Rows of the paper's Table 5 as the command line names them: llama-3-moslora-kaiming.
PAPER_ROWS = {"-".join(filter(None, key)).lower(): numbers for key, numbers in PAPER.items()}
NO_ROW = "none"  # of --paper: none of them
# Fields that must be equal for two results to be compared.
SAME_QUESTIONS = ("data", "prompts", "max_new_tokens", "limit", "judge", "judge_prompts")


@dataclass(frozen=True)
class Result:
    """One benchmark: the header of its answers (see :mod:`llava_moslora.evaluation.ask`) and their score."""

    header: dict[str, Any]
    score: Score

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the score; None where it needs a judge."""
        return None if self.score.value is None else score_interval(self.score.units)

    @property
    def complete(self) -> bool:
        """Whether there is a full score, not only MathVista's lower bound."""
        kind = BENCHMARKS[self.header["benchmark"]].kind
        return self.score.value is not None and not (kind in JUDGED and "judge" not in self.header and self.score.note)

    @property
    def judge(self) -> str:
        """Who judged, or ""."""
        return "judge {judge} at {judge_host}".format_map(self.header) if "judge" in self.header else ""

    @property
    def remarks(self) -> str:
        """Remarks on the number, and how it differs from the paper's protocol."""
        benchmark, limit = BENCHMARKS[self.header["benchmark"]], self.header.get("limit")
        sample = f"a sample of {len(self.score.outcomes)} rows" if limit is not None else ""
        return "; ".join(filter(None, (self.score.note, self.judge, sample, benchmark.paper)))


@dataclass(frozen=True)
class _Header:
    """What is read of a header, of everything that it holds."""

    benchmark: str
    prompts: str
    limit: int | None = None
    judge: str = ""
    judge_host: str = ""


@dataclass(frozen=True)
class _ScoreFile:
    header: _Header
    score: Score


def write_result(folder: Path, result: Result) -> None:
    """Keep a benchmark's score with every outcome, atomically."""
    replace_json(folder / SCORE, {"header": result.header, "score": asdict(result.score)})


def read_result(file: Path) -> Result:
    """What :func:`write_result` wrote.

    Raises:
        Refusal: K-MISSING or K-JSON, no such file or it is damaged.
    """
    from pydantic import TypeAdapter, ValidationError  # imported here: --help and a comparison's flags do without

    content = read_json(file)
    try:
        stored = TypeAdapter(_ScoreFile).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise _no_score(file, ".".join(map(str, first["loc"])), first["input"], first["msg"].lower()) from error
    header, score = stored.header, stored.score
    for key, found, known in (
        ("header.benchmark", header.benchmark, BENCHMARKS),
        ("header.prompts", header.prompts, PROMPTS),
        ("score.rules", score.rules, RULES),
    ):
        if found not in known:
            raise _no_score(file, key, found, " | ".join(known))
    return Result(content["header"], score)


def _no_score(file: Path, key: str, found: object, expected: str) -> Refusal:
    what, fix = "not the score of a benchmark", "evaluate again, into another --output"
    return Refusal("K-JSON", what, file=file, key=key, found=repr(found)[:80], expected=expected, fix=fix)


def read_results(output: str | Path) -> dict[str, Result]:
    """Benchmark → result, of an output folder.

    Raises:
        Refusal: C-PATH, there is none; K-JSON, one is damaged.
    """
    files = {name: Path(output) / name / SCORE for name in BENCHMARKS}
    results = {name: read_result(file) for name, file in files.items() if file.is_file()}
    if not results:
        raise Refusal(
            "C-PATH", "no results", file=output, expected=f"a folder with NAME/{SCORE}",
            fix="give the --output of an evaluation",
        )  # fmt: skip
    return results


def write_results(
    output: Path,
    source: str,
    results: Mapping[str, Result],
    missing: Sequence[str],
    paper: str,
    notes: Sequence[str] = (),
) -> str:
    """Write ``results.json`` and ``results.md``, and return the table as text.

    Args:
        source: the run or export that was asked.
        missing: benchmarks that were wanted and have no file.
        paper: the row of Table 5 to stand next to it, a key of :data:`PAPER_ROWS`; "": none.
        notes: what else to say below the table.
    """
    summary = {
        "llava_moslora": __version__,
        "source": source,
        "paper": paper or None,
        "benchmarks": {name: _summary(name, result, paper) for name, result in results.items()},
        "missing": list(missing),
        "average": average(results),
        "conditions": conditions(results),
    }
    replace_json(output / RESULTS, summary)
    text = table(results, missing, paper) + "".join(f"{note}\n" for note in notes)
    replace_file(output / TABLE, f"# {source}\n\n{text}".encode())
    return text


def _summary(name: str, result: Result, paper: str) -> dict[str, Any]:
    score, benchmark = result.score, BENCHMARKS[name]
    return {
        "title": benchmark.title,
        "file": benchmark.file,
        "metric": "score" if benchmark.kind in ("mmvet", "yes-no") else "accuracy",
        "score": score.value,
        "interval": result.interval,
        "unread": score.unread,
        "answers": len(score.outcomes),
        "units": len(score.units),
        "rules": score.rules,
        "read_by": score.read_by,
        "by": score.by,
        "counts": score.counts,
        "paper": PAPER_ROWS[paper][name] if paper else None,
        "remarks": result.remarks,
        "header": result.header,
    }


def average(results: Mapping[str, Result]) -> float | None:
    """Mean of the nine scores; None unless all are there."""
    values = [result.score.value for result in results.values() if result.complete]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(BENCHMARKS) else None


def conditions(results: Mapping[str, Result]) -> list[str]:
    """How the protocol differs from the paper's."""
    sample = ["samples"] if any(result.header.get("limit") is not None for result in results.values()) else []
    return ["greedy", *sample, *sorted({result.judge for result in results.values() if result.judge})]


def table(results: Mapping[str, Result], missing: Sequence[str], paper: str = "") -> str:
    """A line per benchmark as a table in Markdown, then remarks on each, then how all were made."""
    head = ["benchmark", "score", "95 % interval", "unread", *([paper] if paper else []), ""]
    rows = [_row(name, result, paper) for name, result in results.items()]
    if (mean := average(results)) is not None:
        papers = [f"{PAPER_ROWS[paper]['average']:.1f}"] if paper else []
        rows.append(["average", f"{mean:.1f}", "", "", *papers, ", ".join(conditions(results))])
    lines = [markdown(head, rows), ""]
    lines += [f"- {BENCHMARKS[name].title}: {result.remarks}" for name, result in results.items() if result.remarks]
    lines += [""] * (lines[-1] != "")
    rules = sorted({result.score.rules for result in results.values()})
    prompts = sorted({str(result.header["prompts"]) for result in results.values()})
    judged = [BENCHMARKS[name].title for name, result in results.items() if result.judge]
    judge = f"with a judge for {' and '.join(judged)}" if judged else "without a judge"
    lines += [f"Answers are greedy, {judge}. Rules: {', '.join(f'{r} ({RULES[r].source})' for r in rules)}."]
    lines += [f"Prompts: {', '.join(f'{p} ({PROMPTS[p]})' for p in prompts)}."]
    lines += ["Unread: share of answers that neither a rule nor a judge could parse; they count as wrong."]
    if missing:
        files = ", ".join(f"{BENCHMARKS[name].file}.tsv ({name})" for name in missing)
        lines.append(f"Not evaluated, as their files are missing: {files}.")
    if mean is None:
        complete = sum(result.complete for result in results.values())
        lines.append(f"No average: {complete} of {len(BENCHMARKS)} benchmarks have a score that is not a lower bound.")
    return "\n".join(lines) + "\n"


def _row(name: str, result: Result, paper: str) -> list[str]:
    value, interval = result.score.value, result.interval
    row = [BENCHMARKS[name].title, "–" if value is None else f"{value:.1f}"]
    row.append("–" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}")
    row.append("–" if value is None else f"{result.score.unread:.1%}")
    if paper:
        row.append(f"{PAPER_ROWS[paper][name]:.1f}")
    note = result.score.note if BENCHMARKS[name].kind in JUDGED else ""
    return [*row, "; ".join(filter(None, (note, result.judge)))]


def check_comparable(a: Mapping[str, Result], b: Mapping[str, Result]) -> None:
    """Refuse (C-COMPARE) two results of which a benchmark was not asked or judged in the same way."""
    for name in (name for name in a if name in b):
        for field in SAME_QUESTIONS:
            one, other = a[name].header.get(field), b[name].header.get(field)
            if one != other:
                how = "judged" if field.startswith("judge") else "asked"
                raise Refusal(
                    "C-COMPARE", f"not {how} in the same way", key=f"{name}.{field}", found=f"{one} and {other}",
                    fix="evaluate both with the same files and flags",
                )  # fmt: skip


def comparison_table(comparison: Comparison) -> str:
    """A line per benchmark as a table in Markdown, then the verdict in words."""
    head = ["benchmark", "A", "B", "B − A", "95 % interval", "p (Holm)", "B better on", "B worse on", "of", "verdict"]
    rows = [
        [BENCHMARKS[name].title, f"{d.a:.1f}", f"{d.b:.1f}", f"{d.points:+.1f}", f"{d.low:+.1f} to {d.high:+.1f}",
         f"{d.adjusted:.3g}", str(d.gained), str(d.lost), str(d.units), d.verdict]
        for name, d in comparison.differences.items()
    ]  # fmt: skip
    return f"{markdown(head, rows)}\n\n{comparison.sentence}\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns are aligned also as plain text."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = ("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
             for row in (head, rule, *rows))  # fmt: skip
    return "\n".join(lines)
