"""Prepares data files as a cached, tokenised Arrow data set; checks every record and every image's header.

Each source (a data file, or a set of shards) has a cache folder, named by a hash of everything its content depends on
(``cache_key``). It is built part by part (:mod:`llava_moslora.data.tokenise`) in a staging folder under a file lock and
published by one rename, so several ranks may call :func:`prepare` at once without communication, and an interrupted
build continues where it stopped. The cache is verified each time it is opened, and unusable images are checked again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from llava_moslora.config import DataSettings
from llava_moslora.data.cache import (
    REPORT,
    Preparation,
    arrow_files,
    cache_key,
    copy_parts,
    find_damage,
    in_words,
    publish,
    read_report,
    report_in,
    using,
    write_json,
)
from llava_moslora.data.cache_lock import PATIENCE, locked, report_progress
from llava_moslora.data.formats import column_names
from llava_moslora.data.images import check_image
from llava_moslora.data.problems import log_problems, refusal_of
from llava_moslora.data.sources.source import Source
from llava_moslora.data.tokenise import RECORDS_PER_PART, as_problem, build_parts, check_image_files, naming_data
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import check_template

log = logging.getLogger(__name__)


def prepare(
    settings: DataSettings,
    *,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    tokens_per_image: int,
    longest_text: int | None = None,
    patience: float = PATIENCE,
) -> Dataset:
    """The tokenised data set of one or several sources, from the cache or built now.

    Columns: ``input_ids`` and ``labels`` int32[length] with images expanded, ``images`` file names (in a shard
    ImageRefs), ``shard`` (``""`` for images in files), ``record`` index in the data file or shard, ``id``, ``length``,
    ``trained`` (tokens with a label), ``has_image``, ``hash`` uint64, of the record's content; ``source``, a position
    in ``data_path``, and ``number``, the record counted through all sources: for a single data file its index there.

    A record longer than ``settings.model_max_length`` loses complete trailing rounds; if even the first round is too
    long, its answer is truncated; if not even its question fits, the record is skipped, or with
    ``train_on_prompt`` the question is truncated like the answer. All three are counted in the log and in
    :func:`~llava_moslora.data.cache.reports_of`. Records are never reordered.

    Args:
        settings: ``on_bad_record="fail"`` refuses a file if any record is bad, after checking all of them;
            ``"quarantine"`` skips bad records and lists them in the report, up to a share of ``max_bad_share``.
            With ``decode_images`` a cache that was built without it is rebuilt.
        template: name of the prompt template.
        tokens_per_image: placeholders per image; 0 without a vision tower: a record with an image is refused.
        longest_text: the LLM's maximum context length; ``model_max_length`` may not be above it.
        patience: seconds to wait for another process that builds the cache and makes no progress.

    Raises:
        Refusal: C-FLAG (a setting out of range), D-..., I-... (the first problem, with the number of the others),
            C-TEMPLATE (template and tokenizer do not fit), D-NONE (nothing to train on), D-TWICE (a source is named
            twice), E-DISK (the cache cannot be written), P-RANK (the process that builds it stands still).
    """
    _check_ranges(settings)
    column_names(settings.data_columns)
    if settings.image_folder is not None and not Path(settings.image_folder).is_dir():
        what = "not a folder" if Path(settings.image_folder).exists() else "there is no such folder"
        raise Refusal("I-FOLDER", what, file=settings.image_folder, fix="check --image_folder")
    sources = [Source(name) for name in settings.data_path]
    has_images = settings.image_folder is not None or any(source.is_sharded for source in sources)
    _check_length(settings.model_max_length, tokens_per_image if has_images else 0, longest_text)
    cache = Path(settings.data_cache)
    with using(cache):
        cache.mkdir(parents=True, exist_ok=True)
    datasets: list[Dataset] = []
    digests: list[str] = []
    records_before = 0
    for position, source in enumerate(sources):
        folder = _prepare_source(Preparation(source, settings, tokenizer, template, tokens_per_image), cache, patience)
        digest = folder.name.rpartition("-")[2]
        if digest in digests:
            first = sources[digests.index(digest)].name
            fix = "name it once, and set how often it is seen with --data_weights"
            raise Refusal("D-TWICE", f"the same data as {first}", file=source.name, fix=fix)
        digests.append(digest)
        rows = concatenate_datasets([Dataset.from_file(str(part)) for part in arrow_files(folder)])
        rows = rows.add_column("source", np.full(len(rows), position, dtype=np.int32))
        datasets.append(rows.add_column("number", records_before + _count_through_shards(folder, rows)))
        report = report_in(folder)
        assert len(rows) == report["kept"], f"{folder} holds {len(rows)} rows, its report counts {report['kept']}"
        records_before += report["records"]
    return concatenate_datasets(datasets)


def find_prepared(
    settings: DataSettings, *, tokenizer: PreTrainedTokenizerFast, template: str, tokens_per_image: int
) -> Dataset | None:
    """The data set that :func:`prepare` would find in the cache, without ``source`` checks and without building; None
    if it would have to build. Reads the data files to compute the cache's name, but no image."""
    datasets = []
    for position, name in enumerate(settings.data_path):
        preparation = Preparation(Source(name), settings, tokenizer, template, tokens_per_image)
        folder = Path(settings.data_cache) / cache_key(preparation)
        if not folder.is_dir() or read_report(folder) is None:
            return None
        rows = concatenate_datasets([Dataset.from_file(str(part)) for part in arrow_files(folder)])
        datasets.append(rows.add_column("source", np.full(len(rows), position, dtype=np.int32)))
    return concatenate_datasets(datasets)


