"""The eight commonsense sets of the paper's Table 4, from LLM-Adapters' files and with its protocol.

lm-evaluation-harness runs and scores them, with the tasks in ``commonsense_tasks/``: one template and a file for each
set, which ``lm_eval --include_path`` takes as well. It is imported only where it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.commonsense_sets import PAPER, SETS
from llava_moslora.evaluation.compare import wilson
from llava_moslora.evaluation.kept import Header
from llava_moslora.files.disk import read_json
from llava_moslora.files.json import parse_json
from llava_moslora.inference.load import ChatModel

TASKS = Path(__file__).parent / "commonsense_tasks"
MEAN = "mean"
NOTHING_READ = "[invalid]"  # the harness's name for it


@dataclass(frozen=True)
class SetScore:
    """One set: ``right`` of ``asked`` answers; ``unread`` of them contain no option and count as wrong."""

    right: int
    unread: int
    asked: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.right / self.asked


def task_config(name: str, file: str | Path) -> dict[str, Any]:
    """The harness's task for the set ``name`` over a local ``file``."""
    template = yaml.safe_load((TASKS / "_llm_adapters.yaml").read_text(encoding="utf-8"))
    own = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    del own["include"]
    return template | own | {"dataset_kwargs": {"data_files": {"test": str(file)}}}


def find_files(data: str | Path, names: Sequence[str]) -> dict[str, Path]:
    """Set → its checked file, ``FOLDER/test.json`` below ``data``.

    Raises:
        Refusal: D-FILE, it is not there; D-PARSE, D-SCHEMA, not an array of records with an instruction and an answer.
    """
    files = {name: Path(data) / SETS[name][0] / "test.json" for name in names}
    for file in files.values():
        if not file.is_file():
            raise Refusal(
                "D-FILE", "no such file", file=file, key="--data",
                fix="give LLM-Adapters' folder dataset/; nothing is downloaded",
            )  # fmt: skip
        for index, row in enumerate(_read_array(file)):
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "answer")):
                what = "must be an object with the texts 'instruction' and 'answer'"
                raise Refusal("D-SCHEMA", what, file=file, record=index)
    return files


def _read_array(file: Path) -> list:
    try:
        rows = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise Refusal("D-PARSE", "not JSON", file=file, found=error) from error
    if not isinstance(rows, list) or not rows:
        raise Refusal("D-PARSE", "not an array of records", file=file, found=type(rows).__name__)
    return rows


def harness() -> None:
    """
    Raises:
        Refusal: E-MISSING, lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        what, fix = "needs lm_eval, which is not installed", "pip install 'llava_moslora[commonsense]'"
        raise Refusal("E-MISSING", what, fix=fix)


def language_model(chat_model: ChatModel, batch_size: int) -> Any:
    """The loaded model as the harness takes it."""
    from lm_eval.models.huggingface import HFLM

    stop = chat_model.stop_token_ids

    class Beams(HFLM):
        def _model_generate(self, context, max_length, **how):
            """Stops at the end-of-text tokens, as LLM-Adapters does. The harness also searches for that token's name in
            the first rows of a batch; with beams they all belong to the first prompt, and end other answers early."""
            how |= {"eos_token_id": stop, "pad_token_id": self.tokenizer.pad_token_id}
            del how["stop"], how["temperature"]  # which beams ignore
            return self.model.generate(input_ids=context, max_length=max_length, **how)

    return Beams(pretrained=chat_model.model, tokenizer=chat_model.tokenizer, backend="causal", batch_size=batch_size)


def run_task(model: Any, task: str | dict[str, Any], name: str, limit: int | None) -> list[dict[str, Any]]:
    """The harness's record for every document of a task, in order.

    Args:
        task: its configuration, or the YAML file of it. name: in the configuration.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_defaults=False)  # else all definitions of the harness are read, thousands of files
    found = simple_evaluate(model, tasks=[task], task_manager=own, limit=limit, bootstrap_iters=0, log_samples=True)
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def ask(model: Any, name: str, file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Run the set ``name``: per record its ``index``, the ``prompt``, the model's output ``said``, the option ``read``
    in it ("" for none), the correct ``answer``.

    Args:
        model: of :func:`language_model`.
        limit: only this many records, from the first.
    """
    task = task_config(name, file)
    samples = run_task(model, task, task["task"], limit)
    return [
        {
            "index": int(sample["doc_id"]),
            "prompt": sample["arguments"][0][0],
            "said": sample["resps"][0][0],
            "read": sample["filtered_resps"][0].replace(NOTHING_READ, ""),
            "answer": sample["target"],
        }
        for sample in samples
    ]


def read_kept(
    output: Path, headers: Mapping[str, Header], prefix: str = "", check: Callable[[Any], Any] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Set → what :func:`ask` returned, of the sets that ``output`` has answers of.

    Args:
        headers: set → expected header of its answers; missing fields are not compared.
        prefix: of the files' names.
        check: scores answers, or fails on invalid ones; default: :func:`score`.

    Raises:
        Refusal: C-ANSWERS, of another model, other data or other flags; K-JSON, damaged.
    """
    kept = {}
    for name, header in headers.items():
        file = output / f"{prefix}{name}.json"
        if not file.is_file():
            continue
        stored = read_json(file)
        try:
            found, samples = dict(stored["header"]), stored["samples"]
            (check or score)(samples)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            fix = "delete the file: its questions are run again"
            raise Refusal("K-JSON", "not the answers to a set", file=file, found=repr(error), fix=fix) from error
        for key, value in header.items():
            if found.get(key) != value:
                raise Refusal(
                    "C-ANSWERS", "answers of another model, other data or other flags", file=file, key=key,
                    found=str(found.get(key)), expected=str(value), fix="choose another --output",
                )  # fmt: skip
        kept[name] = samples
    return kept


def score(samples: Sequence[Mapping[str, Any]]) -> SetScore:
    """Score of what :func:`ask` returned: exact matches are right."""
    right = sum(sample["read"] == sample["answer"] for sample in samples)
    return SetScore(right, sum(not sample["read"] for sample in samples), len(samples))


def table(scores: Mapping[str, SetScore], paper: str) -> str:
    """Table 4's row of ``scores`` beside the paper's ``paper``, in percent; the mean only where all eight are there."""
    row = dict(zip((*SETS, MEAN), PAPER[paper], strict=True))
    lines = [f"{'':<9}{'accuracy':>9}{'95 %':>15}{'unread':>8}{'asked':>8}{'paper':>8}"]
    for name, result in scores.items():
        low, high = wilson(result.right, result.asked)
        interval, unread = f"{low:.1f} to {high:.1f}", f"{100 * result.unread / result.asked:.1f} %"
        numbers = f"{result.accuracy:>9.1f}{interval:>15}{unread:>8}{result.asked:>8}{row[name]:>8}"
        lines.append(f"{SETS[name][1]:<9}{numbers}")
    if scores.keys() == SETS.keys():
        mean = sum(result.accuracy for result in scores.values()) / len(SETS)
        lines.append(f"{MEAN:<9}{mean:>9.1f}{'':>31}{row[MEAN]:>8}")
    lines.append(f"paper: {paper}, one run of LLaMA-3-8B-Instruct (Table 4)")
    return "\n".join(lines)


def as_json(scores: Mapping[str, SetScore]) -> dict[str, dict[str, float]]:
    return {name: asdict(result) | {"accuracy": result.accuracy} for name, result in scores.items()}
