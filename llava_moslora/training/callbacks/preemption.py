"""Preemption: on SIGTERM or SIGINT the step is finished, a checkpoint published, and every rank exits with status 75.

DeepSpeed's and torch's launchers pass SIGTERM on to the processes they started, one after the other and with 30 seconds
of grace; so whichever rank receives a signal first stops all ranks after the same step.
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
    """A callback that handles signals once :meth:`install` was called; :meth:`refuse_if_interrupted` ends the run."""

    def __init__(self):
        self.received: str | None = None  # the signal this process was sent
        self.received_at = 0.0
        self.training = self.stopping = self.interrupted = False
        self._group = None  # all ranks, on the CPU: asking one another never waits for a GPU

    def install(self) -> None:
        """Handle :data:`SIGNALS` from now on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if self.interrupted:  # exiting already; a launcher ends the other ranks when the first has exited
            raise SystemExit(EXIT_STATUS["P"])
        if not self.training:
            _print_from_handler(f"{name} outside the training loop: exiting at once; start again with --resume True")
            raise SystemExit(EXIT_STATUS["P"])
        if self.received is None:
            self.received, self.received_at = name, time.monotonic()
            _print_from_handler(f"{name}: finishing the step and publishing a checkpoint; {name} again ends at once")
        elif name == self.received and time.monotonic() > self.received_at + 1:
            # The same one again: the user does not want to wait. (Ctrl-C reaches a process twice: from the terminal,
            # and as SIGTERM from the launcher.) A checkpoint that is being written is not lost: it does not exist yet.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_begin(self, args, state, control, **_):
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            on_cpu = distributed.get_backend() == "gloo"
            self._group = distributed.group.WORLD if on_cpu else distributed.new_group(backend="gloo")
        self.training = True

    def on_step_end(self, args, state, control, **_):
        received = torch.tensor(self.received is not None, dtype=torch.int32)
        if self._group is not None:
            distributed.all_reduce(received, distributed.ReduceOp.MAX, self._group)
        if received:
            self.stopping = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **_):
        self.training = False
        self.interrupted = self.stopping and state.global_step < state.max_steps

    def refuse_if_interrupted(self, run: object) -> None:
        """To be called after training; does nothing for a run that reached its last step.

        Raises:
            Refusal: P-PAUSED, with exit status 75: start the same command again with ``--resume True``.
        """
        if self.interrupted:
            raise Refusal(
                "P-PAUSED",
                "stopped by a signal after a checkpoint was published",
                file=run,
                fix="start the same command again with --resume True",
            )


@contextmanager
def catch_lost_ranks(dead_ranks: Callable[[], str] = str) -> Iterator[None]:
    """A rank that dies makes the collectives of the others fail; each of those reports it in one line.

    Args:
        dead_ranks: names those that are known (:meth:`llava_moslora.training.watchdog.Watchdog.dead_on_this_host`).

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
            found="; ".join(filter(None, (dead_ranks(), str(error).splitlines()[0]))),
            fix="see why it ended, then start the same command again with --resume True",
        ) from error


def ignore_signals(_worker: int) -> None:
    """For the workers of the data loader, which receive the signals too: the step that waits for their batches is to be
    finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _print_from_handler(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # a signal may arrive in the middle of a print, which cannot be entered twice
