"""A data file to a tokenised Arrow data set in a cache, every record and every picture's header checked on the way.

The cache is a folder named by everything that decides its content: the data file's bytes, the tokenizer, the template,
the tokens per picture, the length limit and ``CODE_VERSION``. It is built part by part in a staging folder under a file
lock and published by one rename, so several ranks may call :func:`prepare` at once without talking to each other, and a
build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from llava_moslora.data.conversation import (
    IGNORE_INDEX,
    Turn,
    chat_template,
    encode,
    encode_prompt,
)
from llava_moslora.data.images import check_image
from llava_moslora.data.json_stream import JsonStream
from llava_moslora.data.parquet_stream import ParquetStream
from llava_moslora.data.records import Record, check_record, open_stream
from llava_moslora.data.tokenizer import IMAGE_TOKEN
from llava_moslora.errors import Refusal, printable

CODE_VERSION = 2  # raise it whenever ids, labels or columns of the same data would change
PART = 2048  # records per part: what is lost by an interruption, and what a worker holds in memory
SHOWN = 20  # problems that are logged; all of them are in the report
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "images": List(Value("string")),
        "record": Value("int64"),
        "id": Value("string"),
        "length": Value("int32"),
        "trained": Value("int32"),
        "has_image": Value("bool"),
    }
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """What a worker needs besides the records."""

    file: Path
    image_folder: Path | None
    tokenizer: PreTrainedTokenizerFast
    template: str
    tokens_per_image: int
    max_length: int
    follow_links: bool


def prepare(
    data_path: str | Path,
    image_folder: str | Path | None,
    *,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    tokens_per_image: int,
    max_length: int,
    cache_dir: str | Path,
    num_proc: int = 1,
    on_bad_record: str = "fail",
    max_bad_share: float = 0.01,
    follow_image_links: bool = False,
) -> Dataset:
    """The tokenised data set, from the cache or built now.

    Columns: ``input_ids`` and ``labels`` int32[length] with pictures expanded, ``images`` file names, ``record`` index
    in the data file, ``id``, ``length``, ``trained`` (tokens with a label), ``has_image``.

    A record longer than ``max_length`` loses whole trailing rounds; if already the first round is longer, its answer is
    cut at the end; if not even its question fits, the record is left out. All three are counted in the log and in
    :func:`report_of`. Records are never reordered.

    Args:
        image_folder: where picture names start; ``None`` for text-only data.
        tokens_per_image: placeholders per picture.
        num_proc: worker processes.
        on_bad_record: ``fail`` refuses the file if any record is bad, after looking at all of them; ``quarantine``
            leaves bad records out and lists them in the report, up to a share of ``max_bad_share``.
        follow_image_links: see :func:`~llava_moslora.data.images.load_image`.

    Raises:
        Refusal: D-..., I-... (the first problem, with the number of the others), C-TEMPLATE (template and tokenizer
            do not fit), D-NONE (nothing to train on).
    """
    if on_bad_record not in ("fail", "quarantine"):
        raise Refusal(
            "C-FLAG", "unknown policy", key="--on_bad_record", found=on_bad_record, expected="fail | quarantine"
        )
    data_path, cache_dir = Path(data_path), Path(cache_dir)
    if not data_path.is_file():
        raise Refusal("D-FILE", "there is no such file", file=data_path, fix="check --data_path")
    folder = None if image_folder is None else Path(image_folder)
    if folder is not None and not folder.is_dir():
        raise Refusal("I-FOLDER", "there is no such folder", file=folder, fix="check --image_folder")
    job = _Job(data_path, folder, tokenizer, template, tokens_per_image, max_length, follow_image_links)
    target = cache_dir / _key(job)
    cache_dir.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        with FileLock(f"{target}.lock"):
            if not target.is_dir():  # another rank may have built it while this one waited
                _build(job, target, num_proc, on_bad_record, max_bad_share)
    dataset = _rows(target)
    report = report_of(dataset)
    _judge(report["problems"], report["records"], on_bad_record, max_bad_share)
    if folder is not None and str(folder.resolve()) != report["image_folder"]:
        log.warning(
            "the pictures were checked in %s when this cache was built, not in %s", report["image_folder"], folder
        )
    return dataset


def _rows(folder: Path) -> Dataset:
    return concatenate_datasets([Dataset.from_file(str(part)) for part in sorted(folder.glob("*.arrow"))])


def report_of(dataset: Dataset) -> dict:
    """What was counted while ``dataset`` was prepared: records, left_out, turns_dropped, answers_cut, problems, ..."""
    return json.loads((Path(dataset.cache_files[0]["filename"]).parent / "report.json").read_bytes())


def check_template(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """Prove that template and tokenizer fit: our prompt is the stock tokenizer's reading of the exported chat template.

    Raises:
        Refusal: C-TEMPLATE
    """
    turns = [Turn("human", f"{IMAGE_TOKEN}\nWhat is this?"), Turn("gpt", "A cat."), Turn("human", "Sure?")]
    if template == "plain":
        turns = turns[:1]
    ours = encode_prompt(turns, tokenizer=tokenizer, template=template, image_tokens=[1]).input_ids
    roles = {"human": "user", "gpt": "assistant"}
    text = tokenizer.apply_chat_template(
        [{"role": roles[turn.role], "content": turn.text} for turn in turns],
        chat_template=chat_template(template, tokenizer),
        add_generation_prompt=True,
        tokenize=False,
    )
    stock = tokenizer(text, add_special_tokens=False).input_ids
    if ours != stock:
        at = next((k for k, (a, b) in enumerate(zip(ours, stock, strict=False)) if a != b), min(len(ours), len(stock)))
        raise Refusal(
            "C-TEMPLATE",
            f"the tokenizer reads the {template} prompt in another way at token {at}",
            found=tokenizer.decode(stock[at : at + 5]),
            expected=tokenizer.decode(ours[at : at + 5]),
        )


def _key(job: _Job) -> str:
    digest = hashlib.sha256()
    with job.file.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    digest.update(job.tokenizer.backend_tokenizer.to_str().encode())
    rest = [job.tokenizer.special_tokens_map, job.template, job.tokens_per_image, job.max_length]
    digest.update(json.dumps([*rest, CODE_VERSION], default=str, sort_keys=True).encode())
    return f"{job.file.stem[:40]}-{digest.hexdigest()[:20]}"


def _build(job: _Job, target: Path, num_proc: int, on_bad_record: str, max_bad_share: float) -> None:
    check_template(job.tokenizer, job.template)
    checked_in = hashlib.sha256(str(job.image_folder and job.image_folder.resolve()).encode()).hexdigest()[:8]
    staging = target.with_name(f"{target.name}.{checked_in}.staging")  # parts checked elsewhere are not taken over
    staging.mkdir(exist_ok=True)
    counts: Counter = Counter(records=0, kept=0)
    problems: list[dict] = []
    for part in _run(job, staging, num_proc):
        counts.update(part["counts"])
        problems += part["problems"]
    if counts["kept"]:
        ids = Counter(_rows(staging)["id"][:])
        counts["duplicate_ids"] = sum(times - 1 for name, times in ids.items() if name)
    if counts["duplicate_ids"]:
        log.warning("%s: %d records have the id of an earlier one", job.file, counts["duplicate_ids"])
    report = {**counts, "problems": problems, "image_folder": str(job.image_folder and job.image_folder.resolve())}
    if len(problems) > 1 or on_bad_record == "quarantine":  # a single one is the refusal itself
        for problem in problems[:SHOWN]:
            log.error("%s", problem["line"])
    for number in {problem["part"] for problem in problems}:  # looked at again if this build is not published
        (staging / f"{number:06d}.json").unlink()
    _judge(problems, counts["records"], on_bad_record, max_bad_share)
    if not counts["kept"]:
        what = "no record is short enough" if counts["records"] else "there are no records"
        raise Refusal("D-NONE", f"{what}: 0 optimizer steps", file=job.file, found=f"{counts['records']} records")
    (staging / "report.json").write_text(json.dumps(report, indent=1))
    os.rename(staging, target)
    log.info("prepared %s: %s", job.file, ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def _judge(problems: list[dict], records: int, policy: str, share: float) -> None:
    """Refuse the data if the policy does not allow its problems."""
    if not problems or (policy == "quarantine" and len(problems) <= share * records):
        return
    parts = dict(problems[0]["refusal"])
    if policy == "quarantine":
        parts["fix"] = f"this is more than the share of {share:g} allowed by --max_bad_share"
    if len(problems) > 1:
        parts["what"] += f" (and {len(problems) - 1} more of {records} records cannot be used)"
    raise Refusal(**parts)


def _run(job: _Job, staging: Path, num_proc: int) -> Iterator[dict]:
    """Build the parts that are missing; yields every part's counts and problems, in order."""
    stream = open_stream(job.file)
    tasks = _tasks(stream, staging)
    size = job.file.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"preparing {printable(job.file.name)}") as bar:
        for result in _map_in_order(tasks, job, num_proc):
            bar.update(stream.bytes_read - bar.n)
            yield result


