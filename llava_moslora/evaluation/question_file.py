"""Evaluates a user's question file: each question is a separate conversation, answers are compared after normalisation.

The file is a JSON array of objects, or one per line, with ``image``, ``question``, ``answer`` and perhaps ``id``.
Answers are saved in ``OUTPUT.unfinished`` as they are generated; the file is renamed to OUTPUT when it is complete.
OUTPUT says what was evaluated: only an answer file of the same evaluation is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from llava_moslora.data.images import load_image
from llava_moslora.data.sources.json import json_type
from llava_moslora.errors import Refusal, few
from llava_moslora.evaluation.ask import source_header
from llava_moslora.evaluation.output import locked, writable
from llava_moslora.files.disk import fsync, naming, replace_file, replace_json
from llava_moslora.files.json import LARGEST, parse_json
from llava_moslora.files.manifest import sha256
from llava_moslora.files.tensors import save_tensors
from llava_moslora.inference.generate import ImageInput, Question, answer, first_logits
from llava_moslora.inference.load import ChatModel, load
from llava_moslora.runs.checkpoints import model_checkpoint
from llava_moslora.runs.record import RUN, read_run
from llava_moslora.text.conversation import Turn

# Key of a question → its names: this package's, LLaVA's
KEYS = {"id": ("id", "question_id"), "image": ("image",), "question": ("question", "text"), "answer": ("answer",)}
ROWS = "a JSON array of questions, or one per line"
EXAMPLE = '[{"id": "1", "image": "cat.jpg", "question": "What is it?", "answer": "a cat"}]'


@dataclass(frozen=True)
class VqaExample:
    """A question about one image, and its true answer."""

    id: str
    image: str
    question: str
    answer: str


def read_questions(path: str | Path) -> list[VqaExample]:
    """A JSON array of objects, or one object per line, with the keys of :data:`KEYS`.

    Raises:
        Refusal: D-PATH, no such file; D-PARSE, no JSON, or no question in it; D-TYPE, D-KEY, a record without image,
            question and answer as text.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise Refusal("D-PATH", what, file=path, key="--questions", expected="a JSON file of questions")
    return [_example(row, index, path) for index, row in enumerate(_rows(path))]


def _rows(path: Path) -> list[Any]:
    try:
        content = path.read_bytes()
        rows = parse_json(content)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or not content.removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
            raise Refusal("D-PARSE", "not JSON", file=path, found=error, expected=ROWS, fix=EXAMPLE) from error
        rows = list(_lines(content, path))
    if isinstance(rows, dict) and any(rows.keys() & set(names) for names in KEYS.values()):
        rows = [rows]  # one line
    if not isinstance(rows, list) or not rows:
        found = "nothing in it" if rows in ([], {}) else json_type(rows)
        found += f" with {few(rows)}" if rows and isinstance(rows, dict) else ""
        raise Refusal("D-PARSE", "no questions", file=path, found=found, expected=ROWS, fix=EXAMPLE)
    return rows


def _lines(content: bytes, path: Path) -> Iterator[Any]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            if line.strip():
                yield parse_json(line)
        except ValueError as error:
            raise Refusal(
                "D-PARSE", f"line {number} is not JSON", file=path, found=error, expected=ROWS, fix=EXAMPLE
            ) from error  # fmt: skip


def _example(row: Any, index: int, path: Path) -> VqaExample:
    if not isinstance(row, dict):
        raise Refusal(
            "D-TYPE", "not a question", file=path, record=index, found=json_type(row), expected="an object", fix=EXAMPLE
        )
    # A null is as good as no key: converters of tables write it for an empty cell.
    found = {key: next((name for name in names if row.get(name) is not None), None) for key, names in KEYS.items()}
    if missing := [key for key, name in found.items() if name is None and key != "id"]:
        there = few((f"{name} (null)" if value is None else name for name, value in row.items()), 8)
        raise Refusal(
            "D-KEY", "a question without all of its parts", file=path, record=index, key=", ".join(missing),
            found=there or "nothing", expected=", ".join(KEYS), fix=_fix(row, missing),
        )  # fmt: skip
    for key, name in found.items():
        if key != "id" and not isinstance(row[name], str):
            several = key == "answer" and isinstance(row[name], list)
            fix = "of several answers (VQAv2) choose one" if several else f"write the {key} in quotes"
            raise Refusal(
                "D-TYPE", "not text", file=path, record=index, key=name, found=json_type(row[name]), expected="text",
                fix=fix,
            )  # fmt: skip
    image, question, answer = (str(row[found[key]]) for key in ("image", "question", "answer"))
    return VqaExample(str(row[found["id"]] if found["id"] else index), image, question, answer)


