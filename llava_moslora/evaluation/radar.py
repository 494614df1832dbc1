"""The paper's Figure 5: six abilities of MMBench in Chinese and in English as twelve axes, a curve for each model.

Percentages of questions by default. The figure of the paper is normalised, its ticks end at 1.00: every axis is divided
by the best of its models, as far as one can tell. Drawn with Pillow in three times the size and scaled down.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, cos, floor, radians, sin
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import ABILITIES
from llava_moslora.evaluation.results import Result, check_comparable
from llava_moslora.files.disk import replace_file

RADAR = "radar.png"
SETS = {"mmbench_cn": "CN", "mmbench_en": "EN"}  # benchmark → its name in the figure, in order
ABILITY = "l2-category"  # the column of MMBench's files that has them
# Okabe and Ito 2008: colour-blind safe.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
INK, GREY, LINE, PAPER = "#222222", "#6b6b6b", "#d0d0d0", "#ffffff"

# All in pixels of the picture; it is drawn OVERSAMPLING times as large.
WIDTH, HEIGHT, OVERSAMPLING = 1400, 1030, 3  # without the legend
CENTRE, RADIUS = (700, 535), 375
MARGIN, LEGEND_LINE, LONGEST_NAME = 40, 34, 60


@dataclass(frozen=True)
class Axis:
    """One ability in one language; ``title`` has a line for each of its parts."""

    title: tuple[str, ...]
    questions: int

    @property
    def label(self) -> str:
        return f"{' '.join(self.title)}, {self.questions:,} questions"


@dataclass(frozen=True)
class Radar:
    """Twelve axes, and for every curve its name and its value on each: percent, of questions or of the best model."""

    axes: tuple[Axis, ...]
    curves: tuple[tuple[str, tuple[float, ...]], ...]
    normalised: bool = False

    @property
    def text(self) -> str:
        """The picture in words, a line for each axis; it is in the file too."""
        values = zip(*(values for _, values in self.curves), strict=True)
        names = [name for name, _ in self.curves]
        return "\n".join(
            f"{axis.label}: " + ", ".join(f"{name} {value:.1f}" for name, value in zip(names, at, strict=True))
            for axis, at in zip(self.axes, values, strict=True)
        )


def lacking(results: Mapping[str, Result]) -> str:
    """The reason why these results have no radar chart; "" if they have one."""
    for name in SETS:
        if name not in results:
            return f"{name} was not evaluated"
        score = results[name].score
        if ABILITY in score.by and ABILITY not in score.counts:
            return f"{name} was scored before questions were counted by ability; scoring it again loads no model"
        counts = score.counts.get(ABILITY, {})
        if missing := [ability for ability in ABILITIES if not counts.get(ability)]:
            return f"{name} has no question of {', '.join(missing)}"
    return ""


def radar_of(models: Sequence[tuple[str, Mapping[str, Result]]], *, normalise: bool = False) -> Radar:
    """The picture of one or several models, whose names the legend shows.

    Args:
        normalise: every axis is divided by the best model's value.

    Raises:
        Refusal: C-RADAR, a set or an ability is missing, too many models to tell apart, or an axis without one right
            answer cannot be normalised; C-COMPARE, not asked the same questions in the same way.
    """
    if len(models) > len(COLOURS):
        found, expected = len(models), f"at most {len(COLOURS)}"
        raise Refusal("C-RADAR", "too many models to tell apart", key="--radar", found=found, expected=expected)
    for name, results in models:
        if reason := lacking(results):
            raise Refusal(
                "C-RADAR", "no radar chart can be drawn", file=name, key="--radar", found=reason,
                fix="evaluate it with --benchmark mmbench_en,mmbench_cn",
            )  # fmt: skip
    scores = [{name: results[name] for name in SETS} for _, results in models]
    for other in scores[1:]:
        check_comparable(scores[0], other)
    for name in SETS:
        if len(rules := sorted({score[name].score.rules for score in scores})) > 1:
            raise Refusal(
                "C-COMPARE", "scored by different rules", key=name, found=" and ".join(rules),
                fix="score all by the same --rules: the answers are kept",
            )  # fmt: skip
    axes = tuple(
        Axis((f"{language} {title}", *rest), scores[0][name].score.counts[ABILITY][ability])
        for name, language in SETS.items()
        for ability, (title, *rest) in (
            (key, title.replace(" (", "\n(").split("\n")) for key, title in ABILITIES.items()
        )
    )
    values = [[score[name].score.by[ABILITY][ability] for name in SETS for ability in ABILITIES] for score in scores]
    if normalise:
        best = [max(at) for at in zip(*values, strict=True)]
        if 0 in best:
            raise Refusal(
                "C-RADAR", "nothing to normalise by: no model answers one question right", key="--normalise",
                found=axes[best.index(0)].label, fix="omit --normalise",
            )  # fmt: skip
        values = [[100 * value / most for value, most in zip(row, best, strict=True)] for row in values]
    curves = tuple((name, tuple(row)) for (name, _), row in zip(models, values, strict=True))
    return Radar(axes, curves, normalise)


def write_radar(file: Path, radar: Radar) -> None:
    """Write the picture as PNG, with its values as text inside."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("Description", radar.text)
    draw(radar).save(buffer, "PNG", pnginfo=info, optimize=True)
    replace_file(file, buffer.getbuffer())


