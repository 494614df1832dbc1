"""Writes logged metrics: to ``metrics.jsonl`` and TensorBoard in the run folder, and to the progress bar."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback

from llava_moslora.files.disk import naming
from llava_moslora.runs.log import METRICS_FILE, append_row, delete_rows_after

TENSORBOARD_FOLDER = "tensorboard"
# shown in the progress bar besides loss and learning rate: label, key in the log, format
FIGURES = (
    ("tok/s", "tokens_per_second", "{:.0f}"),
    ("rec/s", "samples_per_second", "{:.2f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("GiB", "peak_memory_gib", "{:.1f}"),
)


class MetricsWriter(TrainerCallback):
    """Writes what is logged, on the main process.

    A resumed run repeats the steps after its checkpoint: their rows are deleted here and in TensorBoard.

    Args:
        run: the run folder.
        tensorboard: write event files too, into ``tensorboard/``.
    """

    def __init__(self, run: Path, *, tensorboard: bool):
        self.file, self.tensorboard = run / METRICS_FILE, tensorboard
        self.writer: SummaryWriter | None = None
        self.thread_hook = threading.excepthook

    def on_train_begin(self, args, state, control, **_):
        if not state.is_world_process_zero:
            return
        last = state.global_step or -1  # a new run evaluates step 0 again
        delete_rows_after(self.file, last)
        if self.tensorboard:
            self.thread_hook = threading.excepthook
            threading.excepthook = leave_errors_to_flush(self.thread_hook)
            self.writer = SummaryWriter(self.file.parent / TENSORBOARD_FOLDER, purge_step=last + 1)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or "train_runtime" in logs:  # the Trainer's final summary belongs to no step
            return
        append_row(self.file, {"step": state.global_step, **logs})
        if self.writer is not None:
            with naming(self.file.parent / TENSORBOARD_FOLDER):
                for name, value in logs.items():
                    self.writer.add_scalar(tensorboard_name(name), value, state.global_step)
                self.writer.flush()

    def on_train_end(self, args, state, control, **_):
        if self.writer is not None:
            self.writer.close()
            threading.excepthook = self.thread_hook


def leave_errors_to_flush(others: Callable[[Any], object]) -> Callable[[threading.ExceptHookArgs], None]:
    """A ``threading.excepthook`` that prints no traceback of TensorBoard's writer thread: the next ``flush`` raises its
    error, such as of a full disk. Errors of other threads go to ``others``."""

    def hook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            others(failed)

    return hook


def tensorboard_name(name: str) -> str:
    """``eval_loss`` → ``eval/loss``, ``loss`` → ``train/loss``, as transformers does; names with a slash unchanged."""
    if "/" in name:
        return name
    return name.replace("_", "/", 1) if name.startswith("eval_") else f"train/{name}"


class ProgressBar(TrainerCallback):
    """A progress bar on the main process, in place of the Trainer's, and a line per evaluation."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True,
                disable=args.disable_tqdm,
            )  # fmt: skip

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.1e}"}
            shown |= {label: form.format(logs[key]) for label, key, form in FIGURES if key in logs}
            self.bar.set_postfix(shown, refresh=True)

    def on_evaluate(self, args, state, control, metrics, **_):
        if state.is_world_process_zero:
            figures = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in metrics.items())
            tqdm.write(f"step {state.global_step} · validation: {figures}")

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
