"""``metrics.jsonl`` and TensorBoard in the run folder: one row per logged step, also after a kill and a resume."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from llava_moslora.runs.log import METRICS_FILE, append_row, delete_rows_after

TENSORBOARD_FOLDER = "tensorboard"


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
