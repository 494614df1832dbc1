"""A signal that comes at a chosen operation of a script: an import, a file that is opened or renamed, …

``python -m support.stops STATE NUMBER SIGNAL SCRIPT …`` runs a script in this process, which gets the signal at its
NUMBER-th operation after it began to handle signals. In a process of :mod:`support.warm_server`, :func:`at` is the
hook.
"""

from __future__ import annotations

import mmap
import os
import runpy
import signal
import struct
import sys
from pathlib import Path

OPERATIONS = ("import", "open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "subprocess.Popen", "socket.bind")
# operations until now, the number of the one at which the signal came, or -1, and whether torch was imported before
# signals were handled
STATE = "qq?"


def at(*, state: str, number: int, name: int) -> None:
    """From here on operations count in the file ``state``, and at the ``number``-th this process gets the signal
    ``name``; -1: never. Signals do here what they do in a terminal, not what a background job is given."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_DFL)
    with open(state, "w+b") as file:
        file.write(struct.pack(STATE, 0, -1, False))
        file.flush()
        counts = mmap.mmap(file.fileno(), 0)
    owner = os.getpid()

    def note(event: str, _arguments: tuple) -> None:
        if event not in OPERATIONS or os.getpid() != owner or signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            return
        count, came, late = struct.unpack(STATE, counts[:])
        if count == number:
            came = count
        if count == 0:
            late = "torch" in sys.modules
        counts[:] = struct.pack(STATE, count + 1, came, late)
        if count == number:
            os.kill(owner, name)

    sys.addaudithook(note)


def counted(state: Path) -> tuple[int, bool]:
    """How many operations there were, and whether the signal came."""
    count, came, _ = struct.unpack(STATE, state.read_bytes())
    return count, came >= 0


def handled_late(state: Path) -> bool:
    """Whether a script imported torch, which takes seconds, before it handled signals."""
    return struct.unpack(STATE, state.read_bytes())[2]


if __name__ == "__main__":
    state, number, name, *sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    at(state=state, number=int(number), name=int(name))
    runpy.run_path(sys.argv[0], run_name="__main__")
