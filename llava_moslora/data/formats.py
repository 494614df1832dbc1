"""Turns raw records into checked :class:`Record` objects, one by one as they stream in.

Nothing is repaired or skipped silently: a record that cannot be trained on is refused with its index and id. A
new format is a function that extracts images and turns from a raw record, and a row of ``FORMATS``; checks are shared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from llava_moslora.data.messages import (
    EMPTY,
    FROM_VALUE,
    MEND,
    ROLE_CONTENT,
    ROLES,
    WITHOUT_VIDEO,
    images_and_turns,
    list_under,
    read_list,
    said,
)
from llava_moslora.data.sources.json import json_type
from llava_moslora.data.sources.source import container_of
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import Turn, check_order
from llava_moslora.text.tokenizer import IMAGE_TOKEN

Content = tuple[tuple[str, ...], tuple[Turn, ...]]  # names of images, and turns
LLAVA_ROLES = {role: ROLES[role] for role in ("system", "human", "gpt")}
_SURROGATE = re.compile("[\ud800-\udfff]")
# In a record without images, <image> inside a sentence is text (for example about HTML); on its own line at the start
# or end of a turn it is LLaVA's placeholder, and the image is missing.
_IMAGE_LINE = re.compile(rf"\A\s*{IMAGE_TOKEN}\s*(\n|\Z)|\n\s*{IMAGE_TOKEN}\s*\Z")
VIDEO_TOKEN = "<video>"
_VIDEO_LINE = re.compile(_IMAGE_LINE.pattern.replace(IMAGE_TOKEN, VIDEO_TOKEN))


@dataclass(frozen=True)
class Record:
    """One checked record."""

    index: int  # in its file, from 0
    id: str  # the record's own, "" if it has none
    images: tuple[str, ...]  # names relative to the image folder, as many as there are <image> in the human turns
    turns: tuple[Turn, ...]  # an optional system turn, then human and gpt alternating; no text is empty
    format: str  # the name of the detected format


def read_records(file: str | Path) -> Iterator[Record]:
    """The records of a local data file whose images are separate files; memory does not grow with the file.

    Raises:
        Refusal: D-..., at the first record that breaks a rule, or where the file cannot be read; D-SHARD, its images
            are inside it.
    """
    container = container_of(str(file))
    if container.holds_images(str(file)):
        expected, fix = "names of images in a folder", "give the records as JSON or JSONL"
        raise Refusal("D-SHARD", "the images are inside this file", file=file, expected=expected, fix=fix)
    for index, raw in enumerate(container.read(str(file), None)):
        yield check_record(raw.value, index, file, raw.problem)


def check_record(
    raw: object,
    index: int,
    file: str | Path,
    problem: str | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Record:
    """``raw`` as a :class:`Record`.

    Args:
        problem: what the JSON reader noticed about this value.
        columns: as :func:`column_names` returns them.

    Raises:
        Refusal: D-TYPE, D-JSON, D-SCHEMA, D-ROLE, D-EMPTY, D-IMAGES, D-VIDEO, D-LABELS, D-UNICODE or I-PATH, with file,
            index and id.
    """
    own_id = raw.get(columns.get("id", "id")) if isinstance(raw, dict) else None
    try:
        if problem is not None:
            raise Refusal("D-JSON", problem, fix=MEND)
        if not isinstance(raw, dict):
            raise Refusal("D-TYPE", "a record must be an object", found=json_type(raw), fix=MEND)
        if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
            raise Refusal("D-SCHEMA", "must be a string or a number", key="id", found=json_type(own_id), fix=MEND)
        raw = _rename(raw, columns) if columns else raw
        record_format = format_of(raw)
        images, turns = record_format.read(raw)
        check_order(turns, last="gpt", key=", ".join(record_format.keys))
        _check_characters(str(own_id), *images, *(turn.text for turn in turns))
        _check_places(images, [turn.text for turn in turns if turn.role == "human"])
        if not any(turn.trained for turn in turns if turn.role == "gpt"):
            raise Refusal("D-LABELS", "no turn of this record is trained", fix="remove the record, or the marks")
    except Refusal as refusal:
        raise Refusal(**{**vars(refusal), "file": file, "record": index, "record_id": own_id}) from None
    return Record(index, "" if own_id is None else str(own_id), images, turns, record_format.name)


def read_llava(raw: dict) -> Content:
    """``{"id": ..., "image": FILE or [FILE, ...], "conversations": [{"from": "human", "value": ...}, ...]}``."""
    return images_and_turns(raw, read_list(raw, "conversations", FROM_VALUE, LLAVA_ROLES))


def read_sharegpt(raw: dict) -> Content:
    """As LLaVA's, with ``images``, and with ``user`` and ``assistant`` too; or with ``role`` and ``content``."""
    turns = raw["conversations"] if isinstance(raw["conversations"], list) else []
    names = ROLE_CONTENT if any("role" in turn for turn in turns if isinstance(turn, dict)) else FROM_VALUE
    return images_and_turns(raw, read_list(raw, "conversations", names))


