"""A row of a benchmark's file, and how its columns are read; without torch, as scoring and comparing need none."""

from __future__ import annotations

import ast

Row = dict[str, str]  # column → text, without the empty fields and without `image`
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # columns of options


def literal_list(text: str) -> list | None:
    """A Python list literal, as some columns hold it; None where ``text`` is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None
