"""The figures of a study as SVG: differences with their intervals, and a measure against a flag."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH = 1040  # of a drawing, in pixels
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 16, 40  # margins
HEIGHT, ROW, NAMES = 400, 30, 300  # of a curve; of a line of differences, and the width of its name
# Okabe and Ito 2008: colour-blind safe; of the arms, in order.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a8a8a")

STYLE = """
svg { width: 100%; height: auto; } text { font-size: 12px; fill: currentColor; } figure { margin: 1em 0; }
.grid { stroke: var(--line); } .zero { stroke: currentColor; } .left { text-anchor: end; dominant-baseline: middle; }
.below { text-anchor: middle; } .name { dominant-baseline: middle; } polyline { fill: none; stroke-width: 2; }
.seed { opacity: .45; } .bar { stroke-width: 2; } figcaption span { margin-right: 1.2em; }
"""


@dataclass(frozen=True)
class Interval:
    """A line of :func:`differences`: ``values`` are those of the seeds."""

    name: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """A line of :func:`curves`: at every place along the axis the values of the seeds."""

    name: str
    points: tuple[tuple[float, tuple[float, ...]], ...]


def differences(lines: Sequence[Interval], caption: str) -> str:
    """The mean difference with its interval, small dots for the seeds, and a line at 0."""
    if not lines:
        return ""
    ticks = ticks_of([0.0, *(x for line in lines for x in (line.low, line.high, *line.values))])
    height = TOP + ROW * len(lines) + BOTTOM

    def x(value: float) -> float:
        return NAMES + (WIDTH - NAMES - RIGHT) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(_segment(kind, x(tick), TOP, x(tick), height - BOTTOM))
        parts.append(f'<text class="below" x="{x(tick):.1f}" y="{height - BOTTOM + 18}">{tick:g}</text>')
    for number, line in enumerate(lines):
        y, colour = TOP + ROW * (number + 0.5), COLOURS[0]
        parts.append(f'<text class="name" x="0" y="{y:.1f}">{html.escape(line.name)}</text>')
        parts.append(_segment("bar", x(line.low), y, x(line.high), y, colour))
        parts += [_dot(x(value), y + 7, 2.5, colour, "seed") for value in line.values]
        parts.append(_dot(x(line.mean), y, 5, colour))
    return _figure(parts, height, html.escape(caption))


def curves(lines: Sequence[Line], axis: str, what: str, *, logarithmic: bool) -> str:
    """A measure against a flag: one line an arm through the means, a dot for every seed.

    Args:
        axis: the flag. what: the measure. logarithmic: the axis, where all its places are above 0.
    """
    values = [value for line in lines for _, seeds in line.points for value in seeds]
    places = sorted({place for line in lines for place, seeds in line.points if seeds})
    if not values or len(places) < 2:
        return ""
    scale: Callable[[float], float] = math.log if logarithmic and places[0] > 0 else float
    ticks = ticks_of(values)
    first, last = scale(places[0]), scale(places[-1])

    def x(place: float) -> float:
        return LEFT + 20 + (WIDTH - LEFT - RIGHT - 40) * (scale(place) - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        parts.append(_segment("grid", LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        parts.append(f'<text class="left" x="{LEFT - 8}" y="{y(tick):.1f}">{tick:g}</text>')
    for place in places:
        parts.append(f'<text class="below" x="{x(place):.1f}" y="{HEIGHT - BOTTOM + 18}">{place:g}</text>')
    legend = [f"{html.escape(what)} against {html.escape(axis)}:"]
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        means = [(x(place), y(sum(seeds) / len(seeds))) for place, seeds in line.points if seeds]
        through = " ".join(f"{left:.1f},{top:.1f}" for left, top in means)
        parts.append(f'<polyline style="stroke:{colour}" points="{through}"/>')
        parts += [_dot(left, top, 4, colour) for left, top in means]
        parts += [_dot(x(place), y(value), 2.5, colour, "seed") for place, seeds in line.points for value in seeds]
        legend.append(f'<span style="color:{colour}">● {html.escape(line.name)}</span>')
    return _figure(parts, HEIGHT, " ".join(legend))


def ticks_of(values: Sequence[float]) -> list[float]:
    """Round numbers from one below the smallest value to one above the largest, about six."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 5))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= spread / 5 * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float, colour: str = "") -> str:
    style = f' style="stroke:{colour}"' if colour else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{style}/>'


def _dot(x: float, y: float, radius: float, colour: str, kind: str = "mean") -> str:
    return f'<circle class="{kind}" style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _figure(parts: Sequence[str], height: int, caption: str) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"
