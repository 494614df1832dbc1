"""The watchdog: a hung rank is distinguished from a slow one, by a clock that the tests set."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch.multiprocessing as mp
from torch import distributed

from llava_moslora.training import watchdog as module
from llava_moslora.training.process_group import tcp_store
from llava_moslora.training.watchdog import RankStatus, Watchdog
from support.launching import ROOT, free_port


def watching(*ranks: RankStatus, answered: float = 100.0) -> Watchdog:
    watch = Watchdog(timeout=10)
    watch.ranks, watch.store_answered_at = list(ranks), answered
    return watch


def rank(progress: int, heartbeat_at: float = 100.0, progress_at: float = 100.0) -> RankStatus:
    return RankStatus(
        process="process 7 on node-a", progress=progress, heartbeat_at=heartbeat_at, progress_at=progress_at
    )


def test_slow_ranks_are_no_trouble():
    assert watching(rank(5), rank(4, progress_at=91)).hung_ranks(101) is None
    assert (
        watching(rank(5, progress_at=60), rank(4, progress_at=91)).hung_ranks(101) is None
    )  # one of them makes progress


# R11: a rank that hangs
def test_a_silent_rank_is_named():
    found = watching(rank(5), rank(4), rank(4, heartbeat_at=90)).hung_ranks(101)
    assert found == "no heartbeat for 10 s from rank 2 (process 7 on node-a)"


def test_a_rank_that_never_reported_is_named():
    assert "rank 1 (which never reported)" in watching(rank(5), RankStatus(heartbeat_at=90, progress_at=90)).hung_ranks(
        101
    )


def test_a_running_rank_that_falls_behind_is_named():
    found = watching(rank(5, progress_at=90), rank(4, progress_at=89), rank(5, progress_at=90)).hung_ranks(101)
    assert found == "no rank made progress for 10 s; behind the others is rank 1 (process 7 on node-a)"


def test_a_rank_whose_process_has_ended_is_named_after_a_grace():
    """Whoever waits for it to join a new group of processes would wait for the whole timeout."""
    with subprocess.Popen(["sleep", "60"]) as process:
        watch = watching(
            rank(5),
            RankStatus(process="process 8 on node-a", progress=5, heartbeat_at=100, progress_at=100, pid=process.pid),
        )
        assert watch.ended_ranks(100) is None
        process.kill()
    assert watch.ended_ranks(101) is None and watch.ended_ranks(101 + module.EXIT_GRACE - 1) is None
    assert watch.ended_ranks(101 + module.EXIT_GRACE) == "rank 1 (process 8 on node-a) has ended"


def test_a_rank_that_left_training_or_runs_elsewhere_is_not_missed():
    seen = RankStatus()
    for report in ("3\n5\nprocess 8 on node-a\n0 left", "3\n5\nprocess 8 on node-a\n99999999 node-a pid:[2]"):
        Watchdog._update(seen, report, 100, "node-a pid:[1]")
        assert watching(rank(5), seen).ended_ranks(100) is watching(rank(5), seen).ended_ranks(1000) is None


def test_all_waiting_at_one_place():
    found = watching(rank(5, progress_at=90), rank(5, progress_at=90)).hung_ranks(101)
    assert found == "no rank made progress for 10 s, all at the same stage of a step"


def test_a_store_that_does_not_answer():
    found = watching(rank(5, heartbeat_at=89), rank(5, heartbeat_at=89), answered=89).hung_ranks(101)
    assert found == "the store, which rank 0 or the launcher serves, has not responded for 12 s"


def test_the_silence_of_the_store_is_blamed_on_no_rank():
    """Rank 0 serves it and is stopped: nothing new is heard of anyone, since a moment after they last made progress."""
    stopped = [rank(5, heartbeat_at=92, progress_at=90), rank(5, heartbeat_at=92, progress_at=90)]
    assert watching(*stopped, answered=92).hung_ranks(101) is None
    assert "the store" in watching(*stopped, answered=92).hung_ranks(103)


def test_in_a_long_step_the_silent_rank_is_named_and_not_the_slow_one():
    found = watching(
        rank(5, progress_at=90), rank(5, heartbeat_at=93, progress_at=90), rank(4, progress_at=90)
    ).hung_ranks(101)
    assert found == "no rank made progress for 10 s, and there is no heartbeat from rank 1 (process 7 on node-a)"


def test_the_refusal_says_what_to_do():
    line = watching().refusal("no heartbeat for 10 s from rank 1").line()
    assert line.startswith("error[P-RANK] the run hangs; found no heartbeat for 10 s from rank 1; fix: find")
    assert "--resume True" in line and "--ddp_timeout" in line


def test_a_process_that_was_suspended_itself_blames_nobody(monkeypatch):
    """Suspended and woken, as a laptop or a virtual machine is: all clocks are restarted."""
    watch = watching(rank(5), rank(4))
    times = iter([100.0, 102.0, 500.0, 502.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    waits = iter([False, False, False, True])
    monkeypatch.setattr(watch.ended, "wait", lambda _: next(waits))
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"left with {status}"))
    watch._compare(None)
    assert [rank.heartbeat_at for rank in watch.ranks] == [500.0, 500.0]


def test_short_suspensions_are_not_counted(monkeypatch):
    """A scheduler that shares a machine in turns stops all ranks for a while, again and again, in one long step."""
    watch = watching(rank(5), rank(4))  # of 10 seconds
    times = iter([100.0, 101.0, 106.0, 107.0, 112.0, 113.0])  # looks a second apart, and two stops of four seconds
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    waits = iter([False] * 5 + [True])
    monkeypatch.setattr(watch.ended, "wait", lambda _: next(waits))
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"left with {status}"))
    watch._compare(None)
    assert [rank.progress_at for rank in watch.ranks] == [108.0, 108.0]


def test_one_process_is_not_watched():
    with Watchdog(10) as watch:
        watch.report_progress()
    assert not hasattr(watch, "ranks")


def _two_ranks(number: int, port: int) -> None:
    store = tcp_store("127.0.0.1", port, number, 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    module.LONGEST_INTERVAL = 0.05
    with Watchdog(60) as watch:
        for _ in range(3 + number):
            watch.report_progress()
        other = watch.ranks[1 - number]
        until = time.monotonic() + 30
        while other.progress != 4 - number and time.monotonic() < until:
            time.sleep(0.01)
        assert other.progress == 4 - number
        assert other.process.startswith("process ") and str(os.getpid()) not in other.process
        assert watch.hung_ranks(watch.store_answered_at) is None
        distributed.barrier()
    os._exit(0)


@pytest.mark.slow
def test_ranks_read_each_others_progress():
    mp.spawn(_two_ranks, (free_port(),), nprocs=2)


# R2: one rank killed
def test_the_dead_are_named(tmp_path):
    ended = subprocess.Popen(["true"])  # not waited for: a zombie, as a rank is until its launcher reaps it
    host = socket.gethostname()
    watch = watching(
        *(RankStatus(process=f"process {pid} on {host}") for pid in (os.getpid(), ended.pid)), RankStatus()
    )
    assert watch.dead_on_this_host() == f"rank 1 (process {ended.pid} on {host})"
    ended.wait()
    assert watch.dead_on_this_host() == f"rank 1 (process {ended.pid} on {host})"


def test_of_another_host_nothing_is_known():
    assert watching(RankStatus(process="process 1 on elsewhere"), RankStatus()).dead_on_this_host(patience=0) == ""
    assert Watchdog(10).dead_on_this_host() == ""


DIES_EARLY = """
import os, sys, time
from datetime import timedelta
from torch import distributed
from llava_moslora.training import watchdog as module
from llava_moslora.training.process_group import tcp_store

rank = int(sys.argv[1])
store = tcp_store("127.0.0.1", int(sys.argv[2]), rank, 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
module.announce_rank()
distributed.barrier()
if rank == 1:
    os._exit(9)  # before it watches
module.EXIT_GRACE = 0.5
with module.Watchdog(600):
    distributed.new_group(backend="gloo")  # waits for rank 1
"""


@pytest.mark.slow
def test_a_rank_that_dies_before_it_watches_keeps_nobody_waiting():
    port = str(free_port())
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DIES_EARLY, str(rank), port], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = ranks[0].communicate(timeout=120)[1]
    ranks[1].communicate()
    assert ranks[0].returncode == 75
    assert f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) has ended" in said
