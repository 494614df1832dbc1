"""Runs a model on the rows of a benchmark, on one rank or several; after a kill only unanswered rows are run.

Batches depend only on the rows (sorted by prompt length, then split), so that an answer does not depend on where an
earlier evaluation was stopped: padding changes 16-bit logits. Each rank appends the answers of a batch to its own JSONL
file, below a header that identifies questions and model::

    {"header": {"benchmark": "seed", "model": "…", "dtype": "torch.bfloat16", …}}
    {"index": "7", "prompt": "What is …", "answer": "B"}

Answers are greedy and go through :func:`llava_moslora.inference.generate.answer`. As in the class of VLMEvalKit that
the MoSLoRA paper used, only the first image of a row is shown.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_moslora._version import __version__
from llava_moslora.distributed import from_rank_0, rank, world_size
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import Benchmark
from llava_moslora.evaluation.kept import Header, append, drop_unfinished, read_lines
from llava_moslora.evaluation.prompts import prompt
from llava_moslora.evaluation.rows import Row
from llava_moslora.evaluation.scoring import unit_of
from llava_moslora.evaluation.tsv import Table
from llava_moslora.files.disk import read_json
from llava_moslora.files.manifest import MANIFEST, sha256
from llava_moslora.inference.generate import Question, answer
from llava_moslora.inference.load import ChatModel
from llava_moslora.runs.fingerprint import fingerprint
from llava_moslora.runs.record import EXPORT
from llava_moslora.text.conversation import Turn


@dataclass(frozen=True)
class Questions:
    """The rows of a benchmark to run.

    Attributes:
        numbers: of the rows in ``table``, all of them or a sample of size ``limit``.
        prompts: name of the set of prompts, a key of :data:`llava_moslora.evaluation.prompts.PROMPTS`.
        batch_size: rows per batch.
        limit: maximum number of units (questions, circular groups, images of MME); None: all.
    """

    benchmark: Benchmark
    table: Table
    numbers: tuple[int, ...]
    prompts: str
    batch_size: int
    limit: int | None

    @classmethod
    def of(
        cls, benchmark: Benchmark, table: Table, *, prompts: str, batch_size: int, limit: int | None = None
    ) -> Questions:
        """All rows of ``limit`` units, a random sample with a fixed seed."""
        kept = set(sample(table.rows, benchmark.kind)[:limit])
        numbers = tuple(number for number, row in enumerate(table.rows) if unit_of(row, benchmark.kind) in kept)
        return cls(benchmark, table, numbers, prompts, batch_size, limit)

    @property
    def rows(self) -> list[Row]:
        return [self.table.rows[number] for number in self.numbers]

    def prompt(self, number: int) -> str:
        return prompt(self.table.rows[number], self.benchmark.kind, self.prompts)

    def header(self) -> Header:
        """What the answers depend on besides the model."""
        return {
            "benchmark": self.benchmark.name,
            "data": self.table.md5,
            "prompts": self.prompts,
            "max_new_tokens": self.benchmark.max_new_tokens,
            "batch_size": self.batch_size,
            "limit": self.limit,
            "llava_moslora": __version__,
        }

    def batches(self, tokenizer) -> list[list[int]]:
        """Numbers of the rows of every batch: longest prompt first, rows of equal length in the file's order."""
        lengths = tokenizer([self.prompt(number) for number in self.numbers], add_special_tokens=False)["input_ids"]
        by_length = {number: -len(ids) for number, ids in zip(self.numbers, lengths, strict=True)}
        ordered = sorted(self.numbers, key=by_length.__getitem__)
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]

    def image_and_prompt(self, number: int) -> Question:
        text = self.prompt(number)
        return self.table.images(number)[:1], [Turn("human", f"<image>\n{text}")]


def sample(rows: Sequence[Row], kind: str) -> list[str]:
    """All units in a random order that their names alone decide; of MME one of every subtask in turn."""
    subtasks: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        subtasks[row["category"] if kind == "yes-no" else ""].add(unit_of(row, kind))
    order: list[tuple[int, str, str]] = []
    for units in subtasks.values():
        hashed = sorted((hashlib.sha256(unit.encode()).hexdigest(), unit) for unit in units)
        order += [(turn, digest, unit) for turn, (digest, unit) in enumerate(hashed)]
    return [unit for _, _, unit in sorted(order)]


