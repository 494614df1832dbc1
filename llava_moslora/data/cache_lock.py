"""The lock under which a data cache is built: who waits says for whom, and gives up when that process stands still.

A process that is stopped, or whose host is lost, keeps the lock; no collective runs meanwhile whose timeout would end
the others.
"""

from __future__ import annotations

import glob
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llava_moslora.data.cache import using
from llava_moslora.distributed import rank
from llava_moslora.errors import Refusal

PATIENCE = 1800.0  # seconds; as --ddp_timeout, where nobody gives it
SAID_AFTER = 10.0  # seconds
INTERVAL = 1.0  # seconds between two looks at the builder's progress

log = logging.getLogger(__name__)


@contextmanager
def locked(target: Path, name: str, patience: float) -> Iterator[None]:
    """Hold the lock of the cache folder ``target``, to build it.

    Args:
        name: the source that is prepared, for messages.
        patience: seconds without progress of the process that holds the lock, after which waiting ends.

    Raises:
        Refusal: P-RANK, as said; E-DISK.
    """
    lock = FileLock(f"{target}.lock")
    with using(target.parent):
        _acquire(lock, target, name, patience)
    try:
        with suppress(OSError):  # only others' messages lack it
            _builder(target).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            _builder(target).unlink()
        lock.release()


def report_progress(target: Path) -> None:
    """To be called under the lock, where long work writes nothing into the cache."""
    with suppress(OSError):
        os.utime(_builder(target))


def _builder(target: Path) -> Path:
    """The file that says which process holds the lock."""
    return Path(f"{target}.builder")


def _acquire(lock: FileLock, target: Path, name: str, patience: float) -> None:
    interval = min(INTERVAL, patience / 5)
    waited = still = 0.0  # by looks, not by the clock: the time in which this process is stopped itself does not count
    seen, said = None, False
    while True:
        try:
            lock.acquire(timeout=interval)
            return
        except Timeout:
            pass
        now = _progress(target)
        waited, still, seen = waited + interval, 0.0 if now != seen else still + interval, now
        if waited >= SAID_AFTER and not said and rank() < 2:  # one of these two waits; not a line of every rank
            log.warning("%s prepares %s; waiting for it", _holder(target), name)
            said = True
        if still >= patience:
            raise Refusal(
                "P-RANK", "the process that prepares this file makes no progress", file=name,
                found=f"{_holder(target)}, nothing new for {patience:.0f} s",
                fix="see what holds that process (its host, disk or a debugger), then start the same command again; in "
                "a training, one that is merely slow needs a larger --ddp_timeout (seconds)",
            )  # fmt: skip


def _progress(target: Path) -> list[tuple[str, int]]:
    """What changes with every part that is written, and while one is built: the times of the cache's folders. They are
    compared with earlier ones only, not with this host's clock. The lock itself is left out: waiting touches it."""
    found = []
    for path in glob.glob(f"{glob.escape(str(target))}*"):
        with suppress(FileNotFoundError):
            if not path.startswith(f"{target}.lock"):
                found.append((path, os.stat(path).st_mtime_ns))
    return sorted(found)


def _holder(target: Path) -> str:
    try:
        return _builder(target).read_text() or "another process"
    except OSError:
        return "another process"
