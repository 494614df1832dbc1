"""SIGTERM and SIGINT: the step is finished, a checkpoint published, and every process leaves with status 75.

DeepSpeed's and torch's launchers pass SIGTERM on to the processes they started, one after the other and with 30 seconds
of grace; so whichever rank hears a signal first stops all ranks after the same step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from transformers import TrainerCallback

from llava_moslora.errors import EXIT_STATUS, LOST, Refusal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption(TrainerCallback):
    """Listens from :meth:`listen` on; give it to the Trainer as a callback, and call :meth:`leave` after training."""

    def __init__(self):
        self.heard: str | None = None  # the signal this process was sent
        self.heard_at = 0.0
        self.training = self.stopping = self.paused = False
        self._group = None  # of all ranks, on the CPU: asking one another never waits for a GPU

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if self.paused:  # leaving already; a launcher ends the other ranks when the first has left
            raise SystemExit(EXIT_STATUS["P"])
        if not self.training:
            _say(f"{name} outside the training loop: leaving at once; start again with --resume True")
            raise SystemExit(EXIT_STATUS["P"])
        if self.heard is None:
            self.heard, self.heard_at = name, time.monotonic()
            _say(f"{name}: finishing the step and publishing a checkpoint; {name} again ends at once")
        elif name == self.heard and time.monotonic() > self.heard_at + 1:
            # The same one again: someone is out of patience. (Ctrl-C reaches a process twice: from the terminal, and
            # as SIGTERM from the launcher.) A checkpoint that is being written is not lost: it does not exist yet.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_begin(self, args, state, control, **_):
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            on_cpu = distributed.get_backend() == "gloo"
            self._group = distributed.group.WORLD if on_cpu else distributed.new_group(backend="gloo")
        self.training = True

    def on_step_end(self, args, state, control, **_):
        asked = torch.tensor(self.heard is not None, dtype=torch.int32)
        if self._group is not None:
            distributed.all_reduce(asked, distributed.ReduceOp.MAX, self._group)
        if asked:
            self.stopping = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **_):
        self.training = False
        self.paused = self.stopping and state.global_step < state.max_steps

    def leave(self, run: object) -> None:
        """After training; nothing where it ran to its end.

        Raises:
            Refusal: P-PAUSED, with exit status 75: start the same command again with ``--resume True``.
        """
        if self.paused:
            raise Refusal(
                "P-PAUSED",
                "stopped by a signal after a checkpoint was published",
                file=run,
                fix="start the same command again with --resume True",
            )


@contextmanager
def contact(gone: Callable[[], str] = str) -> Iterator[None]:
    """A rank that dies takes the others with it; they say so in one line.

    Args:
        gone: names the dead ranks, as far as they can be known (:meth:`llava_moslora.training.watchdog.Watchdog.gone`).

    Raises:
        Refusal: P-RANK, in place of a communication library's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise Refusal(
            "P-RANK",
            "lost contact with another process of this run",
            found="; ".join(filter(None, (gone(), str(error).splitlines()[0]))),
            fix="see why it ended, then start the same command again with --resume True",
        ) from error


def ignore_signals(_worker: int) -> None:
    """For loader processes, which get the signals too: the step that waits for their batches is to be finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # a signal may arrive in the middle of a print, which cannot be entered twice
