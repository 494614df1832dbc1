"""The curves of a run as one page: training loss, validation losses, and the best checkpoint."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback

from llava_moslora import drawings, pages
from llava_moslora.drawings import COLOURS, WIDTH, dot, figure, label, legend_entry, line_through, segment, ticks_of
from llava_moslora.files.disk import replace_file
from llava_moslora.runs.log import METRICS_FILE, read_rows

CURVES_PAGE = "curves.html"
SMOOTHING = 0.95  # weight of the past in the moving average of the training loss
MOST_POINTS = 1000  # of a curve; a longer one is thinned
MOST_DOTS = 200  # of a validation curve; a longer one has none
HEIGHT = 420  # of the drawing, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 34  # margins

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
    values = [value for curve in curves.values() for _, value in curve]
    if not values:
        return "<p>nothing was logged yet</p>"
    ticks = ticks_of(values)

    def place(step: float, value: float) -> tuple[float, float]:
        y = TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - value) / (ticks[-1] - ticks[0])
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last, min(max(y, TOP), HEIGHT - BOTTOM)

    def line(curve: Curve, kind: str, colour: str) -> str:
        shown = curve[:: max(1, len(curve) // MOST_POINTS)] + curve[-1:]
        return line_through([place(*point) for point in shown], colour, kind)

    parts = []
    for value in ticks:
        y = place(0, value)[1]
        parts += [segment("grid", LEFT, y, WIDTH - RIGHT, y), label("left", LEFT - 8, y, f"{value:g}")]
    for step in (tick for tick in ticks_of([0, last]) if tick <= last and tick == int(tick)):
        parts.append(label("below", place(step, 0)[0], HEIGHT - BOTTOM + 20, f"{step:g}"))
    if best is not None:
        x = place(best[0], 0)[0]
        parts.append(segment("best", x, TOP, x, HEIGHT - BOTTOM))
    if raw:
        parts.append(line(raw, "raw", "var(--a)"))
    legend = []
    for number, (name, curve) in enumerate(curves.items()):
        colour = "var(--a)" if raw and not number else COLOURS[(number - bool(raw)) % len(COLOURS)]
        if curve:
            parts.append(line(curve, "curve", colour))
        if name.startswith("eval_"):
            if len(curve) <= MOST_DOTS:
                parts += [dot(*place(*point), 3, colour) for point in curve]
            if best is not None and best[1] == name:
                parts.append(dot(*place(best[0], best[2]), 7, "none", "mark"))
        legend.append(legend_entry(html.escape(name), colour))
    return figure(parts, HEIGHT, " ".join(legend))


STYLE = f"""{drawings.STYLE}
.raw {{ opacity: .25; }} .best {{ stroke: currentColor; stroke-dasharray: 4 4; opacity: .6; }}
.mark {{ fill: none; stroke: currentColor; stroke-width: 2; }} td, th {{ padding: .1em .8em .1em 0; text-align: left; }}
"""
