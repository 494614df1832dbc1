"""The eight commonsense sets as lm-evaluation-harness itself asks them: the option that the model finds most likely.

The harness's own tasks, from its installed files, over local files: only where the data comes from is replaced.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.commonsense import run_task
from llava_moslora.evaluation.commonsense_sets import SETS
from llava_moslora.evaluation.compare import wilson
from llava_moslora.files.json import parse_json

PREFIX = "likelihood_"  # of the names of files of answers
Fields = Mapping[str, type | tuple[type, ...]]  # field of a record → its type


@dataclass(frozen=True)
class StockTask:
    """A task of the harness.

    Attributes:
        name: in the harness; the local file is ``NAME.jsonl``.
        file: of its definition, below the harness's ``tasks/``.
        split: that the harness asks. fields: of a record that the task reads, with their types.
    """

    name: str
    file: str
    split: str
    fields: Fields


_QUESTION: Fields = {"question": str, "choices": dict, "answerKey": str}
_STEM: Fields = {"question_stem": str, "choices": dict, "answerKey": str}
_SENTENCE: Fields = {"sentence": str, "option1": str, "option2": str, "answer": str}
_SOCIAL: Fields = {
    "context": str, "question": str, "answerA": str, "answerB": str, "answerC": str, "label": (str, int),
}  # fmt: skip
_ENDINGS: Fields = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)}
STOCK = {
    "arc_easy": StockTask("arc_easy", "arc/arc_easy.yaml", "test", _QUESTION),
    "openbookqa": StockTask("openbookqa", "openbookqa/openbookqa.yaml", "test", _STEM),
    "social_i_qa": StockTask("social_iqa", "siqa/siqa.yaml", "validation", _SOCIAL),
    "arc_challenge": StockTask("arc_challenge", "arc/arc_challenge.yaml", "test", _QUESTION),
    "winogrande": StockTask("winogrande", "winogrande/default.yaml", "validation", _SENTENCE),
    "piqa": StockTask("piqa", "piqa/piqa.yaml", "validation", {"goal": str, "sol1": str, "sol2": str, "label": int}),
    "boolq": StockTask(
        "boolq", "super_glue/boolq/default.yaml", "validation", {"passage": str, "question": str, "label": int}
    ),
    "hellaswag": StockTask("hellaswag", "hellaswag/hellaswag.yaml", "validation", _ENDINGS),
}


@dataclass(frozen=True)
class LikelihoodScore:
    """One set: of ``asked`` records, in how many the right option is the likeliest (``acc``), and the likeliest per
    character (``acc_norm``; None where the harness's task does not count it)."""

    acc: int
    acc_norm: int | None
    asked: int


def find_stock_files(data: str | Path, names: Sequence[str]) -> dict[str, Path]:
    """Set → its checked file ``data/TASK.jsonl``: a record per line, with the fields of the data set on the Hub.

    Raises:
        Refusal: D-FILE, it is not there; D-PARSE, D-SCHEMA, not records with the fields of that data set.
    """
    files = {name: Path(data) / f"{STOCK[name].name}.jsonl" for name in names}
    for name, file in files.items():
        if not file.is_file():
            raise Refusal(
                "D-FILE", "no such file", file=file, key="--data",
                fix=f"store the {STOCK[name].split} split there, a record per line; nothing is downloaded",
            )  # fmt: skip
        count = 0
        for index, row in _rows(file):
            count += 1
            for key, kind in STOCK[name].fields.items():
                if not isinstance(row.get(key), kind) or row[key] == "":
                    kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    raise Refusal(
                        "D-SCHEMA", f"not a record of {STOCK[name].name}", file=file, record=index, key=key,
                        found=row.get(key), expected=kinds,
                    )  # fmt: skip
        if not count:
            raise Refusal("D-PARSE", "no records", file=file)
    return files


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, line in enumerate(file.read_bytes().splitlines()):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise Refusal("D-PARSE", "not JSON", file=file, record=index, found=error) from error
        if not isinstance(row, dict):
            raise Refusal("D-PARSE", "not an object", file=file, record=index, found=type(row).__name__)
        yield index, row


def ask_likelihood(model: Any, name: str, file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Run the set ``name``: per record its ``index``, the ``asked`` pairs of context and continuation, the
    log-``likelihood`` of each continuation, the ``answer``'s number, and whether it was right by ``acc`` and, where the
    task has it, ``acc_norm``.

    Args:
        model: of :func:`llava_moslora.evaluation.commonsense.language_model`.
        limit: only this many records, from the first.
    """
    task = STOCK[name]
    config = {
        "include": str(package_files("lm_eval") / "tasks" / task.file),
        "task": task.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: str(file.resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{task.split}_split": task.split,
        "num_fewshot": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / f"{task.name}.yaml"
        written.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        samples = run_task(model, str(written), task.name, limit)
    return [
        {
            "index": int(sample["doc_id"]),
            "asked": [list(arguments[:2]) for arguments in sample["arguments"]],
            "likelihood": [float(answer[0]) for answer in sample["filtered_resps"]],
            "answer": sample["target"],
            "acc": int(sample["acc"]),
        }
        | ({"acc_norm": int(sample["acc_norm"])} if "acc_norm" in sample else {})
        for sample in samples
    ]


def score_likelihood(samples: Sequence[Mapping[str, Any]]) -> LikelihoodScore:
    """Of what :func:`ask_likelihood` returned."""
    if not samples:
        raise ValueError("no answers")
    normed = sum(sample["acc_norm"] for sample in samples) if "acc_norm" in samples[0] else None
    return LikelihoodScore(sum(sample["acc"] for sample in samples), normed, len(samples))


def likelihood_table(scores: Mapping[str, LikelihoodScore]) -> str:
    """A row per set, in percent; the mean of ``acc`` only where all eight are there."""
    lines = [f"{'':<9}{'acc':>9}{'95 %':>15}{'acc_norm':>10}{'95 %':>15}{'asked':>8}"]
    for name, result in scores.items():
        cells = f"{_cell(result.acc, result.asked, 9)}{_cell(result.acc_norm, result.asked, 10)}"
        lines.append(f"{SETS[name][1]:<9}{cells}{result.asked:>8}")
    if scores.keys() == SETS.keys():
        mean = sum(100 * result.acc / result.asked for result in scores.values()) / len(SETS)
        lines.append(f"{'mean':<9}{mean:>9.1f}")
    lines.append("the harness's own tasks, no examples in the prompt; not the protocol of the paper's Table 4")
    return "\n".join(lines)


def _cell(right: int | None, asked: int, width: int) -> str:
    if right is None:
        return f"{'-':>{width}}{'':>15}"
    low, high = wilson(right, asked)
    return f"{100 * right / asked:>{width}.1f}{f'{low:.1f} to {high:.1f}':>15}"


def likelihood_json(scores: Mapping[str, LikelihoodScore]) -> dict[str, dict[str, float]]:
    """Per set, in percent, and how many were asked."""
    found = {}
    for name, result in scores.items():
        found[name] = {"asked": result.asked, "acc": 100 * result.acc / result.asked}
        if result.acc_norm is not None:
            found[name]["acc_norm"] = 100 * result.acc_norm / result.asked
    return found
