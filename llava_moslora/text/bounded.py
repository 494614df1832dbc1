"""Time and memory limits for chat templates, which are programs from a model's folder, with loops and macros.

Jinja's sandbox blocks access to files and code, and limits one ``range``, but not nested loops.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateError, nodes

STEPS = 2_000_000  # lines of Python; the longest published templates take some ten thousand for a conversation
SECONDS = 3.0  # of CPU time
MEMORY = 1 << 30  # bytes, above the process's current memory
MANY_DIGITS = re.compile(r"\d{8}")  # also in strings, which filters can convert to numbers
TRACKED = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tags, of no effect here


class TooManySteps(ValueError):
    """The template was stopped."""


@contextmanager
def bounded_steps(limit: int = STEPS) -> Iterator[None]:
    """Raises :class:`TooManySteps` in this thread after ``limit`` lines of Python that run in templates, or after
    :data:`SECONDS`, since a line may join long texts; MemoryError above :data:`MEMORY`."""
    left, end = limit, time.thread_time() + SECONDS
    before = sys.gettrace()

    def trace_lines(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooManySteps(f"stopped after {limit} steps")
        if time.thread_time() > end:
            raise TooManySteps(f"stopped after {SECONDS:g} seconds")
        return trace_lines

    def trace_calls(frame: FrameType, event: str, argument: object) -> Any:
        return trace_lines if frame.f_code.co_filename == "<template>" else None

    with _bounded_memory():
        sys.settrace(trace_calls)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: the other limits hold
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (mapped + MEMORY, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def huge_number(template: str) -> str | None:
    """An operation of ``template`` that could compute a huge number or text at once: a power, a product without a small
    constant, a number of many digits. None if there is none, or if it is not a template: rendering then says why."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(TRACKED.sub("", template))
        found = next(tree.find_all(nodes.Pow), None) or next((p for p in tree.find_all(nodes.Mul) if _grows(p)), None)
        if found is not None:
            return f"{found.operator} in line {found.lineno}"
        constants = (str(constant.value) for constant in tree.find_all(nodes.Const))
        return next((digits[0] for text in constants if (digits := MANY_DIGITS.search(text))), None)
    except TemplateError:
        return None
    except (RecursionError, MemoryError):
        return "brackets nested too deeply"


def _grows(product: nodes.BinExpr) -> bool:
    """Whether a product has no small constant factor: repeated, it would square a number or a text."""
    factors = (side.value for side in (product.left, product.right) if isinstance(side, nodes.Const))
    return not any(len(str(factor)) < 5 for factor in factors)
