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
from llava_moslora.files.json import parse_json
from llava_moslora.files.manifest import MANIFEST
from llava_moslora.runs.checkpoints import CHECKPOINT
from llava_moslora.runs.output_dir import NAMES
from llava_moslora.runs.record import EXPORT, is_run


def new_output(folder: str, flag: str = "--output") -> Path:
    """The output folder, made if it is missing. ``flag``: that names it.

    Raises:
        Refusal: C-OUTPUT, it cannot be, or is not a folder.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error, flag) from error
    check_output(folder, flag)
    return Path(folder)


def check_output(folder: str, flag: str = "--output") -> None:
    """Refuse an output folder that is not writable, or whose nearest existing parent is not; nothing is created.

    Raises:
        Refusal: C-OUTPUT.
    """
    try:
        place = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _not_writable(folder, error, flag) from error


def _not_writable(place: str | Path, error: OSError, flag: str, what: str = "this folder is not writable") -> Refusal:
    if error.errno in NOT_OF_THE_PLACE:
        raise error
    return Refusal("C-OUTPUT", what, file=place, key=flag, found=error.strerror, fix="choose another")


def writable(file: str | None, flag: str, inputs: Sequence[str | Path] = ()) -> Path | None:
    """The file to write, absolute and without links, its folder made if it is missing; None where none was asked for.

    Args:
        inputs: what this command reads, and must not write over.

    Raises:
        Refusal: C-OUTPUT, it is not a file, is an input, is or would be among a run's or an export's own files, or
            cannot be written.
    """
    if file is None:
        return None
    try:
        path = Path(file).resolve()
        path.with_name(f".{path.name or '_'}.unfinished").exists()  # the longest name of a working file
        there = path.exists()
    except OSError as error:  # too long a name, a loop of links, a folder that cannot be entered
        raise _not_writable(file, error, flag, "no file can be written there") from error
    if there and not path.is_file():
        raise Refusal("C-OUTPUT", "not a file", file=path, key=flag, fix="name a file")
    if any(path == Path(other).resolve() or (there and path.samefile(other)) for other in inputs):  # or linked
        raise Refusal("C-OUTPUT", "this command reads that file", file=path, key=flag, fix="name another file")
    for home in path.parents:
        if what := _owner(path, home):
            fix = f"name a file elsewhere, such as {home / 'results' / path.name}"
            raise Refusal("C-OUTPUT", f"among the files of {what}", file=path, key=flag, found=home, fix=fix)
    new_output(str(path.parent), flag)
    return path


def _owner(path: Path, home: Path) -> str:
    """What ``path``, somewhere below ``home``, belongs to: "a run", "an export", or "" for neither.

    A run owns what it writes, and everything in its folders. An export owns the folders in which it has files: a model
    is read from all of a folder's files. Other subfolders are the user's.
    """
    below = path.relative_to(home)
    if is_run(home) and (NAMES.fullmatch(below.parts[0]) or CHECKPOINT.fullmatch(below.parts[0])):
        return "a run"
    return "an export" if below.parent in _folders_of_export(home) else ""


def _folders_of_export(folder: Path) -> set[Path]:
    """Those in which the export in ``folder`` has files, relative to it; none where no export is."""
    try:
        facts = parse_json((folder / EXPORT).read_bytes())
    except (OSError, ValueError):
        return set()
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), str) for key in ("format", "run")):
        return set()  # another tool's
    try:
        files = list(parse_json((folder / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, LookupError, TypeError):  # without its manifest, by hand
        files = []
    return {Path(), *(Path(str(name)).parent for name in files)}


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
