"""``metrics.jsonl`` and TensorBoard in the run folder: one row per logged step, also after a kill and a resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class MetricsWriter(TrainerCallback):
    """Writes what is logged, on the main process.

    A resumed run repeats the steps after its checkpoint: their rows are deleted first, and TensorBoard is told to
    discard them.

    Args:
        run: the run folder.
        tensorboard: write event files too, into ``tensorboard/``.
    """

    def __init__(self, run: Path, *, tensorboard: bool):
        self.file, self.tensorboard = run / METRICS_FILE, tensorboard
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, args, state, control, **_):
        if not state.is_world_process_zero:
            return
        delete_rows_after(self.file, state.global_step)
        if self.tensorboard:
            self.writer = SummaryWriter(self.file.parent / TENSORBOARD_FOLDER, purge_step=state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or "train_runtime" in logs:  # the Trainer's closing summary is of no step
            return
        append_row(self.file, {"step": state.global_step, **logs})
        if self.writer is not None:
            for name, value in logs.items():
                self.writer.add_scalar(name if "/" in name else f"train/{name}", value, state.global_step)
            self.writer.flush()

    def on_train_end(self, args, state, control, **_):
        if self.writer is not None:
            self.writer.close()


def append_row(file: Path, row: dict) -> None:
    """Append one row in one write, so that a kill leaves at most one unfinished line, at the end.

    JSON has no NaN and no Inf (fp16's search for a loss scale logs gradient norms of Inf): they are written as text.
    """
    row = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(file: Path) -> list[dict]:
    """The rows of a file that :func:`append_row` wrote. A line that a kill left unfinished is skipped, and so is a
    damaged one: a log that lost a line stops nothing."""
    return _read(file)[0]


def _read(file: Path) -> tuple[list[dict], int]:
    """The rows, and the number of damaged lines."""
    if not file.is_file():
        return [], 0
    *lines, _unfinished = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [row for line in lines if (row := _parse(line)) is not None]
    return rows, len(lines) - len(rows)


def _parse(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def delete_rows_after(file: Path, step: int) -> None:
    """Delete the rows of later steps, all at once: a kill leaves the old file or the new one."""
    if not file.is_file():
        return
    rows, damaged = _read(file)
    if damaged:
        print(f"{file}: {damaged} damaged lines skipped", flush=True)
    rows = [row for row in rows if row["step"] <= step]
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, file)
