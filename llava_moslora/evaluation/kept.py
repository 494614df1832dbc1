"""JSONL files of replies, appended as they arrive: a header, then a line for each; a kill loses at most the last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import naming
from llava_moslora.files.json import parse_json

Header = dict[str, Any]


def read_lines(file: Path, keys: Sequence[str]) -> tuple[Header | None, list[dict[str, str]]]:
    """The header and the values of ``keys`` in every further line, as text; an unfinished last line does not count.

    The header is None if even that line is incomplete.

    Raises:
        Refusal: C-ANSWERS, a line is damaged.
    """
    header: Header | None = None
    rows: list[dict[str, str]] = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1]):
        try:
            row = parse_json(line)
            if number == 0:
                header = dict(row["header"])
            else:
                rows.append({key: str(row[key]) for key in keys})
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(
                "C-ANSWERS", "a damaged line", file=file, record=number, found=line[:80].decode(errors="replace"),
                fix="delete the file: its questions are run again",
            ) from error  # fmt: skip
    return header, rows


def drop_unfinished(file: Path) -> None:
    """Remove a last line that a kill left unfinished."""
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def append(file: TextIO, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, and hand them to the system."""
    with naming(Path(file.name)):
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
