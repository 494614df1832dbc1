"""Shared by the record formats: turns with roles, content parts, untrained turns, image names.

Nothing is downloaded or guessed: an image is a file name, and an unknown role, part or training mark is refused with
its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from llava_moslora.data.images import is_url
from llava_moslora.data.sources.json import json_type
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

Role = Literal["system", "human", "gpt"]
ROLES: dict[str, Role] = {"system": "system", "user": "human", "assistant": "gpt", "human": "human", "gpt": "gpt"}
TOOL_ROLES = ("tool", "tools", "tool_call", "tool_calls", "tool_response", "function", "function_call", "observation")
CALLS = ("tool_calls", "function_call")  # keys of a message that calls tools
MARKS = ("train", "loss", "weight")  # keys that say whether a turn is trained on
RARE = frozenset(CALLS + MARKS)  # hardly any turn has them: one lookup
FROM_VALUE, ROLE_CONTENT = ("from", "value"), ("role", "content")
MEND = "correct the record in the data file"
TOOLS = "tool calls are not supported"
WITHOUT_TOOLS = "remove the record, or write the call and its result as ordinary text of the turns"
WITHOUT_VIDEO = "remove the record, or save frames as images: a list under 'image', one <image> for each"
EMPTY: tuple = (None, "", [], "[]")  # values of columns that a record does not use


class Message(NamedTuple):
    """A turn, and the image at each of its ``<image>``: a name, or None for the next of the record's own images."""

    turn: Turn
    images: tuple[str | None, ...] = ()


def read_list(
    raw: dict, key: str, names: tuple[str, str] = ROLE_CONTENT, roles: Mapping[str, Role] = ROLES
) -> list[Message]:
    """The messages under ``key``, a list of objects.

    Args:
        names: the two keys of a message, of its role and its content.
        roles: the allowed values of the first.

    Raises:
        Refusal: D-SCHEMA, D-ROLE, D-EMPTY, D-IMAGES, D-VIDEO, I-PATH.
    """
    return [_read_message(message, f"{key}[{k}]", names, roles) for k, message in list_under(raw, key)]


def list_under(raw: dict, key: str) -> Iterator[tuple[int, Any]]:
    """The items of a non-empty list, numbered."""
    value = raw.get(key)
    if not isinstance(value, list) or not value:
        found = "no such key" if key not in raw else json_type(value) if value != [] else "an empty list"
        what, fix = "a record needs a non-empty list of turns", "write its turns, or remove the record"
        raise Refusal("D-SCHEMA", what, key=key, found=found, fix=fix)
    return enumerate(value)


def said(role: Role, text: object, key: str, trained: bool = True) -> Message:
    """A turn that is a plain string; each ``<image>`` in a human turn stands for one of the record's images."""
    if not isinstance(text, str):
        raise Refusal("D-SCHEMA", "must be a string", key=key, found=json_type(text), fix=MEND)
    if not text.strip():
        found = "an empty text" if not text else "only white space"
        raise Refusal("D-EMPTY", f"the {role} turn is empty", key=key, found=found, fix=f"{MEND}, or remove it")
    return Message(Turn(role, text, trained), (None,) * text.count(IMAGE_TOKEN) if role == "human" else ())


def _read_message(message: object, key: str, names: tuple[str, str], roles: Mapping[str, Role]) -> Message:
    name, content = names
    given = message if isinstance(message, dict) else {}
    is_plain = RARE.isdisjoint(given)
    call = None if is_plain else next((call for call in CALLS if given.get(call) not in EMPTY), None)
    if call or given.get(name) in TOOL_ROLES:
        found = call or given[name]
        raise Refusal("D-ROLE", TOOLS, key=key, found=found, fix=WITHOUT_TOOLS)
    text, images = given.get(content), None
    if not isinstance(given.get(name), str) or not isinstance(text, (str, list)):
        what = f"a turn must be an object with '{name}', a string, and '{content}', a string or a list of parts"
        found = f"keys {', '.join(given)}" if isinstance(message, dict) else json_type(message)
        raise Refusal("D-SCHEMA", what, key=key, found=found, fix=MEND)
    if (role := roles.get(given[name])) is None:
        expected, fix = " | ".join(roles), "rename the speaker, or leave the record out"
        raise Refusal("D-ROLE", "unknown role", key=f"{key}.{name}", found=given[name], expected=expected, fix=fix)
    if isinstance(text, list):
        text, images = _join_parts(text, f"{key}.{content}", role)
    read = said(role, text, f"{key}.{content}", trained=is_plain or _is_trained(given, key, role))
    return read if images is None else read._replace(images=images)


