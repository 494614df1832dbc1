"""A strict streaming reader of a JSON array, or of JSON values one after the other (JSONL).

``json.load`` needs about 10 GB for an array of 1 GB; here a sliding window of the file is parsed. What ``json``
silently accepts (duplicate keys, ``NaN``) is reported with the value that contains it; anything that is not JSON is
refused with its line and column.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from llava_moslora.data.sources.container import CheckImage, Container, RawRecord, open_file, too_many_keys
from llava_moslora.errors import Refusal

WINDOW = 1 << 20  # characters read at once
LONGEST_VALUE = 64 << 20  # characters of one record; a longer one is a missing bracket or quote
EXPECTED = "a JSON array of records, or one record per line"
_SPACE = re.compile(r"[ \t\n\r]*")
_TYPES = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}


def json_type(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    return _TYPES.get(type(value), "null")


class Json(Container):
    """A JSON array of records, or a record per line; also reads files with any other suffix."""

    suffixes = (".json", ".jsonl", "")

    def read(self, file: str, check: CheckImage | None) -> Iterator[RawRecord]:
        with open_file(file) as content:
            stream = JsonStream(content, file)
            for value, problem in stream:
                yield RawRecord(value, problem, bytes_read=stream.bytes_read)


class JsonStream:
    """Iterates over ``(value, problem)``; ``problem`` is ``None`` or a phrase that says why it is not strict JSON.

    Args:
        file: the content.
        name: its name in refusals.

    Attributes:
        bytes_read: the position in the file.

    Raises:
        Refusal: D-PARSE (not JSON, truncated, nothing in it), D-ENC (not UTF-8), D-TYPE (not records at the top level).
    """

    def __init__(self, file: BinaryIO, name: str):
        self._file, self.name = file, name
        self._window = ""
        self._start = 0  # where the next value begins in the window
        self._lines = 0  # newlines before the window
        self._column = 0  # characters of the window's first line that were read before the window
        self.bytes_read = 0
        self._rest = b""  # bytes of an incomplete character
        self._problem: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def __iter__(self) -> Iterator[tuple[object, str | None]]:
        self._read_more()
        if not (first := self._peek()):
            raise Refusal("D-PARSE", "the file is empty", file=self.name, fix="copy or download it again")
        if first == "[":
            self._start += 1
            yield from self._array()
        elif first == "{":
            while self._peek():
                yield self._value()
        else:
            raise self._broken("the top level is neither an array nor one object per line", self._start, "D-TYPE")

    def _array(self) -> Iterator[tuple[object, str | None]]:
        if self._peek() == "]":
            self._start += 1
        else:
            while True:
                yield self._value()
                separator = self._peek()
                if not separator:
                    raise self._ended()
                if separator not in ",]":
                    raise self._broken("',' or ']' must follow a record", self._start)
                self._start += 1
                if separator == "]":
                    break
        if self._peek():
            raise self._broken("unexpected content after the end of the array", self._start)

    def _value(self) -> tuple[Any, str | None]:
        self._peek()
        while True:
            self._problem = None
            try:
                value, end = self._decoder.raw_decode(self._window, self._start)
            except RecursionError:
                raise self._broken("brackets are nested too deeply", self._start) from None
            except json.JSONDecodeError as error:
                # An error at the window's edge may only mean that the value continues after it.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._window) - 16
                if not cut:
                    raise self._broken(error.msg, error.pos) from None
                if len(self._window) - self._start > LONGEST_VALUE:
                    raise self._broken("a record does not end; a quote or a bracket is missing", self._start) from None
                position = error.pos - self._start  # the window is about to move
                if not self._read_more():
                    unfinished = position >= len(self._window.rstrip()) or error.msg.startswith("Unterminated string")
                    raise (self._ended() if unfinished else self._broken(error.msg, position)) from None
            else:
                # A number at the window's edge would be truncated, but numbers are not records and are refused anyway.
                self._start = end
                return value, self._problem or (too_many_keys(value) if isinstance(value, dict) else None)

    def _peek(self) -> str:
        """The next character that is not space, ``""`` at the end of the file."""
        while True:
            self._start = _SPACE.match(self._window, self._start).end()  # type: ignore[union-attr]  # it always matches
            if self._start < len(self._window):
                return self._window[self._start]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        """Drop what was parsed, read at least ``WINDOW`` and as much as is pending; returns whether there was more."""
        done = self._window[: self._start]
        if newlines := done.count("\n"):
            self._lines += newlines
            self._column = len(done) - done.rindex("\n") - 1
        else:
            self._column += len(done)
        pending = self._window[self._start :]
        data = self._file.read(max(WINDOW, len(pending), 4))  # 4: a complete byte order mark
        at = self.bytes_read - len(self._rest)  # the offset in the file of the first byte to decode
        first, self.bytes_read = self.bytes_read == 0, self.bytes_read + len(data)
        raw = self._rest + data
        if first and raw.startswith(codecs.BOM_UTF8):
            raw, at = raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        if first and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise Refusal("D-ENC", "the file is UTF-16", file=self.name, expected="UTF-8", fix="convert it to UTF-8")
        try:
            text, used = codecs.utf_8_decode(raw, "strict", not data)
        except UnicodeDecodeError as error:
            what, found = f"not UTF-8 at byte {at + error.start}", f"0x{raw[error.start]:02x}"
            raise Refusal("D-ENC", what, file=self.name, found=found, fix="convert the file to UTF-8") from None
        self._rest, self._window, self._start = raw[used:], pending + text, 0
        return bool(data)

    def _broken(self, what: str, position: int, code: str = "D-PARSE") -> Refusal:
        before = self._window[:position]
        newlines = before.count("\n")
        column = position - before.rindex("\n") if newlines else self._column + position + 1
        what = f"line {self._lines + newlines + 1} column {column}: {what[0].lower()}{what[1:]}"
        found = self._window[position : position + 30] or None
        fix = "correct the file there, or write it again"
        return Refusal(code, what, file=self.name, found=found, expected=EXPECTED, fix=fix)

    def _ended(self) -> Refusal:
        what = f"the file ends at byte {self.bytes_read} inside a record or array; probably an interrupted copy"
        return Refusal("D-PARSE", what, file=self.name, fix="copy or download it again")

    # What json accepts although it should not is noted, not raised, so that reading can continue after the record.

    def _object(self, pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            self._problem = f"the key {name[:100]!r} occurs twice in one object"
        return found

    def _constant(self, name: str) -> None:
        self._problem = f"{name} is not a JSON value"

    def _integer(self, digits: str) -> int:
        if len(digits) > 100:
            self._problem = f"a number of {len(digits)} digits"
            return 0
        return int(digits)
