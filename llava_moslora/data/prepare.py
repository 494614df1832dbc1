"""Data files to a tokenised Arrow data set in a cache, every record and every image's header checked on the way.

Each source (a data file, or a set of shards) has a cache folder of its own, named by everything that decides its
content: the file's bytes, the tokenizer, what the template writes, the tokens per image, the length limit and
``CODE_VERSION``. It is built part by part (:mod:`llava_moslora.data.tokenise`) in a staging folder under a file lock,
and published by one rename, so several ranks may call :func:`prepare` at once without talking to each other, and an
interrupted build continues where it stopped. What lies there is verified each time it is opened
(:mod:`llava_moslora.data.cache`), and images that could not be used are looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from filelock import AcquireReturnProxy, FileLock
from transformers import PreTrainedTokenizerFast

from llava_moslora.config import DataSettings
from llava_moslora.data.cache import (
    REPORT,
    arrow_files,
    copy_parts,
    find_damage,
    keys_of,
    publish,
    read_report,
    report_in,
    report_of,
    reports_of,
    using,
    write_json,
)
from llava_moslora.data.images import check_image
from llava_moslora.data.sources.shards import find_shards, is_sharded, version_of
from llava_moslora.data.tokenise import PART, Job, as_problem, build_parts, check_image_files
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import Turn, chat_template, encode_prompt
from llava_moslora.text.templates import OWN, get_template
from llava_moslora.text.tokenizer import IMAGE_TOKEN

__all__ = ["check_template", "keys_of", "prepare", "report_of", "reports_of"]

CODE_VERSION = 3  # raise it whenever ids, labels or columns of the same data would change
SHOWN = 20  # problems that are logged; all of them are in the report

log = logging.getLogger(__name__)


def prepare(
    settings: DataSettings,
    *,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    tokens_per_image: int,
    longest_text: int | None = None,
) -> Dataset:
    """The tokenised data set of one or several sources, from the cache or built now.

    Columns: ``input_ids`` and ``labels`` int32[length] with images expanded, ``images`` file names (in a shard:
    places), ``shard`` (``""`` for images in files), ``record`` index in the data file or shard, ``id``, ``length``,
    ``trained`` (tokens with a label), ``has_image``; ``source``, a position in ``data_path``, and ``number``, the
    record counted through all sources: for a single data file its index there.

    A record longer than ``settings.model_max_length`` loses whole trailing rounds; if already the first round is
    longer, its answer is cut at the end; if not even its question fits, the record is skipped. All three are counted in
    the log and in :func:`reports_of`. Records are never reordered.

    Args:
        settings: ``on_bad_record="fail"`` refuses a file if any record is bad, after looking at all of them;
            ``"quarantine"`` skips bad records and lists them in the report, up to a share of ``max_bad_share``.
            With ``decode_images`` a cache that was built without is built again.
        template: name of the prompt template.
        tokens_per_image: placeholders per image.
        longest_text: tokens up to which the LLM knows positions; ``model_max_length`` may not be above it.

    Raises:
        Refusal: C-FLAG (a setting out of range), D-..., I-... (the first problem, with the number of the others),
            C-TEMPLATE (template and tokenizer do not fit), D-NONE (nothing to train on), D-TWICE (a source is named
            twice), E-DISK (the cache cannot be written).
    """
    _check_ranges(settings)
    sources = settings.data_path
    folder = None if settings.image_folder is None else Path(settings.image_folder)
    if folder is not None and not folder.is_dir():
        raise Refusal("I-FOLDER", "there is no such folder", file=folder, fix="check --image_folder")
    images = tokens_per_image if folder is not None or any(map(is_sharded, sources)) else 0
    _check_length(settings.model_max_length, images, longest_text)
    job = Job(
        "", folder, tokenizer, template, tokens_per_image, settings.model_max_length, settings.follow_image_links,
        settings.decode_images,
    )  # fmt: skip
    cache = Path(settings.data_cache)
    with using(cache):
        cache.mkdir(parents=True, exist_ok=True)
    datasets, seen, before = [], [], 0
    for position, source in enumerate(sources):
        folder = _prepare_source(replace(job, file=source), cache, settings)
        digest = folder.name.rpartition("-")[2]
        if digest in seen:
            first = sources[seen.index(digest)]
            fix = "name it once, and say with --data_weights how often it is to be seen"
            raise Refusal("D-TWICE", f"the same data as {first}", file=source, fix=fix)
        seen.append(digest)
        rows = concatenate_datasets([Dataset.from_file(str(part)) for part in arrow_files(folder)])
        rows = rows.add_column("source", np.full(len(rows), position, dtype=np.int32))
        datasets.append(rows.add_column("number", before + _numbers(folder, rows)))
        report = report_in(folder)
        assert len(rows) == report["kept"], f"{folder} holds {len(rows)} rows, its report counts {report['kept']}"
        before += report["records"]
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
            "C-FLAG", "longer than the LLM's positions", key=key, found=max_length,
            expected=f"at most {longest_text} (max_position_embeddings of the LLM, with its scaling)",
            fix=f"{key} {longest_text}, or an LLM with a longer context",
        )  # fmt: skip


def _prepare_source(job: Job, cache: Path, settings: DataSettings) -> Path:
    target = cache / _key(job)
    if _why_build(target, job):
        with _lock(target):
            if why := _why_build(target, job):  # another rank may have built it while this one waited
                if target.exists():
                    log.warning("%s: its data cache is built again: %s", job.file, why)
                _build(job, target, settings)
    if _image_folder(job) != report_in(target)["image_folder"]:
        with _lock(target):
            _check_in_this_folder(job, target, settings)
    report = report_in(target)
    problems = report["problems"]
    if settings.on_bad_record == "fail":  # the refusal is about the first of them: as it is today
        problems = _look_again(problems[:1], job)[0] + problems[1:]
    _judge(problems, report["records"], settings)
    return target


def _why_build(target: Path, job: Job) -> str | None:
    """What has to be built, or ``None`` where the cache can be used as it is."""
    with using(target):
        damage = find_damage(target) if target.is_dir() else "it is not there"
    if damage:
        return damage
    report = report_in(target)
    if job.decode_images and not report["decoded"]:
        return "its images have not been decoded"
    if usable := _look_again(report["problems"], job)[1]:
        return f"{usable} records whose images could not be used can be used now"
    return None


def _look_again(problems: list[dict], job: Job) -> tuple[list[dict], int]:
    """The problems as they are today, and how many records' images can be used now.

    An image that was missing may have been copied since, or be missing in another folder today.
    """
    today, usable = [], 0
    for problem in problems:
        if "images" in problem:
            where = {name: problem["refusal"].get(name) for name in ("record", "record_id")}
            try:
                check_image_files(problem["images"], job, **where)
                usable += 1
            except Refusal as refusal:
                problem = problem | as_problem(refusal)
        today.append(problem)
    return today, usable


def _check_in_this_folder(job: Job, target: Path, settings: DataSettings) -> None:
    """The cache fits the data, but its images were checked in another folder: check them in this one, once.

    Raises:
        Refusal: I-..., the first image that cannot be used, with the number of the others.
    """
    report, here = report_in(target), _image_folder(job)
    if report["image_folder"] == here:  # another rank has done it while this one waited
        return
    if job.image_folder is None and report["with_images"] and not report["shards"]:
        what = "the records have images but no image folder was given"
        raise Refusal("I-FOLDER", what, file=job.file, fix="give --image_folder")
    log.info("%s: its images were checked in %s; checking them in %s", job.file, report["image_folder"], here)
    first, bad = None, 0
    for part in arrow_files(target):
        rows = Dataset.from_file(str(part)).select_columns(["images", "shard", "record", "id"])
        for row in (row for row in rows if not row["shard"]):
            for name in row["images"]:
                try:
                    check_image(
                        name, job.image_folder, record=row["record"], record_id=row["id"], follow_links=job.follow_links
                    )
                except Refusal as refusal:
                    first, bad = first or refusal, bad + 1
    if first is not None and settings.on_bad_record == "fail":
        more = f" (and {bad - 1} more images cannot be used)" if bad > 1 else ""
        raise Refusal(**(vars(first) | {"what": first.what + more}))
    if first is not None:  # other records are left out here
        _build(job, target, settings)
        return
    with using(target.parent):
        problems = _look_again(report["problems"], job)[0]
        write_json(target / REPORT, report | {"problems": problems, "image_folder": here})


def _image_folder(job: Job) -> str:
    return str(job.image_folder and job.image_folder.resolve())


def _lock(target: Path) -> AcquireReturnProxy:
    """A lock on ``target``, to be used in a ``with``."""
    with using(target.parent):
        return FileLock(f"{target}.lock").acquire()


def _numbers(folder: Path, rows: Dataset) -> np.ndarray:
    """int64[rows]: the records counted through a source; a shard counts its own from 0."""
    shards, records = np.asarray(rows["shard"][:]), np.asarray(rows["record"][:], dtype=np.int64)
    before = 0
    for shard, count in report_in(folder)["shards"].items():
        records[shards == shard] += before
        before += count
    return records


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


def _key(job: Job) -> str:
    digest = hashlib.sha256()
    try:
        if is_sharded(job.file):
            digest.update(json.dumps([version_of(shard) for shard in find_shards(job.file)], default=str).encode())
        elif not os.path.isfile(job.file):
            raise Refusal("D-FILE", "there is no such file", file=job.file, fix="check --data_path")
        else:
            with open(job.file, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    except OSError as error:
        what, found = "the file cannot be read", error.strerror or error
        raise Refusal("D-FILE", what, file=job.file, found=found, fix="mend its rights, or copy it again") from None
    digest.update(job.tokenizer.backend_tokenizer.to_str().encode())
    # A name does not say what a tokenizer's own template writes. Its source too: what was read off it is what a few
    # conversations showed, and two sources are never taken for one.
    written = repr(get_template(job.template, job.tokenizer))
    template = [job.template, written.replace("images_only=", "pictures_only=")]  # the field's name in earlier caches
    template += [job.tokenizer.chat_template] if job.template == OWN else []
    rest = [job.tokenizer.special_tokens_map, template, job.tokens_per_image, job.max_length]
    digest.update(json.dumps([*rest, CODE_VERSION], default=str, sort_keys=True).encode())
    name = re.sub(r"[^\w.-]", "_", Path(job.file).stem)[:40]
    return f"{name}-{digest.hexdigest()[:20]}"


def _build(job: Job, target: Path, settings: DataSettings) -> None:
    check_template(job.tokenizer, job.template)
    staging = _begin_staging(job, target)
    counts: Counter = Counter(records=0, kept=0)
    problems: list[dict] = []
    shards: dict[str, int] = {}
    parts: list[dict] = []
    for part in build_parts(job, staging, settings.preprocessing_num_workers):
        counts.update(part["counts"])
        shards |= {part["shard"]: part["counts"]["records"]} if part["shard"] else {}
        problems += part["problems"]
        parts.append({"name": part["name"], "file": part["file"]})
    if counts["kept"]:
        files = [str(staging / f"{part['name']}.arrow") for part in parts]
        ids = Counter(name for file in files for name in Dataset.from_file(file)["id"][:])
        counts["duplicate_ids"] = sum(times - 1 for name, times in ids.items() if name)
    if counts["duplicate_ids"]:
        log.warning("%s: %d records have the id of an earlier one", job.file, counts["duplicate_ids"])
    if len(problems) > 1 or settings.on_bad_record == "quarantine":  # a single one is the refusal itself
        for problem in problems[:SHOWN]:
            log.error("%s", problem["line"])
    with using(target.parent):
        for number in {problem["part"] for problem in problems}:  # looked at again in the next build
            (staging / f"{number:06d}.json").unlink()
    _judge(problems, counts["records"], settings)
    if not counts["kept"]:
        what = "no record is short enough" if counts["records"] else "there are no records"
        raise Refusal("D-NONE", f"{what}: 0 optimizer steps", file=job.file, found=f"{counts['records']} records")
    report = {"file": job.file, **counts, "shards": shards, "problems": problems, "decoded": job.decode_images,
              "image_folder": _image_folder(job), "parts": parts}  # fmt: skip
    with using(target.parent):
        for stray in set(arrow_files(staging)) - {staging / f"{part['name']}.arrow" for part in parts}:
            stray.unlink()
        write_json(staging / REPORT, report)
        publish(staging, target)
    log.info("prepared %s: %s", job.file, ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def _begin_staging(job: Job, target: Path) -> Path:
    """The folder in which a build begins or goes on; of a published cache the parts that are good are taken over."""
    checked = hashlib.sha256(f"{_image_folder(job)} {job.decode_images} {PART}".encode()).hexdigest()[:8]
    staging = target.with_name(f"{target.name}.{checked}.staging")  # parts checked otherwise are not taken over
    with using(target.parent):
        report = read_report(target)
        alike = report is not None and (report["image_folder"], report["decoded"]) == (
            _image_folder(job), job.decode_images
        )  # fmt: skip
        if alike and not staging.exists():
            copy_parts(target, staging)
        staging.mkdir(exist_ok=True)
    return staging


def _judge(problems: list[dict], records: int, settings: DataSettings) -> None:
    """Refuse the data if the policy does not allow its problems."""
    quarantine, share = settings.on_bad_record == "quarantine", settings.max_bad_share
    if not problems or (quarantine and len(problems) <= share * records):
        return
    parts = dict(problems[0]["refusal"])
    if quarantine:
        parts["fix"] = f"this is more than the share of {share:g} allowed by --max_bad_share"
    if len(problems) > 1:
        parts["what"] += f" (and {len(problems) - 1} more of {records} records cannot be used)"
    raise Refusal(**parts)
