"""Checks and tokenises a source part by part, in several processes.

A part is a few thousand records of a data file, or one shard. ``NUMBER.arrow`` holds its rows and ``NUMBER.json``,
written last, what was counted and the rows' checksum; a part is finished if both files are undamaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features, List, Value
from tqdm import tqdm

from llava_moslora.data.cache import Preparation, describe_file, read_json, using, write_json
from llava_moslora.data.formats import Record, check_record, column_names
from llava_moslora.data.images import check_bytes, check_image, load_bytes, load_image
from llava_moslora.data.sources.container import RawRecord
from llava_moslora.data.sources.source import container_of
from llava_moslora.errors import Refusal, printable
from llava_moslora.files.disk import replace_file
from llava_moslora.text.conversation import IGNORE_INDEX, ConversationEncoder
from llava_moslora.text.tokenizer import IMAGE_TOKEN

RECORDS_PER_PART = 2048  # lost by an interruption, and held in memory by a worker
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "images": List(Value("string")),  # file names, or in a shard ImageRefs
        "shard": Value("string"),  # "" where the images are files
        "record": Value("int64"),
        "id": Value("string"),
        "length": Value("int32"),
        "trained": Value("int32"),
        "has_image": Value("bool"),
        "hash": Value("uint64"),
    }
)


@dataclass(frozen=True)
class Part:
    """Records that one process tokenises at a time."""

    number: int
    path: Path  # of its files in the cache, without suffix
    records: Sequence[tuple[int, RawRecord]] = ()  # with their index in the file; or
    shard: str = ""  # the file to read them from
    result: dict | None = None  # of a part that an earlier build finished


def build_parts(preparation: Preparation, staging: Path, processes: int, every: float = 10.0) -> Iterator[dict]:
    """Build the parts that are missing in ``staging``; yields what :func:`_build_part` returned for each, in order.

    Args:
        every: seconds after which a process that is inside a part, such as a shard of hours, touches ``staging``.

    Raises:
        Refusal: D-PARSE and the like, of the file as a whole; E-DISK; E-WORKER, a process was killed.
    """
    source = preparation.source
    name = f"preparing {printable(Path(source.name).name)}"
    if source.is_sharded:
        paths = [staging / f"{number:06d}" for number in range(len(source.shards))]
        parts = (Part(k, path, (), source.shards[k], _finished(path)) for k, path in enumerate(paths))
        with tqdm(total=len(source.shards), unit="shard", desc=name) as bar:
            for result in _map_in_order(parts, preparation, processes, every):
                bar.update()
                yield result
        return
    container = container_of(source.name)
    records = container.read(source.name, None)
    with tqdm(
        total=sum(map(os.path.getsize, container.files(source.name))), unit="B", unit_scale=True, desc=name
    ) as bar:
        for result in _map_in_order(_parts_of_file(records, staging, bar), preparation, processes, every):
            yield result


def _map_in_order(parts: Iterator[Part], preparation: Preparation, processes: int, every: float) -> Iterator[dict]:
    if processes == 1:
        _start_worker(preparation, every)
        yield from map(_build_part, parts)
        return
    try:
        with ProcessPoolExecutor(processes, get_context("fork"), _start_worker, (preparation, every)) as pool:
            waiting: deque[Future] = deque()
            for part in parts:
                waiting.append(pool.submit(_build_part, part))
                if len(waiting) >= 2 * processes:  # bounded, or the whole file would be read ahead of the workers
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise Refusal(
            "E-WORKER", "a process that tokenises was killed", file=preparation.source.name,
            key="--preprocessing_num_workers", found=processes,
            fix="usually memory ran out: use fewer processes; finished parts are kept",
        ) from None  # fmt: skip


def _parts_of_file(records: Iterator[RawRecord], staging: Path, bar: tqdm) -> Iterator[Part]:
    numbered = enumerate(records)
    for number in count():
        chunk = list(islice(numbered, RECORDS_PER_PART))
        if not chunk:
            return
        bar.update(chunk[-1][1].bytes_read - bar.n)
        path = staging / f"{number:06d}"
        result = _finished(path)
        yield Part(number, path, chunk if result is None else (), result=result)


def _finished(path: Path) -> dict | None:
    """What :func:`_build_part` returned for a part, if the part is finished and its files are complete."""
    if (result := read_json(path.with_suffix(".json"))) is None or not path.with_suffix(".arrow").is_file():
        return None
    if describe_file(path.with_suffix(".arrow")) != result["file"]:
        return None
    return result


_worker: _Worker  # of this process


def _start_worker(preparation: Preparation, every: float) -> None:
    global _worker
    _worker = _Worker(preparation, every)


def _build_part(part: Part) -> dict:
    """Check and tokenise one part and write its files, if it is not finished."""
    return part.result or _worker.build(part)


class _Worker:
    """The state of one process: it tokenises one part after the other."""

    def __init__(self, preparation: Preparation, every: float):
        self.every, self.touched = every, time.monotonic()
        self.preparation, self.settings = preparation, preparation.settings
        self.columns = column_names(self.settings.data_columns)
        self.encoder = ConversationEncoder(preparation.tokenizer, preparation.template)
        added = preparation.tokenizer.added_tokens_decoder.values()
        controls = sorted({token.content for token in added if token.special} - {IMAGE_TOKEN})
        self.control_names = re.compile("|".join(map(re.escape, controls)) or "(?!)")

    def build(self, part: Part) -> dict:
        counts: Counter = Counter(records=0)
        formats: Counter = Counter()
        problems: list[dict] = []
        columns: dict[str, list] = {name: [] for name in FEATURES}
        file = part.shard or self.preparation.source.name
        for index, raw in self._records(part):
            counts["records"] += 1
            self._report_progress(part)
            record = None
            try:
                record = check_record(raw.value, index, file, raw.problem, self.columns)
                formats[record.format] += 1
                if masked := sum(not turn.trained for turn in record.turns if turn.role == "gpt"):
                    counts["turns_not_trained"] += masked
                counts["control_names_as_text"] += any(self.control_names.search(turn.text) for turn in record.turns)
                images = usable_images(record, raw, part.shard, self.preparation)
                with naming(record, file):
                    row = self._row(record, images, part.shard, counts)
            except Refusal as refusal:
                problem = {"part": part.number, **as_problem(refusal)}
                if record is not None and refusal.code.startswith("I-") and not part.shard:  # shards do not change
                    problem["images"] = record.images
                problems.append(problem)
            else:
                for name, value in (row or {}).items():
                    columns[name].append(value)
        lengths = columns["length"]
        counts.update(kept=len(lengths), with_images=sum(columns["has_image"]), tokens=sum(lengths))
        return _write_part(part, columns, {"counts": dict(counts), "formats": dict(formats), "problems": problems})

    def _records(self, part: Part) -> Iterator[tuple[int, RawRecord]]:
        if not part.shard:
            return iter(part.records)
        check = load_bytes if self.settings.decode_images else check_bytes

        def check_and_report(data: bytes, name: str) -> None:
            self._report_progress(part)  # a tar's images are all read before its first record
            check(data, name)

        return enumerate(container_of(part.shard).read(part.shard, check_and_report))

    def _report_progress(self, part: Part) -> None:
        """To those who wait for the cache (:mod:`llava_moslora.data.cache_lock`): inside a part nothing is written."""
        if (now := time.monotonic()) >= self.touched + self.every:
            self.touched = now
            with suppress(OSError):  # others may wait in vain; the cache itself is right without it
                os.utime(part.path.parent)

    def _row(self, record: Record, images: list[str], shard: str, counts: Counter) -> dict | None:
        """The record's row, shortened to ``model_max_length``; ``None`` if not even its first question fits."""
        limit = self.settings.model_max_length
        places = [self.preparation.tokens_per_image] * len(images)
        encoded = self.encoder.encode(record.turns, places, train_on_prompt=self.settings.train_on_prompt)
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
            "hash": record_hash(record),
        }


