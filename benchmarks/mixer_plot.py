"""The plot of benchmarks/mixer.py: for each task, loss against learning rate, and the differences from LoRA.

Drawn with Pillow in twice the size and scaled down.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito 2008: colour-blind safe.
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73")
INK, GREY, LINE, PAPER = "#222222", "#6b6b6b", "#d8d8d8", "#ffffff"
# In pixels of the picture
WIDTH, ROW, TOP, OVERSAMPLING = 1400, 520, 90, 2
Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]


class Panel:
    """A frame with axes: values → pixels."""

    def __init__(self, canvas: Canvas, box: Box, x: tuple[float, float], y: tuple[float, float]):
        self.canvas, self.box, self.x, self.y = canvas, box, x, y

    def at(self, x: float, y: float) -> Point:
        left, top, right, bottom = self.box
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)


class Canvas:
    """Lines, dots and text in pixels of the picture."""

    def __init__(self, height: int):
        self.large = Image.new("RGB", (WIDTH * OVERSAMPLING, height * OVERSAMPLING), PAPER)
        self.draw = ImageDraw.Draw(self.large)

    def line(self, begin: Point, end: Point, colour: str, width: float = 1.0) -> None:
        points = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in (begin, end)]
        self.draw.line(points, colour, round(width * OVERSAMPLING))

    def dot(self, at: Point, radius: float, colour: str) -> None:
        self.draw.circle((at[0] * OVERSAMPLING, at[1] * OVERSAMPLING), radius * OVERSAMPLING, colour)

    def text(self, at: Point, text: str, size: int, colour: str = INK, anchor: str = "mm") -> None:
        font = ImageFont.load_default(size * OVERSAMPLING)
        self.draw.text((at[0] * OVERSAMPLING, at[1] * OVERSAMPLING), text, colour, font, anchor)


def draw(tasks: dict[str, dict], file: Path) -> None:
    """Write the picture of ``tasks``, task → what :func:`mixer_report.report_of` gives."""
    canvas = Canvas(TOP + ROW * len(tasks))
    arms = list(next(iter(tasks.values()))["arms"])
    for number, arm in enumerate(arms):
        x = 70 + number * 220
        canvas.line((x, 40), (x + 26, 40), COLOURS[number], 3)
        canvas.dot((x + 13, 40), 5, COLOURS[number])
        canvas.text((x + 34, 40), arm, 17, anchor="lm")
    for number, (task, report) in enumerate(tasks.items()):
        top = TOP + ROW * number
        draw_curves(canvas, (90, top + 40, 670, top + ROW - 80), task, report["arms"])
        draw_differences(canvas, (930, top + 40, 1370, top + ROW - 80), task, report)
    canvas.large.reduce(OVERSAMPLING).save(file, optimize=True)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, four to eight of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) < 8)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_curves(canvas: Canvas, box: Box, task: str, arms: dict[str, dict]) -> None:
    """Validation loss against the adapters' learning rate: a line through the means, a dot for each tuning seed.

    The worst third of the means would hide the differences between the others: lines are cut off at the frame.
    """
    points = [(math.log2(p["rate"]), p["mean"]) for row in arms.values() for p in row["curve"] if p["mean"] is not None]
    losses = sorted(loss for _, loss in points)
    best, cut = losses[0], losses[round(0.66 * (len(losses) - 1))]
    low, high = best - 0.08 * (cut - best) - 1e-3, cut + 0.15 * (cut - best) + 1e-3
    rates = sorted({rate for rate, _ in points})
    panel = Panel(canvas, box, (rates[0] - 0.3, rates[-1] + 0.3), (low, high))
    canvas.text((box[0], box[1] - 24), f"{task}: validation loss against learning rate", 19, anchor="lm")
    for value in ticks(low, high):
        canvas.line(panel.at(panel.x[0], value), panel.at(panel.x[1], value), LINE)
        canvas.text((box[0] - 10, panel.at(0, value)[1]), f"{value:.4g}", 15, GREY, "rm")
    for rate in rates:
        canvas.text((panel.at(rate, low)[0], box[3] + 18), f"{2**rate:.2g}", 15, GREY)
    canvas.text(((box[0] + box[2]) / 2, box[3] + 46), "adapters' learning rate (circle: chosen)", 15, GREY)
    for colour, row in zip(COLOURS, arms.values(), strict=False):
        known = [(math.log2(p["rate"]), p) for p in row["curve"] if p["mean"] is not None]
        for (x, p), (next_x, next_p) in pairwise(known):
            begin, end = cut_line((x, p["mean"]), (next_x, next_p["mean"]), high)
            if begin != end:
                canvas.line(panel.at(*begin), panel.at(*end), colour, 2.5)
        for x, p in known:
            for loss in (loss for loss in p["losses"] if low <= loss <= high):
                canvas.dot(panel.at(x, loss), 2.5, colour)
            if p["rate"] == row["rate"]:
                canvas.dot(panel.at(x, p["mean"]), 7, colour)
                canvas.dot(panel.at(x, p["mean"]), 3, PAPER)


def cut_line(begin: Point, end: Point, high: float) -> tuple[Point, Point]:
    """The part of a line that is not above ``high``; a point where all of it is."""
    if begin[1] > high and end[1] > high:
        return begin, begin
    if begin[1] <= high and end[1] <= high:
        return begin, end
    share = (high - begin[1]) / (end[1] - begin[1])
    middle = (begin[0] + share * (end[0] - begin[0]), high)
    return (begin, middle) if begin[1] <= high else (middle, end)


def draw_differences(canvas: Canvas, box: Box, task: str, report: dict) -> None:
    """A row for each arm: a dot for each seed's difference to LoRA, the mean and its 95 % interval; a line at 0."""
    baseline = list(report["arms"]["lora"]["loss_by_seed"].values())
    rows = [(n, arm, row) for n, (arm, row) in enumerate(report["arms"].items()) if row.get("interval")]
    by_seed = {
        arm: [a - b for a, b in zip(row["loss_by_seed"].values(), baseline, strict=True)] for _, arm, row in rows
    }
    values = [0.0, *(value for found in by_seed.values() for value in found)]
    values += [end for _, _, row in rows for end in row["interval"]]
    margin = 0.06 * (max(values) - min(values)) + 1e-4
    panel = Panel(canvas, box, (min(values) - margin, max(values) + margin), (-len(rows) + 0.5, 0.5))
    title = f"{task}: test loss minus LoRA's, {len(report['seeds'])} seeds, 95 % interval"
    canvas.text((box[0] - 190, box[1] - 24), title, 19, anchor="lm")
    for value in ticks(*panel.x):
        canvas.line((panel.at(value, 0)[0], box[1]), (panel.at(value, 0)[0], box[3]), LINE)
        canvas.text((panel.at(value, 0)[0], box[3] + 18), f"{value:.3g}", 15, GREY)
    canvas.line((panel.at(0, 0)[0], box[1]), (panel.at(0, 0)[0], box[3]), INK, 1.5)
    canvas.text(((box[0] + box[2]) / 2, box[3] + 46), "left of 0: better than LoRA", 15, GREY)
    for place, (number, arm, row) in enumerate(rows):
        canvas.text((box[0] - 14, panel.at(0, -place)[1]), arm, 17, anchor="rm")
        for value in by_seed[arm]:
            canvas.dot(panel.at(value, -place - 0.22), 2.5, COLOURS[number])
        canvas.line(panel.at(row["interval"][0], -place), panel.at(row["interval"][1], -place), COLOURS[number], 3)
        canvas.dot(panel.at(row["difference"], -place), 6, COLOURS[number])
