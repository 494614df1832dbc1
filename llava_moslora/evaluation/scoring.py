"""From answers to a score, one function per kind of benchmark, all pure.

Each takes rows of a :class:`~llava_moslora.evaluation.tsv.Table` and the answers by index, and returns a
:class:`Score`. Its *units* are what the score averages and what a comparison resamples: questions, circular groups, or
the images of MME. The formulas are VLMEvalKit's: ``dataset/utils/multiple_choice.py``, ``yorn.py``, ``vqa_eval.py``,
``mathvista.py`` and ``mmvet.py``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llava_moslora.evaluation.reading import (
    Reading,
    Rules,
    mathvista_right,
    read_mathvista,
    read_option,
    read_yes_no,
    vqa_accuracy,
)
from llava_moslora.evaluation.rows import LETTERS, Row, literal_list

ROTATION = 1_000_000  # the k-th rotation of question n has the index n + k · ROTATION
PERCEPTION = tuple("OCR artwork celebrity color count existence landmark position posters scene".split())
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")  # of MM-Vet


@dataclass(frozen=True)
class Outcome:
    """One answer: the parsed value, the rule that parsed it, and its score in [0, 1]."""

    index: str
    read: str | None
    rule: str
    right: float


@dataclass(frozen=True)
class Unit:
    """A question, a circular group or an image with its value in percent. The score is the mean over the strata of the
    mean of their units; only MME has more than one stratum, its subtasks."""

    id: str
    value: float
    stratum: str = ""


@dataclass(frozen=True)
class Score:
    """Of one benchmark.

    Attributes:
        value: in percent, as Table 5 of the paper prints it; None where a judge is needed.
        rules: name of the set of rules.
        outcomes: one for every row, in the order of the rows.
        units: one for every question, circular group or image.
        by: column → its value → percent; for MME subtask → points of 200 and ``total`` → points.
        note: a remark next to the value, or "".
        counts: column → its value → units that ``by`` is the mean of, for columns of the file.
    """

    value: float | None
    rules: str
    outcomes: tuple[Outcome, ...]
    units: tuple[Unit, ...]
    by: dict[str, dict[str, float]]
    note: str = ""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def read_by(self) -> dict[str, int]:
        """How many answers each rule parsed; ``unread`` are those that none could."""
        return dict(Counter(outcome.rule for outcome in self.outcomes))

    @property
    def unread(self) -> float:
        """Share of answers that no rule could parse, in [0, 1]."""
        return self.read_by.get("unread", 0) / len(self.outcomes)


def options_of(row: Row) -> dict[str, str]:
    """Letter → text of the options that are not empty."""
    return {letter: row[letter] for letter in LETTERS if letter in row}


def question_of(row: Row) -> int:
    """Index of the question of which ``row`` is a rotation."""
    return int(row["g_index"]) if "g_index" in row else int(row["index"]) % ROTATION


def unit_of(row: Row, kind: str) -> str:
    """Id of the unit that ``row`` belongs to: rows of one unit can only be scored together."""
    if kind == "circular":
        return str(question_of(row))
    return f"{row['category']}/{row['image_path']}" if kind == "yes-no" else row["index"]


def score(
    kind: str, rows: Sequence[Row], answers: Mapping[str, str], rules: Rules, judged: Mapping[str, str] | None = None
) -> Score:
    """The score of ``rows``; of every unit all rows must be there, and an answer for each.

    Args:
        kind: a key of :data:`KINDS`.
        answers: index → what the model answered.
        judged: index → a judge's reply; for ``mathvista`` the extracted answer, for ``mmvet`` the grade.
    """
    assert rows, "there is nothing to score"
    function = KINDS[kind]
    return function(rows, answers, rules, judged or {}) if kind in JUDGED else function(rows, answers, rules)


def score_multiple_choice(rows: Sequence[Row], answers: Mapping[str, str], rules: Rules) -> Score:
    """Accuracy over all rows: right if the letter read is ``answer``, wrong if none could be read."""
    outcomes = _outcomes_of_options(rows, answers, rules)
    return _mean_score(rows, outcomes, rules, ("split", "l2-category", "category"))


def score_circular(rows: Sequence[Row], answers: Mapping[str, str], rules: Rules) -> Score:
    """Accuracy over questions: one is right only if all its rotations are."""
    outcomes = _outcomes_of_options(rows, answers, rules)
    groups = defaultdict(list)
    for row, outcome in zip(rows, outcomes, strict=True):
        groups[question_of(row)].append(outcome.right)
    questions = [row for row in rows if int(row["index"]) == question_of(row)]
    assert len(questions) == len(groups), "a rotation without its question"
    units = tuple(Unit(unit_of(row, "circular"), 100.0 * min(groups[question_of(row)])) for row in questions)
    by, counts = _by_column(questions, units, ("split", "l2-category", "category"))
    return Score(_mean([unit.value for unit in units]), rules.name, outcomes, units, by, counts=counts)


def _outcomes_of_options(rows: Sequence[Row], answers: Mapping[str, str], rules: Rules) -> tuple[Outcome, ...]:
    readings = [read_option(answers[row["index"]], options_of(row), rules) for row in rows]
    return tuple(_outcome(row, r, r.value == row["answer"]) for row, r in zip(rows, readings, strict=True))


def score_yes_no(rows: Sequence[Row], answers: Mapping[str, str], rules: Rules) -> Score:
    """MME: per subtask acc (questions right) + acc+ (images with both questions right), 200 points at most.

    ``value`` = points / (200 × subtasks) × 100, with all 14 subtasks (perception + cognition) / 2800 × 100.
    """
    readings = [read_yes_no(answers[row["index"]], rules) for row in rows]
    outcomes = tuple(_outcome(row, r, r.value == row["answer"]) for row, r in zip(rows, readings, strict=True))
    pairs = defaultdict(list)
    for row, outcome in zip(rows, outcomes, strict=True):
        pairs[unit_of(row, "yes-no"), row["category"]].append(outcome.right)
    assert all(len(pair) == 2 for pair in pairs.values()), "an image of MME needs two questions"
    units = tuple(
        Unit(image, 100.0 * (sum(pair) / 2 + min(pair)) / 2, category) for (image, category), pair in pairs.items()
    )
    points = {name: 2 * value for name, value in _by_stratum(units).items()}
    total = {
        "perception": sum(points[name] for name in PERCEPTION if name in points),
        "cognition": sum(points[name] for name in COGNITION if name in points),
    }
    missing = [name for name in PERCEPTION + COGNITION if name not in points]
    note = f"{len(points)} of 14 subtasks: without {', '.join(missing)}" if missing else ""
    return Score(score_of(units), rules.name, outcomes, units, {"subtask": points, "total": total}, note)


def score_vqa(rows: Sequence[Row], answers: Mapping[str, str], rules: Rules) -> Score:
    """TextVQA: mean of :func:`~llava_moslora.evaluation.reading.vqa_accuracy`; every answer can be read."""
    outcomes = tuple(
        Outcome(row["index"], answer, "short", vqa_accuracy(answer, literal_list(row["answer"]) or [], rules))
        for row, answer in ((row, answers[row["index"]]) for row in rows)
    )
    return _mean_score(rows, outcomes, rules, ("split", "category"))


def score_mathvista(rows: Sequence[Row], answers: Mapping[str, str], rules: Rules, judged: Mapping[str, str]) -> Score:
    """MathVista: what the rules read, else the answer that a judge extracted, else wrong."""

    def outcome(row: Row) -> Outcome:
        reading = read_mathvista(row, answers[row["index"]], rules)
        if reading.value is None and row["index"] in judged:
            reading = Reading(judged[row["index"]], "judge")
        return _outcome(row, reading, reading.value is not None and mathvista_right(row, reading.value, rules))

    result = _mean_score(rows, tuple(map(outcome, rows)), rules, ("task", "question_type", "answer_type"))
    skills = defaultdict(list)
    for row, unit in zip(rows, result.units, strict=True):
        named = literal_list(row.get("skills", "[]"))
        for skill in [row["skills"]] if named is None else named:
            skills[str(skill)].append(unit.value)
    by = result.by | ({"skill": {name: _mean(values) for name, values in skills.items()}} if skills else {})
    note = "lower bound by rules" if result.unread else ""
    return replace(result, by=by, note=note)


def score_mmvet(rows: Sequence[Row], answers: Mapping[str, str], rules: Rules, judged: Mapping[str, str]) -> Score:
    """MM-Vet: mean of a judge's grades. A reply that is no number in [0, 1] counts 0, as in the kit."""

    def outcome(row: Row) -> Outcome:
        answer = answers[row["index"]]
        if row["index"] not in judged:
            return Outcome(row["index"], answer, "unjudged", 0.0)
        grade = read_grade(judged[row["index"]])
        return Outcome(row["index"], answer, "unread" if grade is None else "judge", grade or 0.0)

    outcomes = tuple(map(outcome, rows))
    if open_ := sum(outcome.rule == "unjudged" for outcome in outcomes):
        note = "needs a judge" if open_ == len(rows) else f"needs a judge for {open_} of {len(rows)} answers"
        return Score(None, rules.name, outcomes, (), {}, note)
    result = _mean_score(rows, outcomes, rules, ())
    capabilities: dict[str, list[float]] = defaultdict(list)
    for row, unit in zip(rows, result.units, strict=True):
        for name in CAPABILITIES:
            # A question of this capability alone counts twice: the kit adds capabilities and their sets in one table.
            capabilities[name] += [unit.value] * ((name in row["category"]) + (name == row["category"]))
    by = {"capability": {name: _mean(values) for name, values in capabilities.items() if values}}
    return Score(result.value, rules.name, outcomes, result.units, by)


