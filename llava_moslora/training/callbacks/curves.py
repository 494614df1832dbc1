"""The curves of a run as one page: training loss, validation losses, and the best checkpoint."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback

from llava_moslora import pages
from llava_moslora.files.disk import replace_file
from llava_moslora.runs.log import METRICS_FILE, read_rows

CURVES_PAGE = "curves.html"
SMOOTHING = 0.95  # weight of the past in the moving average of the training loss
MOST_POINTS = 1000  # of a curve; a longer one is thinned
MOST_DOTS = 200  # of a validation curve; a longer one has none
WIDTH, HEIGHT = 1040, 420  # of the drawing, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 34  # margins
COLOURS = ("#c9803a", "#3f6fb5", "#a14fa0", "#b5443f", "#5f8f2f", "#2f8f8f")  # of the validation sets, in turn

Curve = list[tuple[int, float]]


class Curves(TrainerCallback):
    """Writes ``curves.html`` into the run folder from ``metrics.jsonl``, on the main process: after each evaluation and
    checkpoint, and at the end."""

    def __init__(self, run: Path):
        self.run = run

    def on_evaluate(self, args, state, control, **_):
        self._write(args, state)

    def on_save(self, args, state, control, **_):
        self._write(args, state)

    def on_train_end(self, args, state, control, **_):
        self._write(args, state)

    def _write(self, args, state) -> None:
        if state.is_world_process_zero:
            best = None
            if state.best_global_step:
                best = (state.best_global_step, f"eval_{args.metric_for_best_model}", state.best_metric)
            page = curves_page(read_rows(self.run / METRICS_FILE), best, self.run.name)
            replace_file(self.run / CURVES_PAGE, page.encode())


def curves_page(rows: Sequence[dict], best: tuple[int, str, float] | None, title: str) -> str:
    """The page.

    Args:
        rows: of ``metrics.jsonl``.
        best: step, metric and value of the best checkpoint.
    """
    training = _curve(rows, "loss")
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name.startswith("eval_")]
    validation = {name: _curve(rows, name) for name in names if name.endswith("loss")}
    accuracy = {name: _curve(rows, name) for name in names if name.endswith("token_accuracy")}
    smoothed = smooth([value for _, value in training])
    curves = {"training loss, smoothed": list(zip((step for step, _ in training), smoothed, strict=True))}
    last_step = max((row["step"] for row in rows), default=0) or 1
    drawings = [_drawing(curves | validation, training, best, last_step)]
    if accuracy:
        drawings.append(_drawing(accuracy, [], best, last_step))
    body = "".join(drawings)
    if best is not None:
        body += f"<p>best checkpoint: checkpoint-{best[0]}, {html.escape(best[1])} {best[2]:.4f}</p>"
    newest = [(name, f"{curve[-1][1]:.4f}", curve[-1][0]) for name, curve in (validation | accuracy).items() if curve]
    return pages.page(title, body + (pages.table(newest, ("last evaluation", "", "step")) if newest else ""), STYLE)


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential moving average, with TensorBoard's correction for its beginning."""
    smoothed, average = [], 0.0
    for number, value in enumerate(values, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smoothed.append(average / (1 - SMOOTHING**number))
    return smoothed


def _curve(rows: Sequence[dict], name: str) -> Curve:
    """The finite values of a metric; others are strings in the log."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _drawing(curves: dict[str, Curve], raw: Curve, best: tuple[int, str, float] | None, last: int) -> str:
    """An SVG of the curves up to step ``last`` with a legend, over the single values ``raw``, which it may cut."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>nothing was logged yet</p>"
    low, high = min(value for _, value in points), max(value for _, value in points)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / ((high - low) or 1)
        return f"{x:.1f},{min(max(y, TOP), HEIGHT - BOTTOM):.1f}"

    def line(curve: Curve, kind: str, colour: str) -> str:
        shown = curve[:: max(1, len(curve) // MOST_POINTS)] + curve[-1:]
        return f'<polyline class={kind} style="stroke:{colour}" points="{" ".join(place(*point) for point in shown)}"/>'

    parts = []
    for value in ticks:
        x, y = place(0, value).split(",")
        parts.append(f"<line class=grid x1={x} x2={WIDTH - RIGHT} y1={y} y2={y} /><text class=left x={LEFT - 8} y={y}>")
        parts.append(f"{value:g}</text>")
    for step in (tick for tick in _ticks(0, last) if tick <= last and tick == int(tick)):
        x = place(step, low).split(",")[0]
        parts.append(f"<text class=below x={x} y={HEIGHT - BOTTOM + 20}>{step:g}</text>")
    if best is not None:
        x = place(best[0], low).split(",")[0]
        parts.append(f"<line class=best x1={x} x2={x} y1={TOP} y2={HEIGHT - BOTTOM} />")
    if raw:
        parts.append(line(raw, "raw", "var(--a)"))
    legend = []
    for number, (name, curve) in enumerate(curves.items()):
        colour = "var(--a)" if raw and not number else COLOURS[(number - bool(raw)) % len(COLOURS)]
        if curve:
            parts.append(line(curve, "curve", colour))
        if name.startswith("eval_"):
            for x, y in (place(*point).split(",") for point in curve if len(curve) <= MOST_DOTS):
                parts.append(f'<circle r=3 style="fill:{colour}" cx={x} cy={y} />')
            if best is not None and best[1] == name:
                x, y = place(best[0], best[2]).split(",")
                parts.append(f"<circle class=mark r=7 cx={x} cy={y} />")
        legend.append(f'<span style="color:{colour}">● {html.escape(name)}</span>')
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img>{"".join(parts)}</svg>'
    return f"<figure>{drawing}<figcaption>{' '.join(legend)}</figcaption></figure>"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from one below ``low`` to one above ``high``, about six."""
    spread = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 5))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= spread / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


STYLE = """
svg { width: 100%; height: auto; } text { font-size: 12px; fill: currentColor; } figure { margin: 1em 0; }
.grid { stroke: var(--line); } .left { text-anchor: end; dominant-baseline: middle; } .below { text-anchor: middle; }
polyline { fill: none; } .raw { opacity: .25; } .curve { stroke-width: 2; }
.best { stroke: currentColor; stroke-dasharray: 4 4; opacity: .6; }
.mark { fill: none; stroke: currentColor; stroke-width: 2; } figcaption span { margin-right: 1.2em; }
td, th { padding: .1em .8em .1em 0; text-align: left; }
"""