def _is_trained(message: dict, key: str, role: Role) -> bool:
    """Whether a turn is trained according to its marks; without marks it is."""
    marks = {name: message[name] for name in MARKS if message.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Refusal(
                "D-SCHEMA", "a turn is either trained on or not", key=f"{key}.{name}", found=repr(value)[:80],
                expected="true | false | 1 | 0", fix=MEND,
            )  # fmt: skip
        if value and role != "gpt":
            what, fix = "only the assistant's turns can be trained", f"remove '{name}', or write false"
            raise Refusal("D-SCHEMA", what, key=f"{key}.{name}", found=f"{value!r} of a {role} turn", fix=fix)
    if len(set(map(bool, marks.values()))) > 1:
        found = ", ".join(f"{name} {value}" for name, value in marks.items())
        raise Refusal("D-SCHEMA", "two marks that disagree", key=key, found=found, fix="keep one")
    return all(marks.values())


def _join_parts(parts: list, key: str, role: Role) -> tuple[str, tuple[str | None, ...]]:
    """Content parts, each on its own line, as in the chat templates of exports; and the images at ``<image>``."""
    texts: list[str] = []
    images: list[str | None] = []
    for k, part in enumerate(parts):
        place, kind = f"{key}[{k}]", part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
            images += [None] * texts[-1].count(IMAGE_TOKEN)
        elif kind in ("image", "image_url"):
            if role != "human":
                what, found, fix = "an image outside of user turns", f"a {role} turn", "move it to a user turn"
                raise Refusal("D-IMAGES", what, key=place, found=found, fix=fix)
            texts.append(IMAGE_TOKEN)
            images.append(_image_of_part(part, place))
        elif kind in ("video", "video_url"):
            raise Refusal("D-VIDEO", "videos are not supported", key=place, fix=WITHOUT_VIDEO)
        else:
            found = f"type {kind}" if isinstance(kind, str) else json_type(part)
            expected = '{"type": "text", "text": ...} | {"type": "image"} | {"type": "image_url", "image_url": ...}'
            raise Refusal("D-SCHEMA", "not a content part", key=place, found=found, expected=expected, fix=MEND)
    return "\n".join(texts), tuple(images) if role == "human" else ()


def _image_of_part(part: dict, key: str) -> str | None:
    for name in ("image", "image_url", "path", "url"):
        value = part.get(name)
        if isinstance(value, dict) and name == "image_url":
            value = value.get("url", "")
        if value is not None:
            return _image_name(value, f"{key}.{name}")
    return None


def _image_name(value: object, key: str) -> str:
    """A file name, or the ``path`` of an object as ``datasets`` writes it."""
    name = value.get("path") if isinstance(value, dict) else value
    if not isinstance(name, str) or not name.strip():
        what = "must be a file name or a list of file names"
        raise Refusal("D-SCHEMA", what, key=key, found=repr(value)[:80], fix=MEND)
    if is_url(name):
        what, fix = "images are read from files, never from a URL", "save it as a file and write the file's name"
        raise Refusal("I-PATH", what, key=key, found=name, fix=fix)
    return name


def _images_of(raw: dict) -> list[str]:
    """The names under ``image`` or ``images``, one or a list."""
    given = [key for key in ("image", "images") if raw.get(key) not in (None, [])]
    if len(given) > 1:
        found, fix = " and ".join(given), "keep one of them"
        raise Refusal("D-SCHEMA", "images under two keys", key="image, images", found=found, fix=fix)
    if not given:
        return []
    value = raw[given[0]]
    return [_image_name(one, given[0]) for one in (value if isinstance(value, list) else [value])]


def images_and_turns(
    raw: dict, messages: Sequence[Message], *, in_front: bool = False
) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """A record's image names and turns, from its messages and its columns ``image`` or ``images`` and ``system``.

    Args:
        in_front: if no message has an image placeholder, the record's images go before the first human turn.

    Raises:
        Refusal: D-SCHEMA, D-ROLE, D-VIDEO, I-PATH.
    """
    for key in ("video", "videos"):
        if raw.get(key) not in EMPTY:
            raise Refusal("D-VIDEO", "videos are not supported", key=key, fix=WITHOUT_VIDEO)
    if raw.get("tools") not in EMPTY:
        raise Refusal("D-ROLE", TOOLS, key="tools", found=json_type(raw["tools"]), fix=WITHOUT_TOOLS)
    turns = [message.turn for message in messages]
    if raw.get("system") not in EMPTY:
        if turns[0].role == "system":
            what, found, fix = "two system texts", "the key and a turn", "keep one of them"
            raise Refusal("D-ROLE", what, key="system", found=found, fix=fix)
        turns.insert(0, said("system", raw["system"], "system").turn)
    own = _images_of(raw)
    places = [image for message in messages for image in message.images]
    if in_front and not places:
        first = next((k for k, turn in enumerate(turns) if turn.role == "human"), None)
        if own and first is not None:
            turns[first] = replace(turns[first], text=f"{IMAGE_TOKEN}\n" * len(own) + turns[first].text)
        return tuple(own), tuple(turns)
    waiting = iter(own)
    images = [next(waiting, None) if image is None else image for image in places]
    return (*(image for image in images if image is not None), *waiting), tuple(turns)