def rings_of(values: Sequence[float]) -> list[float]:
    """Values of the rings, from the centre's on: at most six, round numbers, and no curve falls into the centre."""
    low, high = min(values), max(values)
    for step in (1, 2, 5, 10):
        first, last = _span(low, high, step)
        if last - first <= 5 * step:
            return [first + step * k for k in range((last - first) // step + 1)]
    first, last = _span(low, high, 20)
    return [float(value) for value in range(first, last + 1, 20)]


def _span(low: float, high: float, step: int) -> tuple[int, int]:
    first = step * floor(low / step)
    if low - first < step / 2:
        first = max(0, first - step)
    return first, max(step * ceil(high / step), first + step)


def point(axis: int, share: float) -> tuple[float, float]:
    """Where ``share`` of the radius is on an axis, in pixels: the Chinese ones on the right, from the top down, the
    English ones on the left, from the bottom up."""
    angle = radians(360 / (2 * len(ABILITIES)) * (axis + 0.5))
    return CENTRE[0] + share * RADIUS * sin(angle), CENTRE[1] - share * RADIUS * cos(angle)


def draw(radar: Radar) -> Image.Image:
    """The picture, ``WIDTH`` pixels wide; the legend's lines make it higher."""
    legend = _legend_lines([name for name, _ in radar.curves])
    height = HEIGHT + LEGEND_LINE * len(legend)
    canvas = _Canvas(height)
    what = "relative to the best model on each axis" if radar.normalised else "questions right in every rotation"
    canvas.text((WIDTH / 2, MARGIN), f"MMBench by ability: {what}, %", 28, INK, "mm")
    rings = rings_of([value for _, values in radar.curves for value in values])
    _draw_grid(canvas, radar, rings)
    for number, (_, values) in enumerate(radar.curves):
        points = [point(axis, (v - rings[0]) / (rings[-1] - rings[0])) for axis, v in enumerate(values)]
        size = 7.0 - 0.6 * number  # where curves meet, a rim of the earlier one is seen
        for begin, end in pairwise([*points, points[0]]):
            canvas.line(begin, end, COLOURS[number], max(2.5, 4.5 - 0.5 * number))
        for at in points:
            canvas.dot(at, size, COLOURS[number])
    for ring in rings[1:]:  # between the last axis and the first, where no curve has a point
        share = (ring - rings[0]) / (rings[-1] - rings[0])
        canvas.text((CENTRE[0], point(0, share)[1]), f"{ring:g}", 17, GREY, "mm", halo=3)
    for row, line in enumerate(legend):
        for number, name, x in line:
            y = HEIGHT + LEGEND_LINE * row - MARGIN / 2
            canvas.line((x, y), (x + 34, y), COLOURS[number], 4.5)
            canvas.dot((x + 17, y), 7, COLOURS[number])
            canvas.text((x + 46, y), name, 20, INK, "lm")
    note = f"The centre is {rings[0]:g} %, not 0." if rings[0] else "The centre is 0 %."
    canvas.text((WIDTH / 2, height - MARGIN / 2), note, 16, GREY, "mm")
    return canvas.image()


def _draw_grid(canvas: _Canvas, radar: Radar, rings: Sequence[float]) -> None:
    axes = range(len(radar.axes))
    for ring in rings[1:]:
        corners = [point(axis, (ring - rings[0]) / (rings[-1] - rings[0])) for axis in axes]
        for begin, end in pairwise([*corners, corners[0]]):
            canvas.line(begin, end, LINE, 1.5)
    for axis in axes:
        canvas.line(CENTRE, point(axis, 1), LINE, 1.5)
    for axis in axes:
        x, y = point(axis, 1 + 20 / RADIUS)
        lines = [(line, 20, INK) for line in radar.axes[axis].title]
        lines.append((f"{radar.axes[axis].questions:,} questions", 16, GREY))
        tall = 25 * len(lines)
        y += tall / 2 * ((y - CENTRE[1]) / RADIUS)  # at the top the text ends here, at the bottom it begins
        for number, (line, size, colour) in enumerate(lines):
            anchor = "lm" if x > CENTRE[0] else "rm"
            canvas.text((x, y - tall / 2 + 25 * (number + 0.5)), line, size, colour, anchor)


def _legend_lines(names: Sequence[str]) -> list[list[tuple[int, str, float]]]:
    """Number, name and left edge of the entries in every line of the legend, each line centred."""
    shown = [name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}" for name in names]
    wide = [46 + ImageFont.load_default(20).getlength(name) + 36 for name in shown]
    lines: list[list[int]] = [[]]
    for number in range(len(names)):
        if lines[-1] and sum(wide[n] for n in (*lines[-1], number)) > WIDTH - 2 * MARGIN:
            lines.append([])
        lines[-1].append(number)
    placed = []
    for line in lines:
        left = (WIDTH - sum(wide[n] for n in line) + 36) / 2
        placed.append([(n, shown[n], left + sum(wide[m] for m in line if m < n)) for n in line])
    return placed


class _Canvas:
    """Lines, dots and text in pixels of the picture, drawn ``OVERSAMPLING`` times as large."""

    def __init__(self, height: int):
        self.large = Image.new("RGB", (WIDTH * OVERSAMPLING, height * OVERSAMPLING), PAPER)
        self.draw = ImageDraw.Draw(self.large)

    def image(self) -> Image.Image:
        return self.large.reduce(OVERSAMPLING)

    def line(self, begin: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
        self.draw.line([_large(begin), _large(end)], colour, round(width * OVERSAMPLING))

    def dot(self, at: tuple[float, float], radius: float, colour: str) -> None:
        self.draw.circle(_large(at), radius * OVERSAMPLING, colour)

    def text(self, at: tuple[float, float], text: str, size: int, colour: str, anchor: str, *, halo: float = 0) -> None:
        """``anchor`` as Pillow's; ``halo``: width of a rim in the colour of the paper."""
        font = ImageFont.load_default(size * OVERSAMPLING)
        self.draw.text(
            _large(at), text, colour, font, anchor, stroke_width=round(halo * OVERSAMPLING), stroke_fill=PAPER
        )


def _large(at: tuple[float, float]) -> tuple[float, float]:
    return at[0] * OVERSAMPLING, at[1] * OVERSAMPLING
