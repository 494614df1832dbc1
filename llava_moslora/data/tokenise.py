"""The work of :mod:`llava_moslora.data.prepare`: a data file part by part, checked and tokenised by several processes.

A part is a few thousand records of a file, or one shard of a sharded source. ``NUMBER.arrow`` holds its rows and
``NUMBER.json``, written last, what was counted and the rows' checksum, so a part whose two files are whole is done.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from datasets import Features, List, Value
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from llava_moslora.data.cache import describe_file, read_json, using, write_json
from llava_moslora.data.images import check_bytes, check_image, load_bytes, load_image
from llava_moslora.data.records import Record, check_record, open_stream
from llava_moslora.data.sources.json import JsonStream
from llava_moslora.data.sources.parquet import ParquetStream
from llava_moslora.data.sources.shards import CheckedImage, find_shards, is_sharded, read_shard
from llava_moslora.errors import Refusal, printable
from llava_moslora.files.disk import replace_file
from llava_moslora.text.conversation import IGNORE_INDEX, encode
from llava_moslora.text.tokenizer import IMAGE_TOKEN

PART = 2048  # records per part: what is lost by an interruption, and what a worker holds in memory
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "images": List(Value("string")),  # file names, or in a shard places (shards.ImageRef)
        "shard": Value("string"),  # "" where the images are files
        "record": Value("int64"),
        "id": Value("string"),
        "length": Value("int32"),
        "trained": Value("int32"),
        "has_image": Value("bool"),
    }
)


@dataclass(frozen=True)
class Job:
    """What a worker needs besides the records."""

    file: str
    image_folder: Path | None
    tokenizer: PreTrainedTokenizerFast
    template: str
    tokens_per_image: int
    max_length: int
    follow_links: bool
    decode_images: bool


@dataclass(frozen=True)
class Task:
    number: int
    path: Path  # without its suffix
    records: list[tuple[int, object, str | None]] = ()  # index, raw record, JSON problem
    shard: str = ""  # or else where they are read from
    result: dict | None = None  # of a part that is done


def build_parts(job: Job, staging: Path, num_proc: int) -> Iterator[dict]:
    """Build the parts that are missing in ``staging``; yields what :func:`_work` returned for each, in order.

    Raises:
        Refusal: D-PARSE and the like, of the file as a whole; E-DISK; E-WORKER, a process was killed.
    """
    name = printable(Path(job.file).name)
    if is_sharded(job.file):
        shards = find_shards(job.file)
        paths = ((staging / f"{number:06d}", shard) for number, shard in enumerate(shards))
        tasks = (Task(k, path, shard=shard, result=_result(path)) for k, (path, shard) in enumerate(paths))
        with tqdm(total=len(shards), unit="shard", desc=f"preparing {name}") as bar:
            for result in _map_in_order(tasks, job, num_proc):
                bar.update()
                yield result
        return
    stream = open_stream(job.file)
    with tqdm(total=os.path.getsize(job.file), unit="B", unit_scale=True, desc=f"preparing {name}") as bar:
        for result in _map_in_order(_tasks(stream, staging), job, num_proc):
            bar.update(stream.bytes_read - bar.n)
            yield result


def _map_in_order(tasks: Iterator[Task], job: Job, num_proc: int) -> Iterator[dict]:
    if num_proc == 1:
        _start_worker(job)
        yield from map(_work, tasks)
        return
    try:
        with ProcessPoolExecutor(num_proc, get_context("fork"), _start_worker, (job,)) as pool:
            waiting: deque[Future] = deque()
            for task in tasks:
                waiting.append(pool.submit(_work, task))
                if len(waiting) >= 2 * num_proc:  # a window, or the whole file would be read ahead of the workers
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise Refusal(
            "E-WORKER", "a process that tokenises was killed", file=job.file, key="--preprocessing_num_workers",
            found=num_proc, fix="most often memory ran out: fewer processes; the parts that are done are kept",
        ) from None  # fmt: skip


def _tasks(stream: JsonStream | ParquetStream, staging: Path) -> Iterator[Task]:
    numbered = ((index, raw, problem) for index, (raw, problem) in enumerate(stream))
    for number in count():
        records = list(islice(numbered, PART))
        if not records:
            return
        path = staging / f"{number:06d}"
        result = _result(path)
        yield Task(number, path, records if result is None else [], result=result)


def _result(path: Path) -> dict | None:
    """What :func:`_work` returned for a part, if the part is done and its files are whole."""
    if (result := read_json(path.with_suffix(".json"))) is None or not path.with_suffix(".arrow").is_file():
        return None
    return result if describe_file(path.with_suffix(".arrow")) == result["file"] else None


def _start_worker(job: Job) -> None:
    global _job, _controls
    _job = job
    names = {token.content for token in job.tokenizer.added_tokens_decoder.values() if token.special} - {IMAGE_TOKEN}
    _controls = re.compile("|".join(map(re.escape, sorted(names))) or "(?!)")


def _work(task: Task) -> dict:
    """Check and encode one part, if it is not done."""
    if task.result is not None:
        return task.result
    counts: Counter = Counter(records=0)
    problems: list[dict] = []
    columns: dict[str, list] = {name: [] for name in FEATURES}
    for index, raw, problem, images in _records(task):
        counts["records"] += 1
        record = None
        try:
            record = check_record(raw, index, task.shard or _job.file, problem)
            counts["control_names_as_text"] += any(_controls.search(turn.text) for turn in record.turns)
            row = _encode(record, _check_images(record, images, task.shard), task.shard, counts)
        except Refusal as refusal:
            problem = {"part": task.number, **as_problem(refusal)}
            if record is not None and refusal.code.startswith("I-") and not task.shard:  # shards do not change
                problem["images"] = record.images
            problems.append(problem)
        else:
            for name, value in (row or {}).items():
                columns[name].append(value)
    counts.update(
        kept=len(columns["length"]),
        with_images=sum(columns["has_image"]),
        tokens=sum(columns["length"]),
    )
    table = pa.Table.from_pydict(columns, schema=FEATURES.arrow_schema)
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    arrow = task.path.with_suffix(".arrow")
    with using(arrow.parent):
        replace_file(arrow, memoryview(buffer.getvalue()))
        result = {"name": task.path.name, "shard": task.shard, "counts": dict(counts), "problems": problems}
        result["file"] = describe_file(arrow)
        write_json(task.path.with_suffix(".json"), result)
    return result


def _records(task: Task) -> Iterator[tuple[int, object, str | None, dict[str, CheckedImage]]]:
    if not task.shard:
        yield from ((index, raw, problem, {}) for index, raw, problem in task.records)
        return
    look = load_bytes if _job.decode_images else check_bytes
    for index, (raw, problem, images) in enumerate(read_shard(task.shard, look)):
        yield index, raw, problem, images


def _check_images(record: Record, images: dict[str, CheckedImage], shard: str) -> list[str]:
    """How the row names the record's images, each of which was looked at."""
    where = {"record": record.index, "record_id": record.id or None}
    if shard:
        return [str(_find(name, images, shard, where).place) for name in record.images]
    check_image_files(record.images, _job, **where)
    return list(record.images)


