"""The same answers scored by VLMEvalKit, in a separate process, next to our scores by the same rules.

VLMEvalKit's 98 packages stay in the environment of ``--kit_python``, and so does its import, which disables TLS
certificate verification. Our scores are recomputed here with the set of rules called ``rules``, whatever ``--rules``
was: only these match the current VLMEvalKit. Nothing is downloaded, and the user's files are only read.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal, failure_in, few
from llava_moslora.evaluation import kit_process
from llava_moslora.evaluation.ask import Header, Questions, read_answers
from llava_moslora.evaluation.judge import KEY
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.results import TABLE, markdown
from llava_moslora.evaluation.rows import Row
from llava_moslora.evaluation.scoring import JUDGED, Score, question_of, score, unit_of
from llava_moslora.evaluation.tsv import hidden_by_pandas
from llava_moslora.files.disk import replace_file, replace_folder, replace_json, write_text

INSTALL = "-m pip install ms-vlmeval==0.0.20"
KIT_TABLE, KIT_FILES, KIT_LOG = "vlmevalkit.json", "vlmevalkit", "vlmevalkit.log"
SAME = 1e-6  # points: sums in another order
# The kit's names of MMBench's abilities.
ABBREVIATIONS = {
    "attribute_reasoning": "AR",
    "coarse_perception": "CP",
    "finegrained_perception (cross-instance)": "FP-C",
    "finegrained_perception (instance-level)": "FP-S",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
}


@dataclass(frozen=True)
class Kit:
    """An installed VLMEvalKit: the Python that has it, absolute, and its version, ``ms-vlmeval 0.0.20``."""

    python: str
    version: str


def find_kit(python: str | None) -> Kit:
    """The kit of ``python``, by default of this one; it is not imported, which takes long.

    Raises:
        Refusal: C-PATH, that is no Python; E-PACKAGE, the kit is not installed there.
    """
    name = sys.executable if python is None else python
    program = shutil.which(name)
    if program is None:
        raise Refusal("C-PATH", "no such program", key="--kit_python", found=name, expected="a Python with VLMEvalKit")
    program = os.path.abspath(program)  # links are not resolved: a Python finds its environment by its link
    done = _run([program, kit_process.__file__], os.environ)
    try:
        version = json.loads(done.stdout)["kit"]
    except (ValueError, KeyError, TypeError):
        found = _last_line(done.stderr + done.stdout)
        raise Refusal("C-PATH", "no Python", file=program, key="--kit_python", found=found) from None
    if not isinstance(version, str):
        raise Refusal(
            "E-PACKAGE", "VLMEvalKit is not installed there", file=program, key="--kit_python",
            fix=f"{program} {INSTALL}, in an environment of its own, or name the Python that has it",
        )  # fmt: skip
    return Kit(program, version)


def score_by_kit(kit: Kit, output: Path, asked: Sequence[Questions], header: Header) -> str:
    """Score the answers in ``output`` with VLMEvalKit; save its tables and files there, and return the comparison as
    text, which is appended to ``results.md`` too.

    Args:
        asked: what every row has an answer to.
        header: of the source.

    Raises:
        Refusal: E-KIT, the kit fails, or writes no tables; E-MEMORY, it was killed; E-DISK, there is no space for it.
    """
    scored = [questions for questions in asked if questions.benchmark.kind not in JUDGED]
    stored = {questions.benchmark.file: _answers(questions, output, header) for questions in scored}
    with tempfile.TemporaryDirectory(prefix=".vlmevalkit-", dir=output) as name:
        found: dict[str, Any] = {"kit": kit.version}
        if scored:
            found = _tables(kit, Path(name), output, scored, stored)
        comparisons = {}
        for questions in scored:
            file, folder = questions.benchmark.file, output / questions.benchmark.name
            comparison = Comparison.of(questions, stored[file], found["tables"][file])
            comparisons[questions.benchmark.name] = comparison
            content = {"kit": found["kit"], "pandas": found.get("pandas"), "rules": "rules", "header": header}
            replace_json(folder / KIT_TABLE, content | comparison.content() | {"table": found["tables"][file]})
            replace_folder(Path(name) / file, folder / KIT_FILES, Path(name) / f"old-{file}")
    text = _text(found["kit"], asked, comparisons)
    replace_file(output / TABLE, (output / TABLE).read_bytes() + f"\n{text}".encode())
    return text


def _answers(questions: Questions, output: Path, header: Header) -> dict[str, str]:
    answers = read_answers(output / questions.benchmark.name, questions.header() | header)[1]
    return {row["index"]: answers[row["index"]] for row in questions.rows}


def _tables(
    kit: Kit, work: Path, output: Path, scored: Sequence[Questions], answers: Mapping[str, dict[str, str]]
) -> dict[str, Any]:
    """What ``kit_process.py`` writes: ``kit``, ``pandas``, and ``tables``, data set → lines."""
    job = {
        questions.benchmark.file: {
            "file": str(questions.table.path.resolve()),
            "answers": answers[questions.benchmark.file],
            "truths": {row["index"]: row["answer"] for row in questions.rows} if questions.benchmark.answers else {},
        }
        for questions in scored
    }
    write_text(work / "job.json", json.dumps(job, ensure_ascii=False))
    settings = {"LMUData": str(work.resolve()), "PRED_FORMAT": "tsv", "EVAL_FORMAT": "csv", "HF_HUB_OFFLINE": "1"}
    print("VLMEvalKit scores the same answers …", file=sys.stderr, flush=True)
    inherited = {name: value for name, value in os.environ.items() if name != KEY}  # it needs no judge key
    done = _run([kit.python, kit_process.__file__, "job.json", "result.json"], inherited | settings, work)
    if done.returncode == -signal.SIGKILL:
        what = "VLMEvalKit was killed, as the system does for lack of memory"
        raise Refusal("E-MEMORY", what, file=kit.python, fix="a machine with more memory; our scores are written")
    log = output / KIT_LOG
    replace_file(log, (done.stdout + done.stderr).encode())
    if done.returncode:
        if failure := failure_in(done.stderr, work):
            raise failure
        raise Refusal(
            "E-KIT", "VLMEvalKit failed", file=log, found=_last_line(done.stderr) or f"exit status {done.returncode}",
            fix="our scores are written; see this log, or omit --scorer",
        )  # fmt: skip
    try:
        found = json.loads((work / "result.json").read_bytes())
        if not isinstance(found["kit"], str) or not all(dict(line) for file in job for line in found["tables"][file]):
            raise ValueError("a table without figures, or no version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(
            "E-KIT", "VLMEvalKit wrote no tables", file=log, found=f"{type(error).__name__}: {error}",
            fix="our scores are written; see this log, or omit --scorer",
        ) from error  # fmt: skip
    return found


@dataclass(frozen=True)
class Comparison:
    """Figure → value of the kit, and ours: in percent, of MME's subtasks in points.

    ``hidden``: how many rows have text that pandas, and so the kit, takes for missing.
    """

    kit: dict[str, float]
    ours: dict[str, float]
    hidden: int

    @classmethod
    def of(cls, questions: Questions, answers: Mapping[str, str], table: Sequence[Mapping[str, Any]]) -> Comparison:
        kind, rows = questions.benchmark.kind, questions.rows
        result = score(kind, rows, answers, RULES["rules"])
        hidden = set(hidden_by_pandas(questions.table)) & set(questions.numbers)
        return cls(kit_figures(kind, table, result), our_figures(kind, rows, result), len(hidden))

    @property
    def different(self) -> list[str]:
        """Names of values that differ, or that one side lacks."""
        both = self.kit.keys() & self.ours.keys()
        return [n for n in {**self.kit, **self.ours} if n not in both or abs(self.kit[n] - self.ours[n]) > SAME]

    def content(self) -> dict[str, Any]:
        return {"figures": {"kit": self.kit, "ours": self.ours}, "different": self.different}


def kit_figures(kind: str, table: Sequence[Mapping[str, Any]], result: Score) -> dict[str, float]:
    """The figures of the kit's table by name; ``Overall`` is the one that Table 5 of the paper has."""
    figures: dict[str, float] = {}
    for line in table:
        split, scale = str(line.get("split", "none")), 100.0 if kind in ("multiple-choice", "circular") else 1.0
        named = {name: value for name, value in line.items() if isinstance(value, int | float)}
        figures |= {_in_split(name, split): scale * value for name, value in named.items()}
    if kind == "yes-no" and {"perception", "reasoning"} <= figures.keys():
        figures["Overall"] = (figures["perception"] + figures["reasoning"]) / (2 * len(result.by["subtask"]))
    return figures


