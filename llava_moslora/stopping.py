"""Signals that ask a script to end, as an exception: files are closed, temporary ones deleted, and one line is said."""

from __future__ import annotations

import os
import signal
import threading

# SIGHUP: the terminal was closed, or the connection to it lost. Ctrl-C is Python's own KeyboardInterrupt.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


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
            raise Stopped(signal.Signals(number).name)

    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def keep_standard_streams() -> None:
    """Give a stream that was closed from the start to ``/dev/null``: else the next file opened would get its number,
    and what a library in C prints would be written into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
