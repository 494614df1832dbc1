"""Which Python has VLMEvalKit, and answers to score by it."""

import json
import os
from pathlib import Path

import pytest

from llava_moslora.evaluation.ask import Questions
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark

VARIABLE = "LLAVA_MOSLORA_TEST_KIT_PYTHON"
HEADER = {"model": "m", "checkpoint": None}


def kit_python() -> str:
    """The Python that the environment names; skips the test where it names none."""
    if python := os.environ.get(VARIABLE):
        return python
    pytest.skip(f"{VARIABLE} names no Python with VLMEvalKit (pip install ms-vlmeval==0.0.20)")


def answered(output: Path, data: Path, name: str, text: str, predictions: dict[str, str], **settings) -> Questions:
    """A benchmark's file below ``data``, and answers to it below ``output`` as asking a model leaves them."""
    benchmark = BENCHMARKS[name]
    data.mkdir(exist_ok=True)
    (data / f"{benchmark.file}.tsv").write_text(text, encoding="utf-8")
    questions = Questions.of(benchmark, open_benchmark(benchmark, data), prompts="prompts", batch_size=1, **settings)
    rows = [{"index": row["index"], "prompt": "", "answer": predictions[row["index"]]} for row in questions.rows]
    lines = [{"header": questions.header() | HEADER}, *rows]
    (output / name).mkdir(parents=True)
    (output / name / "answers-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / "results.md").write_text("# the run\n")
    return questions