def _fix(row: dict[str, Any], missing: list[str]) -> str:
    if "conversations" in row or "messages" in row:
        return f"conversations are for --data_path; a question file is {EXAMPLE}"
    if missing == ["answer"]:
        return "add the true answer: the accuracy compares with it"
    return EXAMPLE


def normalise(text: str) -> str:
    """Lower case, without punctuation at the ends and without an article, as VQA scorers compare."""
    return re.sub(r"^(a|an|the)\s+", "", text.strip().lower().strip(" .!?\"'"))


def with_images(
    chat_model: ChatModel, examples: list[VqaExample], image_folder: str | Path, *, blank: bool = False
) -> list[Question]:
    """Each question with its image, as the first turn of a conversation of its own.

    With ``blank`` every image is replaced by one of the tower's mean colour: answers that are still right were
    guessed from the question.
    """

    def image(example: VqaExample) -> ImageInput:
        return chat_model.require_images().blank() if blank else load_image(example.image, image_folder)

    return [([image(e)], [Turn("human", f"<image>\n{e.question}")]) for e in examples]


def ask(chat_model: ChatModel, questions: list[Question], *, batch_size: int = 16) -> Iterator[str]:
    """The model's greedy answers as they are made, in order, of at most 8 tokens."""
    answers = answer(chat_model, questions, max_new_tokens=8, batch_size=batch_size)
    return iter(tqdm(answers, total=len(questions), unit="question", dynamic_ncols=True))


def accuracy(examples: list[VqaExample], answers: list[str]) -> float:
    """Share of the answers that equal the true ones after :func:`normalise`."""
    right = sum(normalise(a) == normalise(e.answer) for e, a in zip(examples, answers, strict=True))
    return right / len(examples)


def evaluate_questions(
    run: str,
    file: str,
    image_folder: str,
    *,
    batch_size: int = 16,
    untrained: bool = False,
    blank: bool = False,
    output: str | None = None,
    probe: str | None = None,
) -> tuple[float, int]:
    """Evaluate a question file and return the accuracy, in [0, 1], and the number of questions.

    Args:
        run: a training run, or an export.
        untrained: use the model as it was before the first training step.
        blank: see :func:`with_images`.
        output: JSON file for the accuracy and the answers.
        probe: safetensors file for ``logits`` of the first token of the first 32 answers, float32[32, V].

    Raises:
        Refusal: what :func:`read_questions`, :func:`writable`, :func:`locked`, :func:`check_replaceable`,
            :func:`earlier_answers` and loading refuse; C-OUTPUT, ``probe`` is another kind of file.
    """
    examples = read_questions(file)
    answers_file = writable(output, "--output", [file])
    if (probe_file := writable(probe, "--probe", [file])) is not None:
        _check_probe(probe_file, answers_file)
    with ExitStack() as stack:
        for place in (answers_file, probe_file):
            if place is not None:
                lock = place.with_name(f".{place.name}.lock")
                stack.enter_context(locked(lock))
                stack.callback(lock.unlink, missing_ok=True)
        share = _evaluate(
            run, file, examples, image_folder, batch_size=batch_size, untrained=untrained, blank=blank,
            answers_file=answers_file, probe_file=probe_file,
        )  # fmt: skip
    return share, len(examples)


