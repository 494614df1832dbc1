"""A run or an export as a model of VLMEvalKit, which has no class of its own for LLaVA-1.5 in transformers' layout.

Start VLMEvalKit's ``run.py`` with this file's lines before it::

    import runpy
    from functools import partial
    from vlmeval.config import supported_VLM
    from llava_moslora.evaluation.vlmevalkit import model_class

    supported_VLM["my-llava"] = partial(model_class(), "merged/llama3-8b-moslora")
    runpy.run_path("run.py", run_name="__main__")     # python this.py --model my-llava --data MMBench_DEV_EN MME

Prompts are made by the function that made the training ids, and images by the transform that training used. Answers
are greedy, so that a score can be repeated. XTuner's class samples with beams, always pads and has no system text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_moslora.data.images import load_image
from llava_moslora.inference.generate import Question, answer
from llava_moslora.inference.load import load
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's own instruction
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."


def model_class() -> type:
    """The class for VLMEvalKit; made in a function, so that this module can be imported where it is not installed."""
    from vlmeval.dataset import DATASET_TYPE
    from vlmeval.vlm.base import BaseModel

    class LlavaMoslora(BaseModel):
        INSTALL_REQ = False
        INTERLEAVE = True

        def __init__(self, path: str, max_new_tokens: int = 512):
            super().__init__()
            self.chat_model = load(path)
            self.max_new_tokens = max_new_tokens

        def use_custom_prompt(self, dataset: str) -> bool:
            return DATASET_TYPE(dataset) in ("MCQ", "Y/N")

        def build_prompt(self, line: Mapping, dataset: str | None = None) -> list[dict[str, str]]:
            images = [{"type": "image", "value": file} for file in self.dump_image(line, dataset)]
            return [*images, {"type": "text", "value": prompt(line, DATASET_TYPE(dataset))}]

        def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
            return next(answer(self.chat_model, [question(message)], max_new_tokens=self.max_new_tokens))

    return LlavaMoslora


def prompt(line: Mapping, kind: str) -> str:
    """A row of a benchmark as LLaVA-1.5 was evaluated: hint, question, options and instruction, each on a line.

    Args:
        line: with ``question``, and perhaps ``hint`` and ``A``, ``B`` …; missing values are NaN in VLMEvalKit's tables.
        kind: ``MCQ`` or ``Y/N``.
    """
    hint = [line["hint"]] if isinstance(line.get("hint"), str) else []
    options = [
        f"{letter}. {line[letter]}" for letter in OPTION_LETTERS if letter in line and line[letter] == line[letter]
    ]
    return "\n".join([*hint, line["question"], *options, LETTER_INSTRUCTION if kind == "MCQ" else SHORT_INSTRUCTION])


def question(message: Sequence[Mapping[str, str]]) -> Question:
    """VLMEvalKit's message, images and texts in any order, as one turn: first the images, then the texts."""
    files = [Path(item["value"]).resolve() for item in message if item["type"] == "image"]
    texts = [item["value"].replace(IMAGE_TOKEN, "") for item in message if item["type"] == "text"]
    images = [load_image(file.name, file.parent) for file in files]
    return images, [Turn("human", f"{IMAGE_TOKEN}\n" * len(images) + "\n".join(texts))]