def usable_images(record: Record, raw: RawRecord, shard: str, preparation: Preparation) -> list[str]:
    """The record's images as its row names them; ``shard`` is the file that they are in, or ``""``.

    Raises:
        Refusal: D-IMAGES, there is no vision tower; I-..., the first that cannot be used.
    """
    where: dict[str, Any] = {"record": record.index, "record_id": record.id or None}
    if record.images and not preparation.tokens_per_image:
        raise Refusal(
            "D-IMAGES", "the record has an image, but there is no vision tower",
            file=shard or preparation.source.name, found=record.images[0],
            fix="give --vision_tower, or use data without images", **where,
        )  # fmt: skip
    if not shard:
        check_image_files(record.images, preparation, **where)
        return list(record.images)
    for name in record.images:
        if (image := raw.images.get(name)) is None:
            raise Refusal(
                "I-MISSING", "the shard has no such image", file=shard, key="image", found=name,
                expected="the name of a member next to the record",
                fix="write the image into the shard, or correct its name", **where,
            )  # fmt: skip
        if image.refusal is not None:
            raise Refusal(**{**vars(image.refusal), **where})
    return [str(raw.images[name].ref) for name in record.images]


@contextmanager
def naming(record: Record, file: str) -> Iterator[None]:
    """Add file and record to refusals of a record's turns, which do not know them."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(
            **{**vars(refusal), "file": file, "record": record.index, "record_id": record.id or None}
        ) from None


def record_hash(record: Record) -> int:
    """A number in [0, 2⁶⁴) from what a record says and shows: its turns and the names of its images."""
    content = [[[turn.role, turn.text] for turn in record.turns], list(record.images)]
    return int.from_bytes(hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest(), "big")


def _write_part(part: Part, columns: dict[str, list], found: dict) -> dict:
    """The part's two files; returns the content of its JSON."""
    table = pa.Table.from_pydict(columns, schema=FEATURES.arrow_schema)
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    arrow = part.path.with_suffix(".arrow")
    with using(arrow.parent):
        replace_file(arrow, memoryview(buffer.getvalue()))
        result = {"name": part.path.name, "shard": part.shard, **found, "file": describe_file(arrow)}
        write_json(part.path.with_suffix(".json"), result)
    return result


def check_image_files(names: Sequence[str], preparation: Preparation, *, record: int, record_id: str | None) -> None:
    """Check a record's image files; decode them if the settings ask for it.

    Raises:
        Refusal: I-..., about the first that cannot be used.
    """
    settings = preparation.settings
    where: dict[str, Any] = {"record": record, "record_id": record_id}
    check = load_image if settings.decode_images else check_image
    for name in names:
        if settings.image_folder is None:
            what, fix = "the record has an image but no image folder was given", "give --image_folder"
            raise Refusal("I-FOLDER", what, file=preparation.source.name, fix=fix, **where)
        with naming_data(preparation.source.name):
            check(name, settings.image_folder, follow_links=settings.follow_image_links, **where)


@contextmanager
def naming_data(file: str) -> Iterator[None]:
    """The refusal of an image's name, which names no file, names the data file that it is written in."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(**{**vars(refusal), "file": refusal.file or file}) from None


def as_problem(refusal: Refusal) -> dict:
    """A refusal for the report: its line, and its parts as JSON."""
    items = ((name, value) for name, value in vars(refusal).items() if value is not None)
    parts = {name: value if isinstance(value, int) else str(value) for name, value in items}
    return {"line": refusal.line(), "refusal": parts}