def _evaluate(
    run: str, file: str, examples: list[VqaExample], image_folder: str, *, batch_size: int, untrained: bool,
    blank: bool, answers_file: Path | None, probe_file: Path | None,
) -> float:  # fmt: skip
    """As :func:`evaluate_questions`, with both files locked."""
    facts = _facts(run, file, image_folder, batch_size=batch_size, untrained=untrained, blank=blank)
    if answers_file is not None and answers_file.exists():
        check_replaceable(answers_file, facts)
    unfinished = None if answers_file is None else answers_file.with_name(answers_file.name + ".unfinished")
    answers = [] if unfinished is None else earlier_answers(unfinished, facts, batch_size)
    checkpoint = None if facts["checkpoint"] is None else Path(run) / facts["checkpoint"]
    chat_model = load(run, dtype=torch.float32, trained=not untrained, checkpoint=checkpoint)
    questions = with_images(chat_model, examples, image_folder, blank=blank)
    if unfinished is not None:
        replace_file(unfinished, "".join(json.dumps(line) + "\n" for line in (facts, *answers)).encode())
    with naming(unfinished or Path(os.devnull)), open(unfinished or os.devnull, "a", encoding="utf-8") as kept:
        for text in ask(chat_model, questions[len(answers) :], batch_size=batch_size):
            answers.append(text)
            print(json.dumps(text), file=kept, flush=True)
    share = accuracy(examples, answers)
    if answers_file is not None and unfinished is not None:
        replace_json(answers_file, {"accuracy": share, "answers": answers, "evaluation": facts})
        unfinished.unlink()
    if probe_file is not None:
        logits = torch.stack([first_logits(chat_model, question) for question in questions[:32]])
        partial = probe_file.with_name(f".{probe_file.name}.unfinished")
        save_tensors({"logits": logits}, partial)
        fsync(partial)
        os.replace(partial, probe_file)
    return share


def _facts(
    run: str, file: str, image_folder: str, *, batch_size: int, untrained: bool, blank: bool
) -> dict[str, Any]:  # fmt: skip
    """What decides the answers: an answer file of other facts is not replaced, unfinished ones are not gone on with."""
    is_a_run, checkpoint = (Path(run) / RUN).is_file(), None
    if is_a_run and not untrained:
        checkpoint = model_checkpoint(Path(run))
    if is_a_run and untrained:  # no file has that model
        parts = json.dumps(asdict(read_run(run).located.model), sort_keys=True)
        model = hashlib.sha256(parts.encode()).hexdigest()
    else:
        model = source_header(run, checkpoint)["model"]
    return {
        "run": str(Path(run).resolve()),
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "model": model,
        "questions": sha256(Path(file)),
        "image_folder": str(Path(image_folder).resolve()),
        "untrained": untrained,
        "blank": blank,
        "batch_size": batch_size,
    }


def check_replaceable(file: Path, facts: dict[str, Any]) -> None:
    """Refuse (C-OUTPUT) a file that is there, unless it is an answer file of the same evaluation."""
    try:
        content = parse_json(file.read_bytes()) if file.stat().st_size <= LARGEST else None
    except ValueError:
        content = None
    earlier = content.get("evaluation") if isinstance(content, dict) else None
    fix = "choose another --output, or move that file away"
    if not isinstance(earlier, dict):
        what = "a file is there, and it is no answer file of an evaluation"
        if isinstance(content, dict) and {"accuracy", "answers"} <= content.keys():
            what = "an answer file of an earlier version, which does not say what was evaluated"
            fix = "move or delete it, or choose another --output"
        raise Refusal("C-OUTPUT", what, file=file, key="--output", fix=fix)
    if other := [name for name in facts if earlier.get(name) != facts[name]]:
        raise Refusal(
            "C-OUTPUT", "answers of another evaluation", file=file, key="--output",
            found=", ".join(f"{name} {earlier.get(name)}" for name in other),
            expected=", ".join(f"{name} {facts[name]}" for name in other), fix=fix,
        )  # fmt: skip


def _check_probe(file: Path, answers_file: Path | None) -> None:
    if file == answers_file:
        raise Refusal("C-OUTPUT", "the same file as --output", file=file, key="--probe", fix="name another file")
    if not file.exists():
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError):
        names = []
    if names != ["logits"]:
        fix = "choose another --probe, or move that file away"
        raise Refusal("C-OUTPUT", "a file is there, and it is no probe", file=file, key="--probe", fix=fix)


def earlier_answers(file: Path, facts: dict, batch_size: int) -> list[str]:
    """Answers of complete batches that the same evaluation kept in ``file`` before it was stopped.

    Raises:
        Refusal: C-OUTPUT, they are of another evaluation.
    """
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]  # the last has no end, or is empty
    try:
        earlier, *answers = map(parse_json, lines)
    except ValueError:
        earlier, answers = None, []
    if earlier == facts:
        answers = answers[: len(answers) // batch_size * batch_size]
        print(f"continuing after {len(answers)} answers of {file}")
        return answers
    if not any(line.strip() for line in lines[1:]):
        return []  # nothing was answered
    raise Refusal(
        "C-OUTPUT", "unfinished answers of another evaluation", file=file, key="--output",
        fix="move them away or delete them, or choose another --output",
    )  # fmt: skip