def read_messages(raw: dict) -> Content:
    """``{"messages": [{"role": "user", "content": TEXT or PARTS}, ...], "images": [FILE, ...]}``, as OpenAI and TRL."""
    return images_and_turns(raw, read_list(raw, "messages"), in_front=True)


def read_prompt_completion(raw: dict) -> Content:
    """``{"prompt": TEXT or MESSAGES, "completion": TEXT or MESSAGES}``; only the completion is trained, as in TRL."""
    prompt, completion = (
        [said(role, raw[key], key)] if isinstance(raw[key], str) else read_list(raw, key)
        for key, role in (("prompt", ROLES["user"]), ("completion", ROLES["assistant"]))
    )
    given = [one._replace(turn=replace(one.turn, trained=False)) for one in prompt]
    return images_and_turns(raw, [*given, *completion], in_front=True)


def read_cauldron(raw: dict) -> Content:
    """``{"images": [...], "texts": [{"user": ..., "assistant": ..., "source": ...}, ...]}``."""
    messages = []
    for k, pair in list_under(raw, "texts"):
        if not isinstance(pair, dict):
            what = "must be an object with 'user' and 'assistant'"
            raise Refusal("D-SCHEMA", what, key=f"texts[{k}]", found=json_type(pair), fix=MEND)
        messages += [said(ROLES[name], pair.get(name), f"texts[{k}].{name}") for name in ("user", "assistant")]
    return images_and_turns(raw, messages, in_front=True)


def read_alpaca(raw: dict) -> Content:
    """``{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[QUESTION, ANSWER], ...]}``."""
    messages = []
    for k, pair in list_under(raw, "history") if raw.get("history") not in EMPTY else ():
        if not isinstance(pair, list) or len(pair) != 2:
            found, expected = json_type(pair), "[question, answer]"
            what, key = "not a [question, answer] pair", f"history[{k}]"
            raise Refusal("D-SCHEMA", what, key=key, found=found, expected=expected, fix=MEND)
        messages += [said("human", pair[0], f"history[{k}][0]"), said("gpt", pair[1], f"history[{k}][1]")]
    question = said("human", raw["instruction"], "instruction")
    if raw.get("input") not in EMPTY:
        question = said(
            "human", f"{raw['instruction']}\n{said('human', raw['input'], 'input').turn.text}", "instruction"
        )
    return images_and_turns(raw, [*messages, question, said("gpt", raw["output"], "output")])


def _as_sharegpt(raw: dict) -> bool:
    if "images" in raw:
        return True
    turns = raw["conversations"] if isinstance(raw["conversations"], list) else []
    return any(
        isinstance(turn, dict) and ("role" in turn or turn.get("from") in ("user", "assistant")) for turn in turns
    )


