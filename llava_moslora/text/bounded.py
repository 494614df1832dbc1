"""An end for a chat template that would not end: it is a program from a model's folder, with loops and macros.

Jinja's sandbox keeps it from files and from code, and limits one ``range``, but not nested loops.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STEPS = 2_000_000  # lines of Python; the longest published templates take some ten thousand for a conversation
CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
HUGE = re.compile(r"\*\*|\*[^{}]*?\d{5}|\d{8}")  # a power, a product or a number that could fill the memory in one step


class TooManySteps(ValueError):
    """The template was stopped."""


@contextmanager
def bounded_steps(limit: int = STEPS) -> Iterator[None]:
    """Raises :class:`TooManySteps` in this thread after ``limit`` lines of Python that run in templates."""
    left = limit
    before = sys.gettrace()

    def trace_lines(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooManySteps(f"stopped after {limit} steps")
        return trace_lines

    def trace_calls(frame: FrameType, event: str, argument: object) -> Any:
        return trace_lines if frame.f_code.co_filename == "<template>" else None

    sys.settrace(trace_calls)
    try:
        yield
    finally:
        sys.settrace(before)


def huge_number(template: str) -> str | None:
    """The first place in the code of ``template`` that computes a huge number or text at once, or None."""
    return next((found[0] for code in CODE.findall(template) if (found := HUGE.search(code))), None)
