"""The watch of every rank over the others: one that stands still is named, instead of all waiting for it without end.

A rank whose process is stopped, whose host is gone or whose disk hangs leaves the others inside a collective, where no
Python runs and no signal is answered. Two threads of every rank go on: one tells the run's store how far this rank is
and reads how far the others are, the other compares the clock. It asks no collective, and if the store itself stands
still, that is found too.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import psutil
from torch import distributed

from llava_moslora.errors import Refusal

KEY = "watch/{}"  # in the run's store, of each rank
LONGEST_PAUSE = 5.0  # seconds between two looks
GRACE = 5.0  # seconds after a process has ended in which the collective that waits for it usually fails by itself


@dataclass
class RankStatus:
    """What is known of one rank: its own words, and when (on this process's clock) they last changed."""

    who: str = ""
    beats: str = ""
    marks: int = 0
    heard: float = 0.0  # when its beats changed: its process runs
    moved: float = 0.0  # when its marks changed: it gets on
    pid: int = 0  # of its process, if that is one of those that can be looked at from here and has not left training
    missed: float | None = None  # since when there is no such process


class Watchdog:
    """Use around training, as a context manager; it does nothing for a run of one process.

    Args:
        timeout: seconds without a sign of life, or without any rank getting on, after which this process ends with
            the status of P-RANK, and the launcher takes the other ones down.
    """

    def __init__(self, timeout: float):
        self.timeout, self.pause = timeout, min(LONGEST_PAUSE, timeout / 5)
        self.marks = 0
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []

    def mark(self) -> None:
        """This rank got on: call it at every stage of a step."""
        self.marks += 1

    def __enter__(self) -> Watchdog:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            self.rank = distributed.get_rank()
            now = time.monotonic()
            self.seen = [RankStatus(heard=now, moved=now) for _ in range(distributed.get_world_size())]
            self.answered = now  # when the store last answered
            # a connection of its own: on the shared one a call that waits would keep the others out
            store = distributed.distributed_c10d._get_default_store().clone()
            for work in (self._exchange, self._compare):
                thread = threading.Thread(target=work, args=(store,), daemon=True, name=f"watch {work.__name__}")
                thread.start()
                self.threads.append(thread)
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        for thread in self.threads:  # the others are told that this rank leaves
            thread.join(timeout=2)

    def _exchange(self, store: distributed.Store) -> None:
        """Tell and read, until training is over or the store is gone (its host ended; collectives fail then)."""
        keys = [KEY.format(rank) for rank in range(len(self.seen))]
        here, beats = _processes(), 0
        try:
            # at first without pauses: who is who is wanted when one of them dies soon
            while not self.ended.wait(self.pause if all(seen.who for seen in self.seen) else min(0.1, self.pause)):
                beats += 1
                store.set(keys[self.rank], _sign_of_life(beats, self.marks))
                for key, seen in zip(keys, self.seen, strict=True):
                    if store.check([key]):
                        self._note(seen, store.get(key).decode(), time.monotonic(), here)
                self.answered = time.monotonic()
            store.set(keys[self.rank], _sign_of_life(beats + 1, self.marks, left=True))
        except (RuntimeError, OSError):
            self.ended.set()

    @staticmethod
    def _note(seen: RankStatus, said: str, now: float, here: str) -> None:
        beats, marks, seen.who, process = said.split("\n")
        pid, _, processes = process.partition(" ")
        seen.pid = int(pid) if processes == here else 0
        if beats != seen.beats:
            seen.beats, seen.heard = beats, now
        if int(marks) != seen.marks:
            seen.marks, seen.moved = int(marks), now

    def _compare(self, _store: distributed.Store) -> None:
        before, look = time.monotonic(), min(self.pause, 1.0)
        while not self.ended.wait(look):
            now = time.monotonic()
            stood_still = now - before - look  # this process itself: it was suspended, with others or alone
            if stood_still > self.timeout / 2:  # the others may wake later
                self._begin_again(now)
            elif stood_still > self.pause:
                self._do_not_count(stood_still, now)
            elif found := self.dead(now) or self.trouble(now):
                print(self.refusal(found).line(), file=sys.stderr, flush=True)
                os._exit(self.refusal(found).exit_status)  # the main thread is in a call that nothing interrupts
            before = now

    def _begin_again(self, now: float) -> None:
        self.answered = now
        for seen in self.seen:
            seen.heard = seen.moved = now

    def _do_not_count(self, seconds: float, now: float) -> None:
        self.answered = min(now, self.answered + seconds)
        for seen in self.seen:
            seen.heard, seen.moved = min(now, seen.heard + seconds), min(now, seen.moved + seconds)

    def dead(self, now: float) -> str | None:
        """Ranks whose process ended ``GRACE`` seconds ago without having left training, in words; None without any.

        Whoever waits for such a rank in a collective gets an error. Whoever waits for it to join a new group does not.
        """
        for seen in self.seen:
            if not seen.pid or _runs(seen.pid):
                seen.missed = None
            elif seen.missed is None:
                seen.missed = now
        ended = [rank for rank, seen in enumerate(self.seen) if seen.missed is not None and now - seen.missed >= GRACE]
        return f"{self._names(ended)} has ended" if ended else None

    def trouble(self, now: float) -> str | None:
        """Which ranks stand still at ``now`` (seconds, monotonic), in words; None where all is well."""
        if now - self.answered > self.timeout:
            return f"the store, which rank 0 or the launcher serves, has not answered for {now - self.answered:.0f} s"
        if now - self.answered > 3 * self.pause:
            return None  # what is known of the others is old; the store's own silence counts
        if silent := [rank for rank, seen in enumerate(self.seen) if now - seen.heard > self.timeout]:
            return f"no sign of life for {self.timeout:.0f} s from {self._names(silent)}"
        if now - max(seen.moved for seen in self.seen) <= self.timeout:
            return None
        if quiet := [rank for rank, seen in enumerate(self.seen) if now - seen.heard > 3 * self.pause]:
            return f"no rank got on for {self.timeout:.0f} s, and there is no sign of life from {self._names(quiet)}"
        least = min(seen.marks for seen in self.seen)
        behind = [rank for rank, seen in enumerate(self.seen) if seen.marks == least]
        if len(behind) == len(self.seen):
            return f"no rank got on for {self.timeout:.0f} s, all at the same stage of a step"
        return f"no rank got on for {self.timeout:.0f} s; behind the others is {self._names(behind)}"

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self.seen[rank].who or 'which never spoke'})" for rank in ranks)

    def gone(self, patience: float = 1.0) -> str:
        """The ranks of this host whose process has ended, in words; "" where none of those that spoke has."""
        if not hasattr(self, "seen"):
            return ""
        here, until = f" on {socket.gethostname()}", time.monotonic() + patience
        while True:  # a connection is closed a moment before its process is gone
            mine = [(rank, seen.who) for rank, seen in enumerate(self.seen) if seen.who.endswith(here)]
            dead = [rank for rank, who in mine if not _runs(int(who.split()[1]))]
            if dead or time.monotonic() > until:
                return self._names(dead)
            time.sleep(0.05)

    def refusal(self, found: str) -> Refusal:
        return Refusal(
            "P-RANK",
            "the run stands still",
            found=found,
            fix="see what holds that process (its host, disk or a debugger), then start the same command again with "
            "--resume True; a run that is merely slow needs a larger --ddp_timeout (seconds)",
        )


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def introduce() -> None:
    """Tell the other ranks which process this one is, as soon as they have met: one that dies before it watches is
    missed all the same."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        store = distributed.distributed_c10d._get_default_store()
        store.set(KEY.format(distributed.get_rank()), _sign_of_life(0, 0))


def _sign_of_life(beats: int, marks: int, left: bool = False) -> str:
    process = "0 left" if left else f"{os.getpid()} {_processes()}"
    return f"{beats}\n{marks}\nprocess {os.getpid()} on {socket.gethostname()}\n{process}"


def _processes() -> str:
    """What process numbers are unique in: this host, or this container of it."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()
