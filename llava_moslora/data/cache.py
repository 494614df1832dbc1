"""The data cache on disk: the Arrow files of its parts, and a report with counts and a checksum of each file.

A cache is kept for months on disks that fill up, lose power and are copied, so every byte is verified when it is
opened; a folder with a damaged file is rebuilt (:mod:`llava_moslora.data.prepare`). Every file is fsynced before the
rename that publishes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from llava_moslora.config import DataSettings
from llava_moslora.data.formats import column_names
from llava_moslora.data.sources.source import Source
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import fsync, replace_file, replace_folder
from llava_moslora.files.json import parse_json
from llava_moslora.text.templates import TOKENIZER_TEMPLATE, get_template

CODE_VERSION = 5  # increment it whenever ids, labels or columns of the same data would change
REPORT = "report.json"
NAMING = "with a control token's name in a text, kept as plain text"
# Count in a report → its text in the log
COUNTS = {
    "records": "records",
    "kept": "kept",
    "with_images": "with images",
    "tokens": "tokens",
    "left_out": "left out, too long",
    "problems": "left out, bad",
    "turns_dropped": "too long, without their last turns",
    "answers_cut": "too long, their answer cut",
    "turns_not_trained": "answers not trained on",
    "duplicate_ids": "with an earlier one's id",
    "control_names_as_text": NAMING,
}
CHECKSUM = "crc32"  # key of a checksum of all other keys, in the report and in a part's JSON


@dataclass(frozen=True)
class Preparation:
    """One source, with everything else that determines its rows."""

    source: Source
    settings: DataSettings
    tokenizer: PreTrainedTokenizerFast
    template: str
    tokens_per_image: int


def cache_key(preparation: Preparation) -> str:
    """The name of the cache folder: equal for equal data, columns, tokenizer, template, image tokens and length limit.

    Raises:
        Refusal: D-FILE; C-TEMPLATE, no such template.
    """
    source, settings, tokenizer = preparation.source, preparation.settings, preparation.tokenizer
    digest = hashlib.sha256()
    for block in source.version():
        digest.update(block)
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    # For "tokenizer" the name does not determine the template, so the chat template itself is in the key too: ours
    # was derived from a few rendered conversations, and two chat templates must never share a cache.
    template = [preparation.template, repr(get_template(preparation.template, tokenizer))]
    template += [tokenizer.chat_template] if preparation.template == TOKENIZER_TEMPLATE else []
    rest = [tokenizer.special_tokens_map, template, preparation.tokens_per_image, settings.model_max_length]
    rest += [column_names(settings.data_columns)]
    rest += ["train_on_prompt"] if settings.train_on_prompt else []
    digest.update(json.dumps([*rest, CODE_VERSION], default=str, sort_keys=True).encode())
    name = re.sub(r"[^\w.-]", "_", Path(source.name).stem)[:40]
    return f"{name}-{digest.hexdigest()[:20]}"


def arrow_files(folder: Path) -> list[Path]:
    """The rows of ``folder``, part by part."""
    return sorted(folder.glob("*.arrow"))


def describe_file(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file.

    The cache is read completely each time it is opened: 0.2 s per GB on one core (measured on the page cache in
    blocks of 1 MB; SHA-256: 0.5 s), once per process, and training is about to read the same bytes.
    """
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` with a checksum of it, atomically."""
    text = json.dumps(content | {CHECKSUM: zlib.crc32(_canonical(content))}, indent=1)
    replace_file(path, text.encode())


def read_json(path: Path) -> dict | None:
    """What :func:`write_json` wrote, or ``None`` if the file is missing or was changed."""
    try:
        content = parse_json(path.read_bytes())
        checksum = content.pop(CHECKSUM)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return content if checksum == zlib.crc32(_canonical(content)) else None


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def read_report(folder: Path) -> dict | None:
    """The report of ``folder`` if it is complete."""
    return read_json(folder / REPORT)


def report_in(folder: Path) -> dict:
    """The report of a cache in use.

    Raises:
        Refusal: D-CACHE, it is damaged or missing.
    """
    if (report := read_report(folder)) is None:
        what = "something else changed the data cache while it was in use"
        raise Refusal("D-CACHE", what, file=folder, fix="start again: damaged files are rebuilt")
    return report


def reports_of(dataset: Dataset) -> list[dict]:
    """For each source of ``dataset``, what was counted when it was prepared: file, records, kept, left_out (not even
    the question fits), turns_dropped, answers_cut, problems, ..."""
    return [report_in(folder) for folder in folders_of(dataset)]


def summary(dataset: Dataset) -> str:
    """For the log: a line per source with its detected record format, one with the file that lists its bad records, and
    a line with all counts."""
    lines = []
    for folder in folders_of(dataset):
        report = report_in(folder)
        lines.append(f"record format of {report['file']}: {_names(report['formats'])}")
        if problems := report["problems"]:
            lines.append(f"bad records of {report['file']}: {len(problems):,}, listed in {folder / REPORT}")
    return "\n".join([*lines, f"data: {in_words(report_of(dataset))}"])


def in_words(report: Mapping[str, Any]) -> str:
    """The counts of a report on one line; zeros are omitted, except of ``records`` and ``kept``."""
    found = {name: len(value) if name == "problems" else value for name, value in report.items()}
    counts = {words: found.get(name, 0) for name, words in COUNTS.items()}
    return "  ".join(f"{words}: {n:,}" for words, n in counts.items() if n or words in ("records", "kept"))


def _names(formats: dict[str, int]) -> str:
    return " ".join(formats) if len(formats) == 1 else ", ".join(f"{name} ({n:,})" for name, n in formats.items())


def folders_of(dataset: Dataset) -> list[Path]:
    """The cache folder of each source."""
    return list(dict.fromkeys(Path(part["filename"]).parent for part in dataset.cache_files))


def report_of(dataset: Dataset) -> dict:
    """One report of all sources: counts are summed, lists of problems concatenated."""
    counts: Counter = Counter()
    reports = reports_of(dataset)
    for report in reports:
        counts.update({name: n for name, n in report.items() if isinstance(n, int) and not isinstance(n, bool)})
    return {**counts, "problems": [problem for report in reports for problem in report["problems"]]}


def keys_of(dataset: Dataset, rows: np.ndarray | None = None) -> list[str]:
    """The key of each source, or of those of its ``rows``, int64[n], that are used; equal keys mean equal rows.

    The key is the name of the cache folder and a digest of which records are in it, because a record that was skipped
    for its images is added once they can be used.
    """
    used = slice(None) if rows is None else rows
    sources, records = (np.asarray(dataset[name][:])[used] for name in ("source", "record"))
    digests = [hashlib.sha256(records[sources == k].tobytes()).hexdigest()[:8] for k in range(len(folders_of(dataset)))]
    return [f"{folder.name}-{digest}" for folder, digest in zip(folders_of(dataset), digests, strict=True)]


def content_digest(dataset: Dataset, rows: np.ndarray) -> str:
    """Of the records in ``rows``, int64[n]: what they say and how long they are, in order. Names, places and times of
    their files do not count, as they do in :func:`keys_of`."""
    digest = hashlib.sha256()
    for name in ("source", "record", "hash", "length", "trained"):
        column = np.asarray(dataset[name][:], dtype=np.uint64)[rows]
        digest.update(f"{name} {len(column)}".encode() + column.tobytes())
    return digest.hexdigest()[:20]


def find_damage(folder: Path) -> str | None:
    """What is damaged in a finished cache, or ``None`` if every byte is as it was when it was built."""
    if (report := read_report(folder)) is None:
        return f"{REPORT} is missing or damaged"
    expected = [f"{part['name']}.arrow" for part in report["parts"]]
    if (found := [path.name for path in arrow_files(folder)]) != expected:
        return f"{len(expected)} arrow files are expected, {len(found)} are there"
    for name, part in zip(expected, report["parts"], strict=True):
        try:
            now = describe_file(folder / name)
        except FileNotFoundError:  # another process is building the folder again
            return f"{name} is missing"
        if now != part["file"]:
            return f"{name} is not the file that was written"
    return None


def publish(staging: Path, target: Path) -> None:
    """Rename the finished folder ``staging`` to ``target``; replaces an existing cache."""
    fsync(staging)
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
    replace_folder(staging, target, old)


def copy_parts(target: Path, staging: Path) -> None:
    """Start ``staging`` with the files of a finished cache, which is left as it is."""
    half = staging.with_name(f"{staging.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(target, half, copy_function=_link, ignore=shutil.ignore_patterns(REPORT))
    os.rename(half, staging)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)  # files are replaced, never modified
    except OSError:  # a file system without hard links
        shutil.copyfile(source, destination)


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Turn operating system errors while ``folder`` is read or written into a Refusal, E-DISK."""
    try:
        yield
    except OSError as error:
        raise Refusal(
            "E-DISK", "the data cache cannot be used", file=error.filename or folder, key="--data_cache",
            found=error.strerror or error, expected="a folder that can be written, with space",
            fix="free space, correct its permissions, or name another folder",
        ) from error  # fmt: skip