def read_grade(reply: str) -> float | None:
    """A judge's grade in [0, 1]; None where the reply is no such number."""
    try:
        grade = float(reply)
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def score_of(units: Sequence[Unit]) -> float:
    """Mean over the strata of the mean of their units, in percent."""
    return _mean(list(_by_stratum(units).values()))


def _by_stratum(units: Sequence[Unit]) -> dict[str, float]:
    strata = defaultdict(list)
    for unit in units:
        strata[unit.stratum].append(unit.value)
    return {name: _mean(values) for name, values in strata.items()}


def _outcome(row: Row, reading: Reading, right: bool) -> Outcome:
    return Outcome(row["index"], reading.value, reading.rule, float(right))


def _mean_score(rows: Sequence[Row], outcomes: tuple[Outcome, ...], rules: Rules, columns: Sequence[str]) -> Score:
    """A score whose units are the rows themselves."""
    units = tuple(Unit(outcome.index, 100.0 * outcome.right) for outcome in outcomes)
    by, counts = _by_column(rows, units, columns)
    return Score(score_of(units), rules.name, outcomes, units, by, counts=counts)


def _by_column(
    rows: Sequence[Row], units: Sequence[Unit], columns: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Mean and number of the units for every value of each column that the rows have."""
    by, counts = {}, {}
    for column in columns:
        values = defaultdict(list)
        for row, unit in zip(rows, units, strict=True):
            if column in row:
                values[row[column]].append(unit.value)
        if values:
            by[column] = {name: _mean(values[name]) for name in sorted(values)}
            counts[column] = {name: len(values[name]) for name in sorted(values)}
    return by, counts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


KINDS: dict[str, Callable[..., Score]] = {
    "multiple-choice": score_multiple_choice,
    "circular": score_circular,
    "yes-no": score_yes_no,
    "vqa": score_vqa,
    "mathvista": score_mathvista,
    "mmvet": score_mmvet,
}
JUDGED = ("mathvista", "mmvet")
