"""The prompts, as in VLMEvalKit's class ``LLaVA_XTuner``.

The MoSLoRA paper says only that it used VLMEvalKit. Its authors' README converts and merges the weights with XTuner and
then evaluates them with VLMEvalKit, which loads that layout with this class.

The image stands in front, as ``<image>\\n``, and is not part of what these functions return. There are two sets,
because VLMEvalKit has changed one of them since; the name goes into every result.
"""

from __future__ import annotations

import re

from llava_moslora.evaluation.rows import Row
from llava_moslora.evaluation.scoring import options_of

PROMPTS = {  # name → source
    "prompts-2024": "VLMEvalKit ab638e4a (2024-06-18), class LLaVA_XTuner",
    "prompts": "ms-vlmeval 0.0.20 (2026-05), class LLaVA_XTuner",
}
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CHINESE = "请直接回答选项字母。"
SHORT = "Answer the question using a single word or phrase."
_CHINESE = re.compile("[\u4e00-\u9fff]")


def prompt(row: Row, kind: str, prompts: str) -> str:
    """The text for one row.

    - multiple choice, circular: hint, question, ``A. …`` for every option and the instruction, a line each; the
      instruction is Chinese if one character of the rest is.
    - vqa: the question and the instruction. The set of 2024 ends in a newline.
    - yes-no, mathvista, mmvet: the question as the file has it, with its own instruction.

    Args:
        kind: a key of :data:`llava_moslora.evaluation.scoring.KINDS`.
        prompts: a key of :data:`PROMPTS`.
    """
    assert prompts in PROMPTS, f"unknown set of prompts {prompts!r}"
    text = row["question"]
    if kind in ("multiple-choice", "circular"):
        lines = [row["hint"]] if "hint" in row else []
        lines += [text, *(f"{letter}. {option}" for letter, option in options_of(row).items())]
        lines.append(LETTER_CHINESE if _CHINESE.search("\n".join(lines)) else LETTER)
        text = "\n".join(lines)
    elif kind == "vqa":
        text += f"\n{SHORT}" + ("\n" if prompts == "prompts-2024" else "")
    return text.replace("<image>", "")
