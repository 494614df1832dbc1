"""Preemption: on SIGTERM or SIGINT the step is finished, a checkpoint published, and every rank exits with status 75.

Launchers forward SIGTERM to their processes one after the other, with a grace period of 30 seconds: so the first rank
that receives a signal stops all ranks, after the same step. Rank 0 alone says so.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import distributed
from transformers import TrainerCallback

from llava_moslora.distributed import cpu_group, world_size
from llava_moslora.errors import EXIT_STATUS, LOST, Refusal
from llava_moslora.training.launcher_watch import LauncherWatch

# SIGHUP: the terminal was closed. SIGUSR1: a job scheduler's warning, such as Slurm's --signal=USR1@120
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
RESUME = "start the same command again with --resume True"


class EvaluationInterrupted(Exception):
    """A signal ends an evaluation, on every rank at the same batch; the resumed run evaluates that step."""


class Preemption(TrainerCallback):
    """Handles :data:`SIGNALS` of this process from construction on, and the death of the ``deepspeed`` command that
    started it, as SIGTERM."""

    def __init__(self):
        self.received: str | None = None  # the signal this process was sent
        self.received_at = 0.0
        self.launcher_died = False  # no signal: the first one that is sent later does not mean "at once"
        self.training = self.stopping = self.interrupted = False
        self.evaluation_left = False  # of the last step, for the resumed run
        self.announced = False
        self.first_rank = os.environ.get("RANK", "0") in ("0", "")  # before it has joined the others
        self.launcher = LauncherWatch()
        self._group = None  # all ranks, on the CPU: the all-reduce of every step does not wait for a GPU
        for number in SIGNALS:
            handler = signal.getsignal(number)
            # nohup ignores SIGHUP; SIGUSR1 may be another program's
            if handler is not signal.SIG_IGN and (number != signal.SIGUSR1 or handler is signal.SIG_DFL):
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if self.interrupted:  # already exiting; a launcher ends the other ranks when the first has exited
            raise SystemExit(EXIT_STATUS["P"])
        if not self.training:
            self._say(f"{name} outside the training loop: exiting at once; start again with --resume True")
            raise SystemExit(EXIT_STATUS["P"])
        if self.received is None:
            self.received, self.received_at = name, time.monotonic()
            self._announce(name)
        elif name == self.received and time.monotonic() > self.received_at + 1:
            # The same signal again: the user does not want to wait. (Ctrl-C reaches a process twice: from the terminal,
            # and as SIGTERM from the launcher.) A checkpoint that is being written is not lost: it does not exist yet.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _announce(self, name: str) -> None:
        if not self.announced:
            self._say(f"{name}: finishing the step and publishing a checkpoint; {name} again ends at once")
        self.announced = True

    def _say(self, line: str) -> None:
        if self.first_rank:
            with suppress(OSError):  # of a terminal that is gone: an error here would end the step that is finished
                os.write(2, f"{line}\n".encode())  # print is not reentrant: a signal may have interrupted one

    def on_train_begin(self, args, state, control, **_):
        if world_size() > 1:
            on_cpu = distributed.get_backend() == "gloo"
            self._group = distributed.group.WORLD if on_cpu else cpu_group(args.ddp_timeout)
        self.training = True

    def on_step_end(self, args, state, control, **_):
        if self._any_received():
            self._stop(control)

    def on_epoch_end(self, args, state, control, **_):
        if self.stopping:
            self._leave_evaluation(control)

    def on_prediction_step(self, args, state, control, **_):
        """Called before each batch of an evaluation, which may take longer than a launcher waits.

        Raises:
            EvaluationInterrupted
        """
        if self._any_received():
            self._stop(control)
            self.evaluation_left = True
            raise EvaluationInterrupted

    def _any_received(self) -> bool:
        """Whether a rank was sent a signal. Collective."""
        if self.received is None and not self.launcher_died and self.launcher.died():
            self._say("the deepspeed command has ended")
            self.launcher_died = True
        name = self.received or (signal.SIGTERM.name if self.launcher_died else None)
        number = torch.tensor(0 if name is None else signal.Signals[name], dtype=torch.int32)
        if self._group is not None:
            distributed.all_reduce(number, distributed.ReduceOp.MAX, self._group)
        if number:
            self._announce(signal.Signals(int(number)).name)
        return bool(number)

    def _stop(self, control) -> None:
        self.stopping = control.should_save = control.should_training_stop = True
        self._leave_evaluation(control)

    def _leave_evaluation(self, control) -> None:
        """A due evaluation is left to the resumed run."""
        self.evaluation_left |= control.should_evaluate
        control.should_evaluate = False

    def on_train_end(self, args, state, control, **_):
        self.training = False
        self.interrupted = self.stopping and (state.global_step < state.max_steps or self.evaluation_left)

    def refuse_if_interrupted(self, run: object) -> None:
        """To be called after training; does nothing for a run that finished its last step. Collective.

        Raises:
            Refusal: P-PAUSED, with exit status 75: start the same command again with ``--resume True``.
            SystemExit: with that status, on other ranks than 0.
        """
        if self.interrupted:
            if self._group is not None:  # launchers end all ranks when one has exited: not before rank 0 has ended
                with suppress(RuntimeError):  # one of them was ended
                    distributed.barrier(self._group)
            if not self.first_rank:
                raise SystemExit(EXIT_STATUS["P"])
            raise Refusal("P-PAUSED", "stopped by a signal; what was trained is saved", file=run, fix=RESUME)


@contextmanager
def catch_lost_ranks(dead_ranks: Callable[[], str] = str) -> Iterator[None]:
    """Turns the error of a collective, which fails on all other ranks when one has died, into one line.

    Args:
        dead_ranks: returns the names of ranks known to be dead (``Watchdog.dead_on_this_host``), or "".

    Raises:
        Refusal: P-RANK, in place of a communication library's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        found = "; ".join(filter(None, (dead_ranks(), str(error).splitlines()[0])))
        fix = f"see why it ended, then {RESUME}"
        raise Refusal("P-RANK", "lost contact with another process of this run", found=found, fix=fix) from error


def ignore_signals(_worker: int) -> None:
    """For the data loader's workers, which receive the signals too: the step in progress still needs their batches."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