def our_figures(kind: str, rows: Sequence[Row], result: Score) -> dict[str, float]:
    """The same of our score, under the kit's names."""
    assert result.value is not None, "needs a judge"
    if kind == "yes-no":
        points = {"perception": result.by["total"]["perception"], "reasoning": result.by["total"]["cognition"]}
        return result.by["subtask"] | points | {"Overall": result.value}
    if kind == "vqa":
        return (result.by.get("split") or result.by.get("category", {})) | {"Overall": result.value}
    first = {unit_of(row, kind): row for row in rows if kind != "circular" or int(row["index"]) == question_of(row)}
    figures: dict[str, float] = {}
    for column in ("", "l2-category", "category"):
        values = defaultdict(list)
        for unit in result.units:
            row = first[unit.id]
            name = row.get(column) if column else "Overall"
            if name is not None:
                values[_in_split(ABBREVIATIONS.get(name, name), row.get("split", "none"))].append(unit.value)
        figures |= {name: sum(of_name) / len(of_name) for name, of_name in values.items()}
    return figures


def _in_split(name: str, split: str) -> str:
    return name if split == "none" else f"{name} ({split})"


def _text(version: str, asked: Sequence[Questions], comparisons: Mapping[str, Comparison]) -> str:
    """A line per benchmark as a table in Markdown, then every difference."""
    source = RULES["rules"].source
    rows, lines = [], []
    for questions in asked:
        title = questions.benchmark.title
        if (found := comparisons.get(questions.benchmark.name)) is None:
            rows.append([title, "–", "–", "VLMEvalKit needs a judge for this"])
            continue
        verdict = f"{len(found.different)} of {len(found.ours)} figures differ" if found.different else "the same"
        for name in (name for name in {**found.kit, **found.ours} if name.startswith("Overall")):
            rows.append([title + name.removeprefix("Overall"), *_both(found, name), verdict])
        if found.different:
            named = few((f"{name} {there} there, {here} here" for name, (there, here) in
                         ((name, _both(found, name)) for name in found.different)), 5)  # fmt: skip
            reason = f"; pandas hides text of {found.hidden} rows from VLMEvalKit" if found.hidden else ""
            lines.append(f"- {title}: {named}{reason}")
    head = ["benchmark", "VLMEvalKit", "ours", ""]
    end = [f"The same answers scored by VLMEvalKit ({version}), and by our rules ({source}), in percent."]
    if not source.startswith(f"{version} "):
        end.append("This is not the VLMEvalKit version that our rules follow: it may parse answers differently.")
    return "\n".join([markdown(head, rows), "", *lines, *([""] if lines else []), *end]) + "\n"


def _both(comparison: Comparison, name: str) -> tuple[str, str]:
    there, here = (f"{side[name]:.2f}" if name in side else "–" for side in (comparison.kit, comparison.ours))
    return there, here


def _run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, cwd=folder, check=False
    )


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
