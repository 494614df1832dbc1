"""Watchdog: detects a rank that hangs or has died, names it and ends the run; otherwise the others would wait forever.

A rank whose process is stopped, whose host is lost or whose disk hangs blocks the others inside a collective, where no
Python runs and no signal is handled. Two threads of every rank keep running: one writes this rank's heartbeat and
progress to the process group's store and reads those of the others, the other compares them with the clock. Neither
runs a collective, and a store that does not respond is detected too.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import psutil
from torch import distributed

from llava_moslora.distributed import world_size
from llava_moslora.errors import Refusal

STORE_KEY = "watch/{}"  # of each rank, in the run's store
LONGEST_INTERVAL = 5.0  # seconds between two reads of the store
EXIT_GRACE = 5.0  # seconds after the end of a process, within which a collective waiting for it usually fails by itself


@dataclass
class RankStatus:
    """The last report of a rank, and when (on this process's clock) it last changed."""

    process: str = ""  # "process PID on HOST"
    heartbeat: str = ""  # a counter that grows while the process runs
    progress: int = 0  # a counter that grows with the stages of training
    heartbeat_at: float = 0.0
    progress_at: float = 0.0
    pid: int = 0  # if the process is on this host (and in this container) and has not left training, else 0
    ended_at: float | None = None  # when this process first noticed that it has ended


class Watchdog:
    """Use around training, as a context manager; it does nothing for a run of one process.

    Args:
        timeout: seconds without a rank's heartbeat, or without progress on any rank, after which this process exits
            with the status of P-RANK, and the launcher ends the other ranks.
    """

    def __init__(self, timeout: float):
        self.timeout, self.interval = timeout, min(LONGEST_INTERVAL, timeout / 5)
        self.progress = 0
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []

    def report_progress(self) -> None:
        """Call this at every stage of a step."""
        self.progress += 1

    def __enter__(self) -> Watchdog:
        if world_size() > 1:
            self.rank, now = distributed.get_rank(), time.monotonic()
            self.ranks = [RankStatus(heartbeat_at=now, progress_at=now) for _ in range(world_size())]
            self.store_answered_at = now
            # a separate connection: on the shared one a blocking call would block all others
            store = distributed.distributed_c10d._get_default_store().clone()
            for work in (self._exchange, self._compare):
                thread = threading.Thread(target=work, args=(store,), daemon=True, name=f"watchdog {work.__name__}")
                thread.start()
                self.threads.append(thread)
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        for thread in self.threads:  # so that the others read that this rank leaves
            thread.join(timeout=2)

    def _exchange(self, store: distributed.Store) -> None:
        """Write and read reports until training ends or the store is lost (collectives fail then)."""
        keys = [STORE_KEY.format(rank) for rank in range(len(self.ranks))]
        pid_namespace, heartbeat = _pid_namespace(), 0
        try:
            # short pauses until all have reported: one may die soon, and must be known before that
            while not self.ended.wait(self.interval if all(r.process for r in self.ranks) else min(0.1, self.interval)):
                heartbeat += 1
                store.set(keys[self.rank], _report(heartbeat, self.progress))
                for key, rank in zip(keys, self.ranks, strict=True):
                    if store.check([key]):
                        self._update(rank, store.get(key).decode(), time.monotonic(), pid_namespace)
                self.store_answered_at = time.monotonic()
            store.set(keys[self.rank], _report(heartbeat + 1, self.progress, left=True))
        except (RuntimeError, OSError):
            self.ended.set()

    @staticmethod
    def _update(rank: RankStatus, report: str, now: float, pid_namespace: str) -> None:
        heartbeat, progress, rank.process, process = report.split("\n")
        pid, _, its_namespace = process.partition(" ")
        rank.pid = int(pid) if its_namespace == pid_namespace else 0
        if heartbeat != rank.heartbeat:
            rank.heartbeat, rank.heartbeat_at = heartbeat, now
        if int(progress) != rank.progress:
            rank.progress, rank.progress_at = int(progress), now

    def _compare(self, _store: distributed.Store) -> None:
        before, interval = time.monotonic(), min(self.interval, 1.0)
        while not self.ended.wait(interval):
            now = time.monotonic()
            suspended = now - before - interval  # seconds that this process itself was stopped
            if suspended > self.interval:  # not counted; after a long one all clocks restart: others may wake later
                self._add_to_clocks(suspended if suspended <= self.timeout / 2 else math.inf, now)
            elif found := self.ended_ranks(now) or self.hung_ranks(now):
                print(f"\n{self.refusal(found).line()}", file=sys.stderr, flush=True)  # below a progress bar
                os._exit(self.refusal(found).exit_status)  # the main thread may be in an uninterruptible call
            before = now

    def _add_to_clocks(self, seconds: float, now: float) -> None:
        self.store_answered_at = min(now, self.store_answered_at + seconds)
        for rank in self.ranks:
            rank.heartbeat_at = min(now, rank.heartbeat_at + seconds)
            rank.progress_at = min(now, rank.progress_at + seconds)

    def ended_ranks(self, now: float) -> str | None:
        """Ranks whose process ended ``EXIT_GRACE`` seconds ago without leaving training, in words; None without any.

        A rank that waits for such a rank in a collective gets an error. One that waits for it to join a new group does
        not.
        """
        for rank in self.ranks:
            if not rank.pid or _is_running(rank.pid):
                rank.ended_at = None
            elif rank.ended_at is None:
                rank.ended_at = now
        ended = [n for n, r in enumerate(self.ranks) if r.ended_at is not None and now - r.ended_at >= EXIT_GRACE]
        return f"{self._names(ended)} has ended" if ended else None

    def hung_ranks(self, now: float) -> str | None:
        """Which ranks hang at ``now`` (seconds, monotonic), as text; None if none does."""
        store_silent = now - self.store_answered_at
        if store_silent > self.timeout:
            return f"the store, which rank 0 or the launcher serves, has not responded for {store_silent:.0f} s"
        if store_silent > 3 * self.interval:
            return None  # information on the other ranks is outdated; first the store must respond
        if silent := [n for n, rank in enumerate(self.ranks) if now - rank.heartbeat_at > self.timeout]:
            return f"no heartbeat for {self.timeout:.0f} s from {self._names(silent)}"
        if now - max(rank.progress_at for rank in self.ranks) <= self.timeout:
            return None
        stalled = f"no rank made progress for {self.timeout:.0f} s"
        if silent := [n for n, rank in enumerate(self.ranks) if now - rank.heartbeat_at > 3 * self.interval]:
            return f"{stalled}, and there is no heartbeat from {self._names(silent)}"
        least = min(rank.progress for rank in self.ranks)
        behind = [n for n, rank in enumerate(self.ranks) if rank.progress == least]
        if len(behind) == len(self.ranks):
            return f"{stalled}, all at the same stage of a step"
        return f"{stalled}; behind the others is {self._names(behind)}"

    def _names(self, numbers: list[int]) -> str:
        return ", ".join(f"rank {n} ({self.ranks[n].process or 'which never reported'})" for n in numbers)

    def dead_on_this_host(self, patience: float = 1.0) -> str:
        """The ranks of this host whose process has ended, in words; "" where none of those that reported has.

        Args:
            patience: seconds to wait for one: a connection is closed a moment before its process has ended.
        """
        if not hasattr(self, "ranks"):
            return ""
        here, until = f" on {socket.gethostname()}", time.monotonic() + patience
        while True:
            of_this_host = [(n, rank.process) for n, rank in enumerate(self.ranks) if rank.process.endswith(here)]
            dead = [n for n, process in of_this_host if not _is_running(int(process.split()[1]))]
            if dead or time.monotonic() > until:
                return self._names(dead)
            time.sleep(0.05)

    def refusal(self, found: str) -> Refusal:
        return Refusal(
            "P-RANK", "the run hangs", found=found,
            fix="find out what blocks that process (host, disk or debugger), then start the same command again with "
            "--resume True; a run that is merely slow needs a larger --ddp_timeout (seconds)",
        )  # fmt: skip


def announce_rank() -> None:
    """Write this process's first report when the process group exists: if it dies before its watchdog runs, the other
    ranks still know which process is missing."""
    if world_size() > 1:
        store = distributed.distributed_c10d._get_default_store()
        store.set(STORE_KEY.format(distributed.get_rank()), _report(0, 0))


def _report(heartbeat: int, progress: int, left: bool = False) -> str:
    process = "0 left" if left else f"{os.getpid()} {_pid_namespace()}"
    return f"{heartbeat}\n{progress}\nprocess {os.getpid()} on {socket.gethostname()}\n{process}"


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _pid_namespace() -> str:
    """Where process numbers are unique: this host, or a container of it."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()
