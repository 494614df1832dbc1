"""The output folder or file of an evaluation: created, locked, and read again to continue and to score."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llava_moslora.errors import NOT_OF_THE_PLACE, Refusal
from llava_moslora.evaluation.ask import Questions, read_answers
from llava_moslora.evaluation.judge import Judge, judge_answers
from llava_moslora.evaluation.kept import Header
from llava_moslora.evaluation.reading import Rules
from llava_moslora.evaluation.results import Result, read_results, write_result
from llava_moslora.evaluation.scoring import JUDGED, score


def new_output(folder: str) -> Path:
    """The output folder, made if it is missing.

    Raises:
        Refusal: C-OUTPUT, it cannot be, or is not a folder.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    check_output(folder)
    return Path(folder)


def check_output(folder: str) -> None:
    """Refuse an output folder that is not writable, or whose nearest existing parent is not; nothing is created.

    Raises:
        Refusal: C-OUTPUT.
    """
    place = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: str, error: OSError) -> Refusal:
    if error.errno in NOT_OF_THE_PLACE:
        raise error
    what, fix = "this folder is not writable", "choose another"
    return Refusal("C-OUTPUT", what, file=folder, key="--output", found=error.strerror, fix=fix)


def writable(file: str | None, flag: str) -> Path | None:
    """The file to write, absolute and without links; None where none was asked for.

    Raises:
        Refusal: C-OUTPUT, it is not a file, or cannot be written.
    """
    if file is None:
        return None
    path = Path(file).resolve()
    if path.exists() and not path.is_file():
        raise Refusal("C-OUTPUT", "not a file", file=path, key=flag, fix="name a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        if error.errno in NOT_OF_THE_PLACE:
            raise
        raise Refusal(
            "C-OUTPUT", "this folder is not writable", file=path.parent, key=flag, found=error.strerror,
            fix="create it, or choose another",
        ) from error  # fmt: skip


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock: a worker that survived its launcher must not write at the same time as a new one.

    Raises:
        Refusal: C-LOCKED, another process holds it.
    """
    with open(file, "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not file.exists() or not os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                raise BlockingIOError  # whoever held it has just deleted it
        except BlockingIOError:
            raise Refusal(
                "C-LOCKED", "another process is evaluating into this folder", file=file.parent, key="--output",
                fix="wait for it, or choose another --output",
            ) from None  # fmt: skip
        except OSError:  # a file system without locks
            logging.warning("%s does not support locks: run only one evaluation into it at a time", file.parent)
        yield


def complete(questions: Questions, header: Header, folder: Path) -> bool:
    """Whether every row has an answer."""
    answers = read_answers(folder, questions.header() | header)[1]
    return all(row["index"] in answers for row in questions.rows)


def scored(
    output: Path, asked: Sequence[Questions], header: Header, rules: Rules, judge: Judge | None = None
) -> tuple[dict[str, Result], Refusal | None]:
    """Benchmark → result, of this command and of earlier ones with the same model.

    If the judge fails, only scores that need it are affected: they are computed as without one, and the refusal is
    returned.
    """
    failure: Refusal | None = None
    for questions in sorted(asked, key=lambda questions: questions.benchmark.kind in JUDGED):  # the judge comes last
        folder, kind = output / questions.benchmark.name, questions.benchmark.kind
        stored, answers = read_answers(folder, questions.header() | header)
        judged = None
        if judge is not None and kind in JUDGED and failure is None:
            try:
                judged, of_judge = judge_answers(judge, questions, answers, rules, folder)
                stored = stored | of_judge
            except Refusal as refusal:
                failure = refusal
        write_result(folder, Result(stored, score(kind, questions.rows, answers, rules, judged)))
    results = {
        name: result
        for name, result in read_results(output).items()
        if result.header.get("model") == header["model"] and result.score.rules == rules.name
    }
    return results, failure
