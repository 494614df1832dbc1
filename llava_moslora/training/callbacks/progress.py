"""The progress bar: loss, learning rate, speed, memory and time left; and the epoch as our data order counts it."""

from __future__ import annotations

from tqdm import tqdm
from transformers import TrainerCallback

SHOWN = (
    ("tok/s", "tokens_per_second", "{:.0f}"),
    ("rec/s", "samples_per_second", "{:.2f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("GiB", "peak_memory_gib", "{:.1f}"),
)


class Progress(TrainerCallback):
    """Drives the data order from the Trainer's step count, and shows on the main process where the run stands."""

    def __init__(self, trainer):
        self.trainer = trainer
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

    def on_epoch_begin(self, args, state, control, **_):
        # the order is a function of the step alone: a resumed run starts in the middle of its epoch, reading nothing
        steps = self.trainer.sampler.global_batches
        self.trainer.sampler.set_epoch(state.global_step // steps)
        self.trainer.sampler.start_at(state.global_step % steps)

    def on_step_end(self, args, state, control, **_):
        state.epoch = state.global_step / self.trainer.sampler.global_batches
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.1e}"}
            for name, figure, form in SHOWN:
                if figure in logs:
                    shown[name] = form.format(logs[figure])
            self.bar.set_postfix(shown, refresh=True)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
