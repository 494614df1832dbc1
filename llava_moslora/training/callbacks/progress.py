"""The progress bar: loss, learning rate, throughput, memory and time left."""

from __future__ import annotations

from tqdm import tqdm
from transformers import TrainerCallback

# what the bar shows besides loss and learning rate: label, key in the log, format
FIGURES = (
    ("tok/s", "tokens_per_second", "{:.0f}"),
    ("rec/s", "samples_per_second", "{:.2f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("GiB", "peak_memory_gib", "{:.1f}"),
)


class ProgressBar(TrainerCallback):
    """A bar on the main process, in place of the Trainer's own."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm,
            )

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.1e}"}
            shown |= {label: form.format(logs[key]) for label, key, form in FIGURES if key in logs}
            self.bar.set_postfix(shown, refresh=True)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
