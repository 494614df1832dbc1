"""Strict parsing of external JSON: what parsers disagree about, or what no valid file has, is an error."""

from __future__ import annotations

import json
import re
from typing import Any

LARGEST = 256 << 20  # bytes; a tokenizer of 250,000 tokens has 30 MB
LARGEST_CONFIG = 1 << 20  # of a file of settings, which libraries read slowly; real ones have some kB
DEEPEST = 100  # levels of brackets; Python's own limit depends on who calls
DIGITS = 40  # of a whole number; transformers writes 10**30 for "no limit"
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # where a lone surrogate may be


def parse_json(content: bytes | str, *, finite: bool = True, largest: int = LARGEST) -> Any:
    """Parse ``content``, in UTF-8 with or without a byte order mark.

    Args:
        finite: False: NaN and Infinity are read, which Python's own writer leaves in logs.
        largest: size in bytes.

    Raises:
        ValueError: with the reason in one line: not UTF-8, not JSON, truncated, a duplicate key, NaN, a number out of
            range, a lone surrogate, too large, nested too deeply. Nothing else is raised.
    """
    if len(content) > largest:
        raise ValueError(f"{len(content)} bytes, of at most {largest}")
    raw = content if isinstance(content, bytes) else content.encode()
    numbers: dict[str, Any] = {"parse_constant": _not_finite, "parse_float": _number} if finite else {}
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_int=_whole_number, **numbers)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    if isinstance(value, dict | list):
        _check_depth(value)
    if HALF.search(raw):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} occurs twice in one object")
    return found


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"brackets are nested more than {DEEPEST} deep")
