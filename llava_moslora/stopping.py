"""Stopping a script from outside: signals as an exception, so that files are closed and temporary ones deleted, and
closed standard streams."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from types import FrameType

# SIGHUP: the terminal was closed, or the connection to it lost. Ctrl-C is Python's own KeyboardInterrupt.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# Names of signals received. Libraries may lose their exception: torch imports NumPy in C++, drops what is raised
# there, and continues with a half-imported NumPy. Whatever fails then, or does not, the script was stopped.
came: list[str] = []


class Stopped(BaseException):
    """One of :data:`SIGNALS` was received; an ``except Exception`` in a library does not catch it."""


def catch_stop_signals() -> None:
    """Raise :class:`Stopped` in the main thread when the first of :data:`SIGNALS` is received. A signal that is already
    ignored (``nohup``) or handled stays so; processes that are forked from this one end at once."""
    if threading.current_thread() is not threading.main_thread():
        return
    owner = os.getpid()

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second one does not wait
        if os.getpid() != owner:
            os.kill(os.getpid(), number)
        else:
            came.append(signal.Signals(number).name)
            raise Stopped(came[-1])

    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _come_again


def note_interrupts(noted: bool) -> None:
    """Whether Ctrl-C is recorded in :data:`came`, as during imports. A script may continue after Ctrl-C, but not there.

    If another handler is set, or it is ignored as in a shell's background job, it stays so.
    """
    if threading.current_thread() is threading.main_thread():
        before, after = (signal.default_int_handler, _interrupt)[:: 1 if noted else -1]
        if signal.getsignal(signal.SIGINT) is before:
            signal.signal(signal.SIGINT, after)


def refuse_if_stopped() -> None:
    """Raise :class:`Stopped` if its exception was lost: what was done since may be incomplete."""
    if came:
        raise Stopped(came[0])


def _interrupt(number: int, frame: FrameType | None) -> None:
    came.append("Ctrl-C")
    signal.default_int_handler(number, frame)


def _come_again(lost: sys.UnraisableHookArgs) -> None:
    """Repeat a signal a moment later if it came inside a destructor or a garbage-collector callback, where Python can
    only print its exception and continue."""
    if not issubclass(lost.exc_type, KeyboardInterrupt | Stopped):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGINT if lost.exc_type is KeyboardInterrupt else signal.Signals[str(lost.exc_value)]
    catch_stop_signals()
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def keep_standard_streams() -> None:
    """Redirect a stream that was closed from the start to ``/dev/null``: else the next opened file would get its
    descriptor, and output of C libraries would be written into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def end_progress_bars(rank: int) -> None:
    """End progress bars so that the refusal starts a new line. Some end without a newline; other ranks, which print to
    the same terminal, do not know rank 0's."""
    bars = list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())) if "tqdm" in sys.modules else []
    for bar in bars:
        bar.close()
    if bars or rank > 0:
        print(file=sys.stderr)


def stdout_works() -> bool:
    """Whether standard output still has a reader."""
    try:
        sys.stdout.flush()
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return not poller.poll(0)  # with no event asked for, it reports only a closed reader
    except (io.UnsupportedOperation, AttributeError):  # no file: captured, or closed from the start
        return True
    except (OSError, ValueError):
        return False
