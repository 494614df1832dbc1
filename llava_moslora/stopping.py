"""How a script ends from outside: signals as an exception, so that files are closed and temporary ones deleted, and
standard streams that are closed."""

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
# Names of signals that came. Libraries may lose their exception: torch imports NumPy in C++, drops what is raised
# there, and goes on with half a NumPy. Whatever fails then, or does not, the script was stopped.
came: list[str] = []


class Stopped(BaseException):
    """One of :data:`SIGNALS` came; no ``except Exception`` of a library may hold it."""


def catch_stop_signals() -> None:
    """Raise :class:`Stopped` in the main thread when one of :data:`SIGNALS` comes, the first time. A signal that is
    ignored (``nohup``) or handled already stays so; processes that are forked from this one end at once."""
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
    """Whether Ctrl-C is kept in :data:`came`, as while modules are imported. A script may go on after one: not there.

    Where another handler is set, or it is ignored as in a shell's background, it stays so.
    """
    if threading.current_thread() is threading.main_thread():
        before, after = (signal.default_int_handler, _interrupt)[:: 1 if noted else -1]
        if signal.getsignal(signal.SIGINT) is before:
            signal.signal(signal.SIGINT, after)


def refuse_if_stopped() -> None:
    """Raise :class:`Stopped` where its exception was lost: what was done since may be half of what it should be."""
    if came:
        raise Stopped(came[0])


def _interrupt(number: int, frame: FrameType | None) -> None:
    came.append("Ctrl-C")
    signal.default_int_handler(number, frame)


def _come_again(lost: sys.UnraisableHookArgs) -> None:
    """A signal that came inside a destructor or a callback of the garbage collector, where Python can only print its
    exception and go on, comes again a moment later."""
    if not issubclass(lost.exc_type, KeyboardInterrupt | Stopped):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGINT if lost.exc_type is KeyboardInterrupt else signal.Signals[str(lost.exc_value)]
    catch_stop_signals()
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def keep_standard_streams() -> None:
    """Give a stream that was closed from the start to ``/dev/null``: else the next file opened would get its number,
    and what a library in C prints would be written into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def end_progress_bars(rank: int) -> None:
    """The refusal must start a line. Some bars end without a newline; those of rank 0 are not known to other ranks,
    which print to the same place."""
    bars = list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())) if "tqdm" in sys.modules else []
    for bar in bars:
        bar.close()
    if bars or rank > 0:
        print(file=sys.stderr)


def stdout_works() -> bool:
    """Whether somebody still reads the standard output."""
    try:
        sys.stdout.flush()
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return not poller.poll(0)  # with no event asked for, it reports only a closed reader
    except (io.UnsupportedOperation, AttributeError):  # no file: captured, or closed from the start
        return True
    except (OSError, ValueError):
        return False