class Format(NamedTuple):
    name: str
    keys: tuple[str, ...]  # of the turns, which every record has; named in messages
    # Returns image names and turns, none of them empty; its refusals need not name the file and the record.
    read: Callable[[dict], Content]
    recognises: Callable[[dict], bool] = lambda raw: True  # of a record with these keys; nothing in it is checked yet


# The first that matches a record's keys reads it.
FORMATS = (
    Format("ShareGPT", ("conversations",), read_sharegpt, _as_sharegpt),
    Format("LLaVA", ("conversations",), read_llava),
    Format("messages", ("messages",), read_messages),
    Format("prompt/completion", ("prompt", "completion"), read_prompt_completion),
    Format("The Cauldron", ("texts",), read_cauldron),
    Format("alpaca", ("instruction", "output"), read_alpaca),
)
OTHER_COLUMNS = ("id", "image", "images", "system", "input", "history")


def format_of(raw: dict) -> Format:
    """
    Raises:
        Refusal: D-SCHEMA, no format has records with these keys.
    """
    for one in FORMATS:
        if all(key in raw for key in one.keys) and one.recognises(raw):
            return one
    raise Refusal(
        "D-SCHEMA", "unknown record format", found=f"keys {', '.join(raw)}" if raw else "no keys",
        expected=" | ".join(dict.fromkeys(" and ".join(one.keys) for one in FORMATS)),
        fix="rename columns with --data_columns, such as messages=dialog; records inside another "
        "object are written as a JSON array, or one per line",
    )  # fmt: skip


def column_names(given: Sequence[str]) -> dict[str, str]:
    """``NAME=COLUMN`` words as {NAME: COLUMN}: the column of the data that is read as NAME.

    Raises:
        Refusal: C-FLAG, not such a word, a NAME that no format reads, or one twice.
    """
    known = {*OTHER_COLUMNS, *(key for one in FORMATS for key in one.keys)}
    columns: dict[str, str] = {}
    for word in given:
        name, _, column = word.partition("=")
        if name not in known or name in columns or not column:
            what = "named twice" if name in columns else "not a column of a record format"
            expected = f"NAME=COLUMN, NAME being {' | '.join(sorted(known))}"
            raise Refusal("C-FLAG", what, key="--data_columns", found=word, expected=expected)
        columns[name] = column
    return columns


def _rename(raw: dict, columns: Mapping[str, str]) -> dict:
    """``raw`` with the columns renamed to the names that the formats read; other columns of such a name are dropped."""
    found = {name: raw[column] for name, column in columns.items() if column in raw}
    return {key: value for key, value in raw.items() if key not in columns and key not in columns.values()} | found


def _check_characters(*texts: str) -> None:
    for text in texts:
        if not text.isascii() and (match := _SURROGATE.search(text)):
            what, fix = "a lone surrogate is not a character", "write the complete character, or remove it"
            raise Refusal("D-UNICODE", what, found=match.group(), fix=fix)


def _check_places(images: tuple[str, ...], questions: list[str]) -> None:
    """``<image>`` in the human turns against the images."""
    places = sum(text.count(IMAGE_TOKEN) for text in questions)
    if images and places != len(images):
        what = "the number of <image> in the human turns differs from the number of images"
        expected = f"{len(images)} for {len(images)} images"
        fix = "put <image> into a human turn, once for each image"
        raise Refusal("D-IMAGES", what, found=f"{places} <image>", expected=expected, fix=fix)
    if not images and any(_IMAGE_LINE.search(text) for text in questions):
        what = "the record has an <image> line but no image"
        fix = "add the key 'image', or remove the <image> line"
        raise Refusal("D-IMAGES", what, found=f"{places} <image>, 0 images", fix=fix)
    if any(_VIDEO_LINE.search(text) for text in questions):
        what = "the record has a <video> placeholder, and videos are not supported"
        raise Refusal("D-VIDEO", what, found=VIDEO_TOKEN, fix=WITHOUT_VIDEO)
