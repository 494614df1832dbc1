"""Checks a benchmark's file before a model is loaded: columns, answers, rotations, pairs of questions."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import Benchmark
from llava_moslora.evaluation.rows import LETTERS, literal_list
from llava_moslora.evaluation.scoring import COGNITION, PERCEPTION, ROTATION, options_of
from llava_moslora.evaluation.tsv import Table, hidden_by_pandas

QUESTION_TYPES = ("multi_choice", "free_form")
ANSWER_TYPES = ("text", "integer", "float", "list")

log = logging.getLogger(__name__)


def open_benchmark(benchmark: Benchmark, folder: str | Path, *, allow_missing_rotations: bool = False) -> Table:
    """The file of ``benchmark`` in ``folder``, checked. An md5 that differs from VLMEvalKit's is only a warning.

    Raises:
        Refusal: no such file (D-FILE), or what :class:`Table` and :func:`check` refuse.
    """
    path = Path(folder) / f"{benchmark.file}.tsv"
    if not path.is_file():
        raise Refusal(
            "D-FILE", f"no file for {benchmark.name}", file=path, key="--data",
            fix=f"put VLMEvalKit's {path.name} there; nothing is downloaded",
        )  # fmt: skip
    table = Table(path)
    if table.md5 != benchmark.md5:
        log.warning("%s is not VLMEvalKit's file: md5 %s, expected %s", path, table.md5, benchmark.md5)
    answers = path.with_name(f"{benchmark.answers}.tsv")
    if not any("answer" in row for row in table.rows) and answers.is_file():
        take_answers(table, Table(answers))
    check(table, benchmark, allow_missing_rotations=allow_missing_rotations)
    if hidden := hidden_by_pandas(table):
        log.warning(
            "%s: VLMEvalKit does not show some text of %d rows to the model, as pandas takes it for missing (the option"
            " None); here it is shown. The first is index %s",
            path, len(hidden), table.rows[hidden[0]]["index"],
        )  # fmt: skip
    return table


def check(table: Table, benchmark: Benchmark, *, allow_missing_rotations: bool = False) -> None:
    """Refuse a file whose answers could not be scored.

    Raises:
        Refusal: D-SCHEMA, D-ANSWER or D-INDEX, with file, row and column.
    """
    if missing := [name for name in benchmark.columns if name not in table.columns]:
        fix = "a file without answers cannot be scored: use VLMEvalKit's file with answers"
        raise Refusal(
            "D-SCHEMA", "no such column", file=table.path, key=missing[0], found=" ".join(table.columns)[:200],
            expected=" ".join(benchmark.columns), fix=fix if missing[0] == "answer" else None,
        )  # fmt: skip
    for number, row in enumerate(table.rows):
        for column in ("question", *(() if benchmark.kind == "mathvista" else benchmark.columns)):
            if column not in row:
                raise table.refusal(number, column, "an empty field")
        ROW_CHECKS[benchmark.kind](table, number)
    if benchmark.kind == "circular":
        _check_rotations(table, allow_missing_rotations)
    elif benchmark.kind == "yes-no":
        _check_pairs(table)


def take_answers(table: Table, other: Table) -> None:
    """Fill the answers of a file without any from another one, row by row through the index.

    Raises:
        Refusal: D-ANSWER, a row that the other file does not answer.
    """
    answers: Mapping[str, str | None] = {row["index"]: row.get("answer") for row in other.rows}
    for number, row in enumerate(table.rows):
        if (answer := answers.get(row["index"])) is None:
            raise table.refusal(number, "answer", "no answer in that file", code="D-ANSWER", found=other.path)
        row["answer"] = answer
    table.columns = (*(name for name in table.columns if name != "answer"), "answer")


def _check_options(table: Table, number: int) -> None:
    row, options = table.rows[number], options_of(table.rows[number])
    if row["answer"] not in options:
        raise table.refusal(
            number, "answer", "not the letter of an option", code="D-ANSWER", found=row["answer"],
            expected=" | ".join(options),
        )  # fmt: skip


def _check_yes_no(table: Table, number: int) -> None:
    row = table.rows[number]
    if row["answer"] not in ("Yes", "No"):
        raise table.refusal(number, "answer", "neither", code="D-ANSWER", found=row["answer"], expected="Yes | No")
    if row["category"] not in PERCEPTION + COGNITION:
        raise table.refusal(
            number, "category", "not a subtask of MME", found=row["category"], expected=" ".join(PERCEPTION + COGNITION)
        )


def _check_short_answers(table: Table, number: int) -> None:
    answers = literal_list(table.rows[number]["answer"])
    if answers is None or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise table.refusal(
            number, "answer", "not the answers of several people", code="D-ANSWER", found=table.rows[number]["answer"],
            expected="a list of strings, ['yes', 'yes', 'no', …]; with a single answer the accuracy is always 0",
        )  # fmt: skip


def _check_mathvista(table: Table, number: int) -> None:
    row = table.rows[number]
    for column, known in (("question_type", QUESTION_TYPES), ("answer_type", ANSWER_TYPES)):
        if row.get(column) not in known:
            raise table.refusal(number, column, "unknown", found=row.get(column, "nothing"), expected=" | ".join(known))
    for column in ("answer", "task"):
        if column not in row:
            raise table.refusal(number, column, "an empty field", code="D-ANSWER" if column == "answer" else "D-SCHEMA")
    if row["question_type"] == "multi_choice":
        choices = literal_list(row.get("choices", ""))
        if not choices or len(choices) > len(LETTERS):
            found = row.get("choices", "nothing")
            raise table.refusal(number, "choices", "no list of options", found=found, expected="['12', '15', …]")
        letters = LETTERS[: len(choices)]
        if row.get("answer_option", "") not in letters:
            raise table.refusal(
                number, "answer_option", "not the letter of an option", code="D-ANSWER",
                found=row.get("answer_option", "nothing"), expected=" | ".join(letters),
            )  # fmt: skip


def _check_rotations(table: Table, allow_missing: bool) -> None:
    """Every rotation has its question, and every question as many rotations as options."""
    groups = defaultdict(list)
    for number, row in enumerate(table.rows):
        text = row.get("g_index", row["index"])
        if not (text.isascii() and text.isdecimal() and row["index"].isdecimal()):
            column = "g_index" if "g_index" in row else "index"
            raise table.refusal(number, column, "not an integer", code="D-INDEX", found=text)
        groups[int(text) if "g_index" in row else int(text) % ROTATION].append(number)
    for question, numbers in groups.items():
        first = numbers[0]
        if not any(int(table.rows[number]["index"]) == question for number in numbers):
            raise table.refusal(
                first, "index", "a rotation without its question", code="D-INDEX", expected=f"a row of index {question}"
            )
        expected = len(options_of(table.rows[first]))
        if len(numbers) != expected and not allow_missing:
            raise table.refusal(
                first, "index", "a question needs exactly one row per rotation of its options", code="D-INDEX",
                found=f"{len(numbers)} rows of question {question}", expected=f"{expected}, its options",
            )  # fmt: skip


def _check_pairs(table: Table) -> None:
    """Two questions for every image, and no subtask without questions."""
    numbers = {(row["category"], row["image_path"]): number for number, row in enumerate(table.rows)}
    for (category, image), count in Counter((row["category"], row["image_path"]) for row in table.rows).items():
        if count != 2:
            number, what = numbers[category, image], "an image of MME needs two questions"
            raise table.refusal(number, "image_path", what, found=f"{count} for {image}")
    seen = {row["category"] for row in table.rows}
    if missing := [name for name in PERCEPTION + COGNITION if name not in seen]:
        raise Refusal(
            "D-SCHEMA", "subtasks without questions, which VLMEvalKit counts as 0 points", file=table.path,
            key="category", found=f"nothing of {' '.join(missing)}",
        )  # fmt: skip


ROW_CHECKS: dict[str, Callable[[Table, int], None]] = {
    "multiple-choice": _check_options,
    "circular": _check_options,
    "yes-no": _check_yes_no,
    "vqa": _check_short_answers,
    "mathvista": _check_mathvista,
    "mmvet": lambda table, number: None,
}