def _check_ranges(settings: DataSettings) -> None:
    if (processes := settings.preprocessing_num_workers) < 1:
        key = "--preprocessing_num_workers"
        raise Refusal("C-FLAG", "out of range", key=key, found=processes, expected="at least 1")
    if not 0 <= (share := settings.max_bad_share) <= 1:
        raise Refusal("C-FLAG", "out of range", key="--max_bad_share", found=share, expected="0 to 1")


def _check_length(max_length: int, image: int, longest_text: int | None) -> None:
    """``image``: tokens of an image, 0 where the data have none."""
    key = "--model_max_length"
    if max_length <= image:
        raise Refusal(
            "C-FLAG", "out of range", key=key, found=max_length,
            expected=f"above {image}, the tokens of one image" if image else "at least 1",
            fix="2048 holds LLaVA's records with an image of 576 tokens",
        )  # fmt: skip
    if longest_text is not None and max_length > longest_text:
        raise Refusal(
            "C-FLAG", "longer than the LLM's context", key=key, found=max_length,
            expected=f"at most {longest_text} (max_position_embeddings of the LLM, with its scaling)",
            fix=f"{key} {longest_text}, or an LLM with a longer context",
        )  # fmt: skip


def _prepare_source(preparation: Preparation, cache: Path, patience: float) -> Path:
    """The cache folder of a source, built if needed; its images are checked in the current image folder."""
    target, settings, name = cache / cache_key(preparation), preparation.settings, preparation.source.name
    if _reason_to_build(target, preparation):
        with locked(target, name, patience):
            if reason := _reason_to_build(target, preparation):  # another rank may have built it while this one waited
                if target.exists():
                    log.warning("%s: rebuilding its data cache: %s", name, reason)
                _build(preparation, target, patience)
    if _image_folder(settings) != report_in(target)["image_folder"]:
        with locked(target, name, patience):
            _check_images_in_new_folder(preparation, target, patience)
    report = report_in(target)
    problems = report["problems"]
    if settings.on_bad_record == "fail":  # the refusal is about the first of them, as it is now
        problems = _recheck_images(problems[:1], preparation)[0] + problems[1:]
    if (refusal := refusal_of(problems, report["records"], settings)) is not None:
        raise refusal
    return target


def _reason_to_build(target: Path, preparation: Preparation) -> str | None:
    """Why the cache has to be built, or ``None`` if it can be used as it is."""
    with using(target):
        damage = find_damage(target) if target.is_dir() else "it does not exist"
    if damage:
        return damage
    report = report_in(target)
    if preparation.settings.decode_images and not report["decoded"]:
        return "its images have not been decoded"
    if usable := _recheck_images(report["problems"], preparation)[1]:
        return f"{usable} records whose images were unusable can be used now"
    return None


def _recheck_images(problems: list[dict], preparation: Preparation) -> tuple[list[dict], int]:
    """The problems as they are now, and how many records' images can be used now.

    An image that was missing may have been copied since, or the image folder may be another one.
    """
    current, usable = [], 0
    for problem in problems:
        if "images" in problem:
            where = {name: problem["refusal"].get(name) for name in ("record", "record_id")}
            try:
                check_image_files(problem["images"], preparation, **where)
                usable += 1
            except Refusal as refusal:
                problem = problem | as_problem(refusal)
        current.append(problem)
    return current, usable


def _check_images_in_new_folder(preparation: Preparation, target: Path, patience: float) -> None:
    """Check the images of a cache, which were checked in another folder, once in this one.

    Raises:
        Refusal: I-..., the first image that cannot be used, with the number of the others.
    """
    settings, name = preparation.settings, preparation.source.name
    report, here = report_in(target), _image_folder(settings)
    if report["image_folder"] == here:  # another rank has done it while this one waited
        return
    if settings.image_folder is None and report["with_images"] and not report["shards"]:
        what = "the records have images but no image folder was given"
        raise Refusal("I-FOLDER", what, file=name, fix="give --image_folder")
    log.info("%s: its images were checked in %s; checking them in %s", name, report["image_folder"], here)
    first, bad = _check_images_of_rows(target, settings, name)
    if first is not None and settings.on_bad_record == "fail":
        more = f" (and {bad - 1} more images cannot be used)" if bad > 1 else ""
        raise Refusal(**(vars(first) | {"what": first.what + more}))
    if first is not None:  # different records are skipped here
        _build(preparation, target, patience)
        return
    with using(target.parent):
        problems = _recheck_images(report["problems"], preparation)[0]
        write_json(target / REPORT, report | {"problems": problems, "image_folder": here})


