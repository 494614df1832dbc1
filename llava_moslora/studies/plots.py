"""The figures of a study as SVG: differences with their intervals, and a measure against a flag."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_moslora import drawings
from llava_moslora.drawings import COLOURS, WIDTH, dot, figure, label, legend_entry, line_through, segment, ticks_of

LEFT, RIGHT, TOP, BOTTOM = 70, 14, 16, 40  # margins
HEIGHT, ROW, NAMES = 400, 30, 300  # of a curve; of a line of differences, and the width of its name

STYLE = f"""{drawings.STYLE}
.zero {{ stroke: currentColor; }} .name {{ dominant-baseline: middle; }} .seed {{ opacity: .45; }}
.bar {{ stroke-width: 2; }}
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
        parts.append(segment(kind, x(tick), TOP, x(tick), height - BOTTOM))
        parts.append(label("below", x(tick), height - BOTTOM + 18, f"{tick:g}"))
    for number, line in enumerate(lines):
        y, colour = TOP + ROW * (number + 0.5), COLOURS[0]
        parts.append(label("name", 0, y, html.escape(line.name)))
        parts.append(segment("bar", x(line.low), y, x(line.high), y, colour))
        parts += [dot(x(value), y + 7, 2.5, colour, "seed") for value in line.values]
        parts.append(dot(x(line.mean), y, 5, colour))
    return figure(parts, height, html.escape(caption))


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
        parts.append(segment("grid", LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        parts.append(label("left", LEFT - 8, y(tick), f"{tick:g}"))
    for place in places:
        parts.append(label("below", x(place), HEIGHT - BOTTOM + 18, f"{place:g}"))
    legend = [f"{html.escape(what)} against {html.escape(axis)}:"]
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        means = [(x(place), y(sum(seeds) / len(seeds))) for place, seeds in line.points if seeds]
        parts.append(line_through(means, colour))
        parts += [dot(left, top, 4, colour) for left, top in means]
        parts += [dot(x(place), y(value), 2.5, colour, "seed") for place, seeds in line.points for value in seeds]
        legend.append(legend_entry(html.escape(line.name), colour))
    return figure(parts, HEIGHT, " ".join(legend))
