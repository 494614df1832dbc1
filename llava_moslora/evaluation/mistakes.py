"""Selects answers to inspect: a model's mistakes, or answers that only one of two models got right.

A sample of every benchmark, with a fixed seed; :mod:`llava_moslora.evaluation.mistakes_page` shows it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.ask import read_answers
from llava_moslora.evaluation.benchmarks import BENCHMARKS, Benchmark
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.results import Result
from llava_moslora.evaluation.scoring import Outcome
from llava_moslora.evaluation.tsv import Table

# States of an answer, and of one model's answer compared with another's.
UNREAD, WRONG, PARTLY, RIGHT = "unread", "wrong", "partly right", "right"
A_BETTER, B_BETTER, ALIKE = "A right, B wrong", "B right, A wrong", "alike"
UNJUDGED = "needs a judge"
MISTAKES, DIFFERENCES = (UNREAD, WRONG, PARTLY), (A_BETTER, B_BETTER)


@dataclass(frozen=True)
class Answered:
    """The answers of one model, or of A and B, to one benchmark.

    Attributes:
        table: the file that was asked.
        prompts: name of the set of prompts.
        outcomes, answers: by index, of each model.
    """

    benchmark: Benchmark
    table: Table
    prompts: str
    outcomes: tuple[Mapping[str, Outcome], ...]
    answers: tuple[Mapping[str, str], ...]

    @classmethod
    def read(cls, table: Table, folders: Sequence[Path], results: Sequence[Result]) -> Answered:
        """
        Args:
            folders: with the answers of each model, of which ``results`` are the scores.

        Raises:
            Refusal: C-ANSWERS, some are missing or damaged.
        """
        answers = tuple(read_answers(folder, {})[1] for folder in folders)
        outcomes = tuple({outcome.index: outcome for outcome in result.score.outcomes} for result in results)
        for folder, of, scored in zip(folders, answers, outcomes, strict=True):
            if missing := scored.keys() - of.keys():
                raise Refusal(
                    "C-ANSWERS", "a scored answer is missing", file=folder, record_id=min(missing),
                    fix="evaluate the model again: only missing answers are generated",
                )  # fmt: skip
        header = results[0].header
        return cls(BENCHMARKS[header["benchmark"]], table, str(header["prompts"]), outcomes, answers)

    def states(self) -> dict[int, str]:
        """Number of a row that was asked → what its answers are."""
        states = {}
        for number, row in enumerate(self.table.rows):
            outcomes = [of[row["index"]] for of in self.outcomes if row["index"] in of]
            if len(outcomes) < len(self.outcomes):
                continue
            if any(outcome.rule == "unjudged" for outcome in outcomes):
                states[number] = UNJUDGED
            else:
                states[number] = _compared(*outcomes) if len(outcomes) == 2 else _state(*outcomes)
        return states


@dataclass(frozen=True)
class Chosen:
    """The rows of one benchmark to inspect.

    Attributes:
        states: number of a row → what its answers are.
        numbers: of the rows to look at, in the file's order.
    """

    answered: Answered
    states: Mapping[int, str]
    numbers: tuple[int, ...]

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.states.values())

    @property
    def shown(self) -> Counter[str]:
        """As :attr:`counts`, of the rows to look at."""
        return Counter(self.states[number] for number in self.numbers)

    @property
    def needed(self) -> int:
        """The ``limit`` that includes everything."""
        counts = self.counts
        return max(sum(counts[state] for state in MISTAKES), *(counts[state] for state in DIFFERENCES))


def choose(answered: Answered, limit: int) -> Chosen:
    """At most ``limit`` answers that are not right and a tenth as many right ones; of two models at most ``limit`` that
    only A got right, or more nearly than B, and as many of B."""
    states = answered.states()
    kinds: tuple[tuple[tuple[str, ...], int], ...] = ((MISTAKES, limit), ((RIGHT,), limit // 10))
    if len(answered.answers) == 2:
        kinds = (((A_BETTER,), limit), ((B_BETTER,), limit))

    def order(number: int) -> str:
        return hashlib.sha256(answered.table.rows[number]["index"].encode()).hexdigest()

    drawn = [
        number
        for wanted, most in kinds
        for number in sorted((number for number, state in states.items() if state in wanted), key=order)[:most]
    ]
    return Chosen(answered, states, tuple(sorted(drawn)))


def answered_by_both(
    data: str | Path, outputs: Sequence[Path], results: Sequence[Mapping[str, Result]]
) -> Iterator[Answered]:
    """Of every benchmark that both results have and whose file is in ``data``, one after the other.

    Raises:
        Refusal: C-COMPARE, not the file that was asked; what reading files and answers refuses.
    """
    for name, benchmark in BENCHMARKS.items():
        path = Path(data) / f"{benchmark.file}.tsv"
        if any(name not in of for of in results) or not path.is_file():
            continue
        table, asked = open_benchmark(benchmark, data), results[0][name].header.get("data")
        if table.md5 != asked:
            raise Refusal(
                "C-COMPARE", "not the file that was asked", file=path, key="--data", found=table.md5, expected=asked,
            )  # fmt: skip
        yield Answered.read(table, [output / name for output in outputs], [of[name] for of in results])


def _state(outcome: Outcome) -> str:
    if outcome.rule == "unread":
        return UNREAD
    return RIGHT if outcome.right == 1 else PARTLY if outcome.right else WRONG


def _compared(a: Outcome, b: Outcome) -> str:
    return ALIKE if a.right == b.right else A_BETTER if a.right > b.right else B_BETTER