def _check_images_of_rows(target: Path, settings: DataSettings, source: str) -> tuple[Refusal | None, int]:
    """The refusal of the first image file of a cache of ``source`` that cannot be used, and how many cannot."""
    first, bad = None, 0
    for part in arrow_files(target):
        report_progress(target)
        rows = Dataset.from_file(str(part)).select_columns(["images", "shard", "record", "id"])
        for row in (row for row in rows if not row["shard"]):
            assert settings.image_folder is not None, "refused before"
            where = {"record": row["record"], "record_id": row["id"]}
            for name in row["images"]:
                try:
                    with naming_data(source):
                        check_image(name, settings.image_folder, follow_links=settings.follow_image_links, **where)
                except Refusal as refusal:
                    first, bad = first or refusal, bad + 1
    return first, bad


def _image_folder(settings: DataSettings) -> str:
    """The image folder as reports name it."""
    return str(None if settings.image_folder is None else Path(settings.image_folder).resolve())


def _count_through_shards(folder: Path, rows: Dataset) -> np.ndarray:
    """int64[rows]: the record's number in its source; ``record`` is counted from 0 in each shard."""
    shards, records = np.asarray(rows["shard"][:]), np.asarray(rows["record"][:], dtype=np.int64)
    before = 0
    for shard, count in report_in(folder)["shards"].items():
        records[shards == shard] += before
        before += count
    return records


def _build(preparation: Preparation, target: Path, patience: float) -> None:
    """Build the cache ``target`` in a staging folder and publish it; others wait ``patience`` seconds for progress.

    Raises:
        Refusal: a problem that the policy does not allow; D-NONE, no record is left; C-TEMPLATE, E-DISK.
    """
    settings, name = preparation.settings, preparation.source.name
    check_template(preparation.tokenizer, preparation.template)
    staging = _open_staging(preparation, target)
    counts: Counter = Counter(records=0, kept=0)
    formats: Counter = Counter()
    problems: list[dict] = []
    shards: dict[str, int] = {}
    parts: list[dict] = []
    for part in build_parts(preparation, staging, settings.preprocessing_num_workers, every=min(10, patience / 4)):
        counts.update(part["counts"])
        formats.update(part["formats"])
        shards |= {part["shard"]: part["counts"]["records"]} if part["shard"] else {}
        problems += part["problems"]
        parts.append({"name": part["name"], "file": part["file"]})
    if counts["kept"]:
        counts["duplicate_ids"] = _count_duplicate_ids([staging / f"{part['name']}.arrow" for part in parts])
    if counts["duplicate_ids"]:
        log.warning("%s: %d records have the id of an earlier one", name, counts["duplicate_ids"])
    refusal = refusal_of(problems, counts["records"], settings)
    log_problems(problems, target / REPORT if refusal is None else None)
    with using(target.parent):
        for number in {problem["part"] for problem in problems}:  # will be checked again in the next build
            (staging / f"{number:06d}.json").unlink()
    if refusal is not None:
        raise refusal
    if not counts["kept"]:
        what = "no record is short enough" if counts["records"] else "there are no records"
        fix = "raise --model_max_length" if counts["records"] else "name a file with records"
        found = f"{counts['records']} records"
        raise Refusal("D-NONE", f"{what}: 0 optimizer steps", file=name, found=found, fix=fix)
    report = {"file": name, **counts, "formats": dict(formats), "shards": shards, "problems": problems,
              "decoded": settings.decode_images, "image_folder": _image_folder(settings), "parts": parts}  # fmt: skip
    with using(target.parent):
        for stray in set(arrow_files(staging)) - {staging / f"{part['name']}.arrow" for part in parts}:
            stray.unlink()
        write_json(staging / REPORT, report)
        publish(staging, target)
    log.info("prepared %s: %s", name, in_words(report))


def _open_staging(preparation: Preparation, target: Path) -> Path:
    """The staging folder in which a build begins or continues, with the valid parts of a published cache."""
    here, decoded = _image_folder(preparation.settings), preparation.settings.decode_images
    # parts whose images were checked in another folder, or with other settings, are not reused
    checked = hashlib.sha256(f"{here} {decoded} {RECORDS_PER_PART}".encode()).hexdigest()[:8]
    staging = target.with_name(f"{target.name}.{checked}.staging")
    with using(target.parent):
        report = read_report(target)
        alike = report is not None and (report["image_folder"], report["decoded"]) == (here, decoded)
        if alike and not staging.exists():
            copy_parts(target, staging)
        staging.mkdir(exist_ok=True)
    return staging


def _count_duplicate_ids(files: list[Path]) -> int:
    """How many records have the id of an earlier one; records without an id have none."""
    ids: Counter = Counter()
    for file in files:
        ids.update(Dataset.from_file(str(file))["id"][:])
    del ids[""]
    return ids.total() - len(ids)