def check_image_files(names: Sequence[str], job: Job, *, record: int, record_id: str | None) -> None:
    """Check a record's image files; decode them if the job asks for it.

    Raises:
        Refusal: I-..., the first that cannot be used.
    """
    where = {"record": record, "record_id": record_id}
    if names and job.image_folder is None:
        raise Refusal(
            "I-FOLDER",
            "the record has an image but no image folder was given",
            file=job.file,
            fix="give --image_folder",
            **where,
        )
    look = load_image if job.decode_images else check_image
    for name in names:
        look(name, job.image_folder, follow_links=job.follow_links, **where)


def _find(name: str, images: dict[str, CheckedImage], shard: str, where: dict) -> CheckedImage:
    if (held := images.get(name)) is None:
        raise Refusal(
            "I-MISSING", "the shard holds no such image", file=shard, key="image", found=name,
            expected="the name of a member beside the record", **where,
        )  # fmt: skip
    if held.refusal is not None:
        raise Refusal(**{**vars(held.refusal), **where})
    return held


def _encode(record: Record, images: list[str], shard: str, counts: Counter) -> dict | None:
    """The record's row, shortened to ``max_length``; ``None`` if not even its first question fits."""
    limit = _job.max_length
    encoded = encode(
        record.turns,
        tokenizer=_job.tokenizer,
        template=_job.template,
        image_tokens=[_job.tokens_per_image] * len(images),
    )
    ids, labels = encoded.input_ids, encoded.labels
    if len(ids) > limit:
        fitting = [end for end in encoded.ends if end <= limit]
        cut = fitting[-1] if fitting else limit
        ids, labels = ids[:cut], labels[:cut]
        if labels.count(IGNORE_INDEX) == len(labels):
            counts["left_out"] += 1
            return None
        rounds = max(len(fitting), 1)
        counts["turns_dropped" if fitting else "answers_cut"] += 1
        human = [turn.text for turn in record.turns if turn.role == "human"][:rounds]
        images = images[: sum(text.count(IMAGE_TOKEN) for text in human)]
    return {
        "input_ids": ids,
        "labels": labels,
        "images": images,
        "shard": shard,
        "record": record.index,
        "id": record.id,
        "length": len(ids),
        "trained": len(labels) - labels.count(IGNORE_INDEX),
        "has_image": bool(images),
    }


def as_problem(refusal: Refusal) -> dict:
    """A refusal as it is kept in a report: its line, and its parts as JSON."""
    parts = {name: value for name, value in vars(refusal).items() if value is not None}
    parts = {name: value if isinstance(value, int) else str(value) for name, value in parts.items()}
    return {"line": refusal.line(), "refusal": parts}