def _map_in_order(tasks: Iterator[_Task], job: _Job, num_proc: int) -> Iterator[dict]:
    if num_proc == 1:
        _start_worker(job)
        yield from map(_work, tasks)
        return
    with ProcessPoolExecutor(num_proc, get_context("fork"), _start_worker, (job,)) as pool:
        waiting: deque[Future] = deque()
        for task in tasks:
            waiting.append(pool.submit(_work, task))
            if len(waiting) >= 2 * num_proc:  # a window, or the whole file would be read ahead of the workers
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class _Task:
    number: int
    path: Path  # without its suffix
    records: list[tuple[int, object, str | None]] | None  # index, raw record, JSON problem; None: built already


def _tasks(stream: JsonStream | ParquetStream, staging: Path) -> Iterator[_Task]:
    numbered = ((index, raw, problem) for index, (raw, problem) in enumerate(stream))
    for number in count():
        records = list(islice(numbered, PART))
        if not records:
            return
        path = staging / f"{number:06d}"
        yield _Task(number, path, None if path.with_suffix(".json").exists() else records)


def _start_worker(job: _Job) -> None:
    global _job
    _job = job


def _work(task: _Task) -> dict:
    """Check and encode one part; ``NUMBER.arrow`` holds its rows, ``NUMBER.json``, written last, what was counted."""
    done = task.path.with_suffix(".json")
    if task.records is None:
        return json.loads(done.read_bytes())
    counts: Counter = Counter(records=len(task.records))
    problems: list[dict] = []
    columns: dict[str, list] = {name: [] for name in FEATURES}
    for index, raw, problem in task.records:
        try:
            record = check_record(raw, index, _job.file, problem)
            _check_images(record)
            row = _encode(record, counts)
        except Refusal as refusal:
            problems.append({"part": task.number, "line": refusal.line(), "refusal": _as_json(refusal)})
        else:
            for name, value in (row or {}).items():
                columns[name].append(value)
    counts.update(
        kept=len(columns["length"]),
        with_pictures=sum(columns["has_image"]),
        tokens=sum(columns["length"]),
    )
    table = pa.Table.from_pydict(columns, schema=FEATURES.arrow_schema)
    half = task.path.with_suffix(".half")
    with pa.OSFile(str(half), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(half, task.path.with_suffix(".arrow"))
    result = {"counts": counts, "problems": problems}
    half.write_text(json.dumps(result))
    os.replace(half, done)
    return result


def _check_images(record: Record) -> None:
    if record.images and _job.image_folder is None:
        raise Refusal(
            "I-FOLDER",
            "the record has a picture but no image folder was given",
            file=_job.file,
            record=record.index,
            record_id=record.id or None,
            fix="give --image_folder",
        )
    for name in record.images:
        check_image(name, _job.image_folder, record=record.index, record_id=record.id, follow_links=_job.follow_links)


def _encode(record: Record, counts: Counter) -> dict | None:
    """The record's row, shortened to ``max_length``; ``None`` if not even its first question fits."""
    limit, images = _job.max_length, record.images
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
        "images": list(images),
        "record": record.index,
        "id": record.id,
        "length": len(ids),
        "trained": len(labels) - labels.count(IGNORE_INDEX),
        "has_image": bool(images),
    }


def _as_json(refusal: Refusal) -> dict:
    parts = {name: value for name, value in vars(refusal).items() if value is not None}
    return {name: value if isinstance(value, int) else str(value) for name, value in parts.items()}