def source_header(folder: str | Path, checkpoint: Path | None) -> Header:
    """Identity of the model: a digest of its files and the name of its checkpoint.

    Args:
        folder: of a run or an export.
        checkpoint: of the run; None for an export.
    """
    if checkpoint is None:
        files = json.dumps(fingerprint(folder), sort_keys=True)
        header: Header = {"model": hashlib.sha256(files.encode()).hexdigest(), "checkpoint": None}
        if (exported := Path(folder) / EXPORT).is_file():
            header["export_of"] = read_json(exported).get("checkpoint_sha256")  # of that checkpoint's manifest
        return header
    return {"model": sha256(checkpoint / MANIFEST), "checkpoint": checkpoint.name}  # it has the hashes of all files


def model_header(chat_model: ChatModel) -> Header:
    """Header fields that are known only for a loaded model."""
    return {"template": chat_model.template, "dtype": str(chat_model.model.dtype)}


def read_answers(folder: Path, header: Header) -> tuple[Header, dict[str, str]]:
    """The header and the answers (index → text) that the ranks wrote; an unfinished last line does not count.

    Args:
        header: must agree with the files'; fields that it lacks are not compared.

    Raises:
        Refusal: C-ANSWERS, they are of another model or other questions, or a line is damaged.
    """
    stored: Header = header
    answers: dict[str, str] = {}
    for file in sorted(folder.glob("answers-*.jsonl")):
        found, rows = read_lines(file, ("index", "answer"))
        if found is not None:
            _check_header(file, found, header)
            stored = found
        answers |= {row["index"]: row["answer"] for row in rows}
    return stored, answers


def _check_header(file: Path, stored: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    for name, value in header.items():
        if stored.get(name) != value:
            raise Refusal(
                "C-ANSWERS", "answers of another evaluation", file=file, key=name, found=str(stored.get(name)),
                expected=str(value), fix="choose another --output, or delete the answers",
            )  # fmt: skip


def ask(chat_model: ChatModel, questions: Questions, header: Header, folder: Path) -> None:
    """Run the unfinished batches and append their answers below ``folder``. Collective; returns when this rank is done.

    Args:
        header: of the source; those of the questions and of the loaded model are added here.

    Raises:
        Refusal: C-ANSWERS, as :func:`read_answers`; what reading an image refuses.
    """
    header = questions.header() | header | model_header(chat_model)
    answered = _answered(folder, header)
    rows = questions.table.rows
    open_ = [
        batch
        for batch in questions.batches(chat_model.tokenizer)
        if any(rows[number]["index"] not in answered for number in batch)
    ]
    own = open_[rank() :: world_size()]
    if not own:
        return
    with (
        open(folder / f"answers-{rank()}.jsonl", "a", encoding="utf-8") as file,
        _progress(questions.benchmark.title, sum(map(len, own))) as bar,
    ):
        if file.tell() == 0:
            append(file, [{"header": header}])
        for batch, asked in zip(own, _prepared(questions, own), strict=True):
            texts = answer(
                chat_model, asked, max_new_tokens=questions.benchmark.max_new_tokens, batch_size=questions.batch_size
            )
            lines = [
                {"index": rows[number]["index"], "prompt": questions.prompt(number), "answer": text}
                for number, text in zip(batch, texts, strict=True)
            ]
            append(file, [line for line in lines if line["index"] not in answered])
            bar.update(len(batch))


def _answered(folder: Path, header: Header) -> set[str]:
    """Indices that are already answered, the same on every rank: rank 0 reads before any rank writes."""
    result: set[str] | Refusal = set()
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = set(read_answers(folder, header)[1])
            for file in folder.glob("answers-*.jsonl"):
                drop_unfinished(file)
        except Refusal as refusal:
            result = refusal
    result = from_rank_0(result)
    if isinstance(result, Refusal):
        raise result
    return result


def _prepared(questions: Questions, batches: Sequence[Sequence[int]]) -> Iterator[list[Question]]:
    """The questions of every batch; while one is answered the images of the next are decoded."""

    def prepare(batch: Sequence[int]) -> list[Question]:
        return [questions.image_and_prompt(number) for number in batch]

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in chain(batches, [None]):
            ready, waiting = waiting, batch and pool.submit(prepare, batch)
            if ready:
                yield ready.result()


def _progress(title: str, total: int) -> tqdm:
    """A progress bar with rate and remaining time, on rank 0; with several ranks it shows rank 0's share."""
    share = f" (rank 0 of {world_size()})" if world_size() > 1 else ""
    return tqdm(total=total, desc=title + share, unit="question", dynamic_ncols=True, disable=rank() != 0)
