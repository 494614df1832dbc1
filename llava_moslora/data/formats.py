"""Record formats: a raw record to a checked :class:`Record`, one by one as they stream in.

Nothing is repaired and nothing is skipped silently: a record that cannot be trained on is refused by index and id. A
new format is a function that finds images and turns in a raw record, and a row of ``FORMATS``; the checks are shared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llava_moslora.data.sources.json import json_type
from llava_moslora.data.sources.source import read_raw_records
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

ROLES = ("system", "human", "gpt")
WITHOUT_VIDEO = "remove the record, or save frames as images: a list under 'image', one <image> for each"
_SURROGATE = re.compile("[\ud800-\udfff]")
# In a record without images, <image> inside a sentence is text (somebody writes about HTML); on a line of its own at
# the start or end of a turn it is what LLaVA writes for an image, and the image is missing.
_IMAGE_LINE = re.compile(rf"\A\s*{IMAGE_TOKEN}\s*(\n|\Z)|\n\s*{IMAGE_TOKEN}\s*\Z")
VIDEO_TOKEN = "<video>"
_VIDEO_LINE = re.compile(_IMAGE_LINE.pattern.replace(IMAGE_TOKEN, VIDEO_TOKEN))


@dataclass(frozen=True)
class Record:
    """One checked record.

    Attributes:
        index: position in its file, from 0.
        id: the record's own id, ``""`` if it has none.
        images: file names relative to the image folder, as many as there are ``<image>`` in the human turns.
        turns: an optional system turn, then human and gpt in turn; no text is empty.
    """

    index: int
    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_records(file: str | Path) -> Iterator[Record]:
    """The records of a local data file, in order; memory does not grow with the file.

    Raises:
        Refusal: at the first record that breaks a rule (D-...), or where the file cannot be read (D-PARSE, D-ENC).
    """
    for index, raw in enumerate(read_raw_records(str(file))):
        yield check_record(raw.value, index, file, raw.problem)


def check_record(raw: object, index: int, file: str | Path, problem: str | None = None) -> Record:
    """``raw`` as a :class:`Record`.

    Args:
        problem: what the JSON reader noticed about this value.

    Raises:
        Refusal: D-TYPE, D-JSON, D-SCHEMA, D-ROLE, D-EMPTY, D-IMAGES, D-VIDEO or D-UNICODE, with file, index and id.
    """
    own_id = raw.get("id") if isinstance(raw, dict) else None
    try:
        if problem is not None:
            raise Refusal("D-JSON", problem)
        if not isinstance(raw, dict):
            raise Refusal("D-TYPE", "a record must be an object", found=json_type(raw))
        if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
            raise Refusal("D-SCHEMA", "must be a string or a number", key="id", found=json_type(own_id))
        record_format = next((one for one in FORMATS if one.recognises(raw)), LLAVA)
        images, turns = record_format.read(raw)
        _check_order(turns, record_format.turns_key)
        _check_characters(str(own_id), *images, *(turn.text for turn in turns))
        _check_places(images, [turn.text for turn in turns if turn.role == "human"])
    except Refusal as refusal:
        raise Refusal(**{**vars(refusal), "file": file, "record": index, "record_id": own_id}) from None
    return Record(index, "" if own_id is None else str(own_id), images, turns)


def read_llava(raw: dict) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """``{"id": ..., "image": FILE or [FILE, ...], "conversations": [{"from": "human", "value": ...}, ...]}``."""
    images = raw.get("image")
    if "image" not in raw and "images" in raw:
        raise Refusal("D-SCHEMA", "the key is spelled 'image', also for several images", key="images")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name.strip() for name in images):
        what = "must be a file name or a list of file names"
        raise Refusal("D-SCHEMA", what, key="image", found=repr(raw["image"])[:80])
    for key in ("video", "videos"):
        if raw.get(key) is not None:
            raise Refusal("D-VIDEO", "videos are not trained on", key=key, fix=WITHOUT_VIDEO)
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        what = "a record needs a list of turns that is not empty"
        found = "no such key" if "conversations" not in raw else json_type(turns) if turns != [] else "an empty list"
        raise Refusal("D-SCHEMA", what, key="conversations", found=found)
    for k, turn in enumerate(turns):
        key = f"conversations[{k}]"
        strings = isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("from", "value"))
        if not strings:
            what = "a turn must be an object with 'from' and 'value', both strings"
            found = f"keys {', '.join(turn)}" if isinstance(turn, dict) else json_type(turn)
            raise Refusal("D-SCHEMA", what, key=key, found=found)
        if turn["from"] not in ROLES:
            raise Refusal("D-ROLE", "unknown role", key=f"{key}.from", found=turn["from"], expected=" | ".join(ROLES))
        if not turn["value"].strip():
            raise Refusal("D-EMPTY", f"the {turn['from']} turn is empty", key=f"{key}.value")
    return tuple(images), tuple(Turn(turn["from"], turn["value"]) for turn in turns)


class Format(NamedTuple):
    """A record format.

    Attributes:
        recognises: whether an object is a record of this format; nothing in it is checked yet.
        read: its image names and turns; refusals need not name file and record, and no turn is empty.
        turns_key: the key of the turns, for messages.
    """

    recognises: Callable[[dict], bool]
    read: Callable[[dict], tuple[tuple[str, ...], tuple[Turn, ...]]]
    turns_key: str


LLAVA = Format(lambda raw: "conversations" in raw, read_llava, "conversations")
FORMATS = (LLAVA,)  # the first that recognises a record reads it; what none recognises is refused as LLaVA's


def _check_order(turns: tuple[Turn, ...], key: str) -> None:
    roles = [turn.role for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["human", "gpt"] * (len(body) // 2):
        expected = "an optional system turn, then human and gpt in turn, ending with gpt"
        raise Refusal(
            "D-ROLE", "the turns are not in order", key=key, found=", ".join(roles) or "no turns", expected=expected
        )


def _check_characters(*texts: str) -> None:
    for text in texts:
        if not text.isascii() and (match := _SURROGATE.search(text)):
            raise Refusal("D-UNICODE", "half of a surrogate pair is no character", found=match.group())


def _check_places(images: tuple[str, ...], questions: list[str]) -> None:
    """``<image>`` in the human turns against the images."""
    places = sum(text.count(IMAGE_TOKEN) for text in questions)
    if images and places != len(images):
        what = "the human turns have another number of <image> than the record has images"
        expected = f"{len(images)} for {len(images)} images"
        raise Refusal("D-IMAGES", what, found=f"{places} <image>", expected=expected)
    if not images and any(_IMAGE_LINE.search(text) for text in questions):
        what = "the record has a place for an image but no image"
        fix = "add the key 'image', or remove the <image> line"
        raise Refusal("D-IMAGES", what, found=f"{places} <image>, 0 images", fix=fix)
    if any(_VIDEO_LINE.search(text) for text in questions):
        what = "the record has a place for a video, and videos are not trained on"
        raise Refusal("D-VIDEO", what, found=VIDEO_TOKEN, fix=WITHOUT_VIDEO)
