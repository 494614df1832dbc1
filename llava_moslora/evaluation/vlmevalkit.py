"""A run or an export as a model of VLMEvalKit, which has no class for LLaVA-1.5 in transformers' layout.

Start VLMEvalKit's ``run.py`` with this file's lines before it::

    import runpy
    from functools import partial
    from vlmeval.config import supported_VLM
    from llava_moslora.evaluation.vlmevalkit import model_class

    supported_VLM["my-llava"] = partial(model_class(), "merged/llama3-8b-moslora")
    runpy.run_path("run.py", run_name="__main__")     # python this.py --model my-llava --data MMBench_DEV_EN MME

``pip install ms-vlmeval`` installs VLMEvalKit. Importing it disables TLS certificate verification for the whole
process.

The wordings are those of :mod:`llava_moslora.evaluation.prompts`, of the kit's class ``LLaVA_XTuner``. Prompts are made
by the function that made the training ids, and images by the transform that training used. Answers are greedy, so that
a score can be repeated. That class samples with beams, always pads and has no system text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_moslora.data.images import load_image
from llava_moslora.evaluation import prompts
from llava_moslora.evaluation.rows import LETTERS
from llava_moslora.inference.generate import Question, answer
from llava_moslora.inference.load import load
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

ROW_KINDS = {"MCQ": "multiple-choice", "Y/N": "yes-no"}  # the kit's type of a dataset → kind of its rows here
SHORT_ANSWER = 5  # tokens for a letter, yes or no, as LLaVA_XTuner allows


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
            return DATASET_TYPE(dataset) in ROW_KINDS

        def build_prompt(self, line: Mapping, dataset: str | None = None) -> list[dict[str, str]]:
            images = [{"type": "image", "value": file} for file in self.dump_image(line, dataset)]
            return [*images, {"type": "text", "value": prompt(line, DATASET_TYPE(dataset))}]

        def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
            short = dataset is not None and self.use_custom_prompt(dataset)
            tokens = min(SHORT_ANSWER, self.max_new_tokens) if short else self.max_new_tokens
            return next(answer(self.chat_model, [question(message)], max_new_tokens=tokens))

    return LlavaMoslora


def prompt(line: Mapping, kind: str) -> str:
    """A row of the kit's as ``LLaVA_XTuner`` asks it.

    Args:
        line: with ``question``, and perhaps ``hint`` and ``A``, ``B`` …; missing values are NaN in VLMEvalKit's tables.
        kind: ``MCQ`` or ``Y/N``.
    """
    names = [name for name in ("question", "hint", *LETTERS) if name in line and line[name] == line[name]]
    return prompts.prompt({name: str(line[name]) for name in names}, ROW_KINDS[kind], "prompts")


def question(message: Sequence[Mapping[str, str]]) -> Question:
    """VLMEvalKit's message, images and texts in any order, as one turn: first the images, then the texts."""
    files = [Path(item["value"]).resolve() for item in message if item["type"] == "image"]
    texts = [item["value"].replace(IMAGE_TOKEN, "") for item in message if item["type"] == "text"]
    images = [load_image(file.name, file.parent) for file in files]
    return images, [Turn("human", f"{IMAGE_TOKEN}\n" * len(images) + "\n".join(texts))]
