"""Evaluates a user's question file: each question is a separate conversation, answers are compared after normalisation.

The file is a JSON array of objects with ``id``, ``image``, ``question`` and ``answer``. Answers are saved in
``OUTPUT.unfinished`` as they are generated; the file is renamed to OUTPUT when it is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from llava_moslora.data.images import load_image
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.ask import source_header
from llava_moslora.evaluation.output import locked, writable
from llava_moslora.files.disk import fsync, naming, replace_file, replace_json
from llava_moslora.files.json import parse_json
from llava_moslora.files.manifest import sha256
from llava_moslora.files.tensors import save_tensors
from llava_moslora.inference.generate import ImageInput, Question, answer, first_logits
from llava_moslora.inference.load import ChatModel, load
from llava_moslora.runs.checkpoints import model_checkpoint
from llava_moslora.runs.record import RUN
from llava_moslora.text.conversation import Turn


@dataclass(frozen=True)
class VqaExample:
    """A question about one image, and its true answer."""

    id: str
    image: str
    question: str
    answer: str


def read_questions(path: str | Path) -> list[VqaExample]:
    """A JSON array of objects with ``id``, ``image``, ``question`` and ``answer``.

    Raises:
        Refusal: no such file, no JSON array, none in it, or a record without one of the four as text.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise Refusal("D-PATH", what, file=path, key="--questions", expected="a JSON file of questions")
    try:
        rows = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise Refusal("D-PARSE", "not JSON", file=path, found=error) from error
    if not isinstance(rows, list) or not rows:
        found = "an empty array" if rows == [] else type(rows).__name__
        raise Refusal("D-PARSE", "no questions", file=path, found=found, expected="a JSON array of questions")
    examples = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise Refusal(
                "D-TYPE", "not a question", file=path, record=index, found=type(row).__name__, expected="an object"
            )
        missing = [key for key in ("id", "image", "question", "answer") if key not in row]
        if missing:
            raise Refusal("D-KEY", "a question without one of its parts", file=path, record=index, key=missing[0])
        if wrong := [key for key in ("image", "question", "answer") if not isinstance(row[key], str)]:
            raise Refusal(
                "D-TYPE", "not text", file=path, record=index, key=wrong[0], found=type(row[wrong[0]]).__name__,
                expected="text", fix="of several answers (VQAv2) choose one" if wrong[0] == "answer" else None,
            )  # fmt: skip
        examples.append(VqaExample(str(row["id"]), row["image"], row["question"], row["answer"]))
    return examples


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
) -> float:
    """Evaluate a question file and return the accuracy, in [0, 1].

    Args:
        run: a training run, or an export.
        untrained: use the model as it was before the first training step.
        blank: see :func:`with_images`.
        output: JSON file for the accuracy and the answers.
        probe: safetensors file for ``logits`` of the first token of the first 32 answers, float32[32, V].

    Raises:
        Refusal: what :func:`read_questions`, :func:`writable`, :func:`locked`, :func:`earlier_answers` and loading
            refuse.
    """
    examples = read_questions(file)
    answers_file, probe_file = writable(output, "--output"), writable(probe, "--probe")
    with ExitStack() as stack:
        for place in (answers_file, probe_file):
            if place is not None:
                lock = place.with_name(f".{place.name}.lock")
                stack.enter_context(locked(lock))
                stack.callback(lock.unlink, missing_ok=True)
        return _evaluate(
            run, file, examples, image_folder, batch_size=batch_size, untrained=untrained, blank=blank,
            answers_file=answers_file, probe_file=probe_file,
        )  # fmt: skip


def _evaluate(
    run: str, file: str, examples: list[VqaExample], image_folder: str, *, batch_size: int, untrained: bool,
    blank: bool, answers_file: Path | None, probe_file: Path | None,
) -> float:  # fmt: skip
    """As :func:`evaluate_questions`, with both files locked."""
    trained_run = (Path(run) / RUN).is_file() and not untrained  # else an export, or a run before its training
    checkpoint = model_checkpoint(Path(run)) if trained_run else None
    facts = {
        "run": str(Path(run).resolve()),
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "model": None if (Path(run) / RUN).is_file() else source_header(run, None)["model"],
        "questions": sha256(Path(file)),
        "image_folder": str(Path(image_folder).resolve()),
        "blank": blank,
        "batch_size": batch_size,
    }
    unfinished = None if answers_file is None else answers_file.with_name(answers_file.name + ".unfinished")
    answers = [] if unfinished is None else earlier_answers(unfinished, facts, batch_size)
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
        replace_json(answers_file, {"accuracy": share, "answers": answers})
        unfinished.unlink()
    if probe_file is not None:
        logits = torch.stack([first_logits(chat_model, question) for question in questions[:32]])
        partial = probe_file.with_name(f".{probe_file.name}.unfinished")
        save_tensors({"logits": logits}, partial)
        fsync(partial)
        os.replace(partial, probe_file)
    return share


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
