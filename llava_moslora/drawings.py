"""Pieces of SVG figures for self-contained pages: ticks, lines, dots, the frame with its legend."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH = 1040  # of a figure, in pixels
# Okabe and Ito 2008: colour-blind safe
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a8a8a")
STYLE = """
svg { width: 100%; height: auto; } text { font-size: 12px; fill: currentColor; } figure { margin: 1em 0; }
.grid { stroke: var(--line); } .left { text-anchor: end; dominant-baseline: middle; } .below { text-anchor: middle; }
polyline { fill: none; stroke-width: 2; } figcaption span { margin-right: 1.2em; }
"""


def ticks_of(values: Sequence[float]) -> list[float]:
    """Round numbers from one below the smallest value to one above the largest, about six, at least two."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    spread = high - low if high - low > 1e-9 * size else size or 1.0  # equal but for rounding: around the value
    power = 10.0 ** math.floor(math.log10(spread / 5))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= spread / 5 * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)]


def segment(kind: str, x1: float, y1: float, x2: float, y2: float, colour: str = "") -> str:
    """A straight line; ``kind`` is its CSS class."""
    style = f' style="stroke:{colour}"' if colour else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{style}/>'


def line_through(points: Sequence[tuple[float, float]], colour: str, kind: str = "curve") -> str:
    """A line through ``points``, in pixels."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" style="stroke:{colour}" points="{places}"/>'


def dot(x: float, y: float, radius: float, colour: str, kind: str = "mean") -> str:
    """``kind`` is its CSS class."""
    return f'<circle class="{kind}" style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'


def label(kind: str, x: float, y: float, text: str) -> str:
    """``text`` is HTML; ``kind``: ``left`` of the place, or ``below`` it."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def legend_entry(name: str, colour: str) -> str:
    """``name`` is HTML."""
    return f'<span style="color:{colour}">● {name}</span>'


def figure(parts: Sequence[str], height: float, caption: str) -> str:
    """An SVG of ``parts`` with an HTML ``caption``."""
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"
