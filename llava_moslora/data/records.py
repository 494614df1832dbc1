"""LLaVA-format records, checked one by one as they stream in.

A record is ``{"id": ..., "image": FILE or [FILE, ...], "conversations": [{"from": "human", "value": ...}, ...]}``.
Nothing is repaired and nothing is skipped in silence: a record that cannot be trained on is refused by index and id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_moslora.data.sources.json import JsonStream, json_type
from llava_moslora.data.sources.parquet import ParquetStream
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

ROLES = ("system", "human", "gpt")
WITHOUT_VIDEO = "take the record out, or save frames as images: a list under 'image', one <image> for each"
_SURROGATE = re.compile("[\ud800-\udfff]")
# In a record without images, <image> inside a sentence is text (somebody writes about HTML); on a line's edge of its
# own at the start or end of a turn it is what LLaVA writes for an image, and the image is missing.
_IMAGE_PLACE = re.compile(rf"\A\s*{IMAGE_TOKEN}\s*(\n|\Z)|\n\s*{IMAGE_TOKEN}\s*\Z")
VIDEO_TOKEN = "<video>"
_VIDEO_PLACE = re.compile(_IMAGE_PLACE.pattern.replace(IMAGE_TOKEN, VIDEO_TOKEN))


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


def open_stream(path: str | Path) -> JsonStream | ParquetStream:
    """The raw records of a file, by its suffix: ``.parquet``, or else a JSON array or JSONL."""
    return ParquetStream(path) if Path(path).suffix == ".parquet" else JsonStream(path)


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a JSON array, JSONL or Parquet file, in order; memory does not grow with the file.

    Raises:
        Refusal: at the first record that breaks a rule (D-...), or where the file cannot be read (D-PARSE, D-ENC).
    """
    for index, (raw, problem) in enumerate(open_stream(path)):
        yield check_record(raw, index, path, problem)


def check_record(raw: object, index: int, file: str | Path, problem: str | None = None) -> Record:
    """``raw`` as a :class:`Record`.

    Args:
        problem: what the JSON reader noticed about this value.

    Raises:
        Refusal: D-TYPE, D-JSON, D-SCHEMA, D-ROLE, D-EMPTY, D-IMAGES, D-VIDEO or D-UNICODE, with file, index and id.
    """
    own = raw.get("id") if isinstance(raw, dict) else None

    def refusal(code: str, what: str, **parts: object) -> Refusal:
        return Refusal(code, what, file=file, record=index, record_id=own, **parts)

    if problem is not None:
        raise refusal("D-JSON", problem)
    if not isinstance(raw, dict):
        raise refusal("D-TYPE", "a record must be an object", found=json_type(raw))
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int)):
        raise refusal("D-SCHEMA", "must be a string or a number", key="id", found=json_type(own))
    images = raw.get("image")
    if "image" not in raw and "images" in raw:
        raise refusal("D-SCHEMA", "the key is spelled 'image', also for several images", key="images")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name.strip() for name in images):
        raise refusal(
            "D-SCHEMA", "must be a file name or a list of file names", key="image", found=repr(raw["image"])[:80]
        )
    if raw.get("video") is not None or raw.get("videos") is not None:
        raise refusal(
            "D-VIDEO", "videos are not trained on", key="video" if "video" in raw else "videos", fix=WITHOUT_VIDEO
        )
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        what = "a record needs a list of turns that is not empty"
        found = "no such key" if "conversations" not in raw else json_type(turns) if turns != [] else "an empty list"
        raise refusal("D-SCHEMA", what, key="conversations", found=found)
    for k, turn in enumerate(turns):
        key = f"conversations[{k}]"
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("from"), str)
            or not isinstance(turn.get("value"), str)
        ):
            found = f"keys {', '.join(turn)}" if isinstance(turn, dict) else json_type(turn)
            raise refusal(
                "D-SCHEMA", "a turn must be an object with 'from' and 'value', both strings", key=key, found=found
            )
        if turn["from"] not in ROLES:
            raise refusal("D-ROLE", "unknown role", key=f"{key}.from", found=turn["from"], expected=" | ".join(ROLES))
        if not turn["value"].strip():
            raise refusal("D-EMPTY", f"the {turn['from']} turn is empty", key=f"{key}.value")
    roles = [turn["from"] for turn in turns]
    body = roles[1:] if roles[0] == "system" else roles
    if not body or body != ["human", "gpt"] * (len(body) // 2):
        raise refusal(
            "D-ROLE",
            "the turns are not in order",
            key="conversations",
            found=", ".join(roles),
            expected="an optional system turn, then human and gpt in turn, ending with gpt",
        )
    for text in (str(own), *images, *(turn["value"] for turn in turns)):
        if not text.isascii() and (match := _SURROGATE.search(text)):
            raise refusal("D-UNICODE", "half of a surrogate pair is no character", found=match.group())
    human = [turn["value"] for turn in turns if turn["from"] == "human"]
    places = sum(text.count(IMAGE_TOKEN) for text in human)
    if images and places != len(images):
        raise refusal(
            "D-IMAGES",
            "the human turns have another number of <image> than the record has images",
            found=f"{places} <image>",
            expected=f"{len(images)} for {len(images)} images",
        )
    if not images and any(_IMAGE_PLACE.search(text) for text in human):
        raise refusal(
            "D-IMAGES",
            "the record has a place for an image but no image",
            found=f"{places} <image>, 0 images",
            fix="add the key 'image', or take the <image> line out",
        )
    if any(_VIDEO_PLACE.search(text) for text in human):
        what = "the record has a place for a video, and videos are not trained on"
        raise refusal("D-VIDEO", what, found=VIDEO_TOKEN, fix=WITHOUT_VIDEO)
    return Record(
        index, "" if own is None else str(own), tuple(images), tuple(Turn(t["from"], t["value"]) for t in turns)
    )
