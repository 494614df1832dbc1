"""Short-answer accuracy: each question in a conversation of its own, answers compared after normalisation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from llava_moslora.data.images import load_image
from llava_moslora.errors import Refusal
from llava_moslora.inference.generate import ImageInput, Question, answer
from llava_moslora.inference.load import ChatModel
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
        raise Refusal("D-PATH", "no such file", file=path, key="--questions")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
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
                expected="text; of several answers (VQAv2) choose one",
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

    With ``blank`` every image is replaced by one of the tower's mean colour: answers that are then still right were
    guessed from the question.
    """

    def image(example: VqaExample) -> ImageInput:
        return chat_model.transform.blank() if blank else load_image(example.image, image_folder)

    return [([image(e)], [Turn("human", f"<image>\n{e.question}")]) for e in examples]


def ask(chat_model: ChatModel, questions: list[Question], *, batch_size: int = 16) -> Iterator[str]:
    """The model's greedy answers as they are made, in order, of at most 8 tokens."""
    answers = answer(chat_model, questions, max_new_tokens=8, batch_size=batch_size)
    return iter(tqdm(answers, total=len(questions), unit="question", dynamic_ncols=True))


def accuracy(examples: list[VqaExample], answers: list[str]) -> float:
    """Share of the answers that equal the true ones after :func:`normalise`."""
    right = sum(normalise(a) == normalise(e.answer) for e, a in zip(examples, answers, strict=True))
    return right / len(examples)
