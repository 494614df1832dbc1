"""Waiting for the process that builds a data cache: it is named, and who waits for one that stands still gives up."""

import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import time

import pytest

from llava_moslora.data import cache_lock as module
from llava_moslora.data import tokenise
from llava_moslora.data.cache_lock import locked, report_progress
from llava_moslora.errors import Refusal
from support.zero_runs import settings

CONTEXT = multiprocessing.get_context("fork")
PATIENCE = 1.0


def _hold(target, ready, work) -> None:
    with locked(target, "data.json", 60):
        ready.set()
        work()


@pytest.fixture
def builder(tmp_path):
    """``builder(work)``: a process that holds the lock of ``tmp_path / "cache"`` while it works; its number."""
    children = []

    def start(work) -> int:
        ready = CONTEXT.Event()
        children.append(CONTEXT.Process(target=_hold, args=(tmp_path / "cache", ready, work)))
        children[-1].start()
        assert ready.wait(30)
        time.sleep(0.1)  # it writes its name before it works
        return children[-1].pid

    yield start
    for child in children:
        child.kill()
        child.join()


def test_a_stopped_builder_is_named_and_not_waited_for(builder, tmp_path, monkeypatch, caplog):
    """Before, the other ranks waited for ever, and said nothing."""
    monkeypatch.setattr(module, "SAID_AFTER", 0.2)
    pid = builder(lambda: time.sleep(60))
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(Refusal, match="makes no progress") as refusal,
        locked(tmp_path / "cache", "data.json", PATIENCE),
    ):
        pytest.fail("two hold the lock")
    assert time.monotonic() - began < 20
    assert refusal.value.exit_status == 75  # to be started again
    assert refusal.value.line().startswith(
        f"error[P-RANK] data.json: the process that prepares this file makes no progress; found process {pid} on "
    )
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"process {pid} on ") and said[0].endswith("; waiting for it")


@pytest.mark.parametrize("way", ["parts", "images"])
def test_a_slow_builder_is_waited_for(builder, tmp_path, way):
    """Several times as long as a standstill may last: it writes parts, or says that it checks images."""
    staging = tmp_path / "cache.0badcafe.staging"
    staging.mkdir()

    def work() -> None:
        for number in range(25):
            time.sleep(PATIENCE / 10)
            (staging / f"{number:06d}.json").touch() if way == "parts" else report_progress(tmp_path / "cache")
        (tmp_path / "done").touch()

    builder(work)
    with locked(tmp_path / "cache", "data.json", PATIENCE):
        assert (tmp_path / "done").exists()
    assert not (tmp_path / "cache.builder").exists()


def _slow(work):
    def slow(*args):
        time.sleep(PATIENCE / 5)
        return work(*args)

    return slow


@pytest.mark.parametrize(("slow", "processes"), [("check_record", 1), ("check_record", 2), ("check_bytes", 1)])
def test_one_shard_that_takes_long_is_waited_for(
    prepare_files, image_folder, tmp_path, monkeypatch, caplog, slow, processes
):
    """Nothing is written until its end; a tar's images are all read before its first record."""
    image = (image_folder / "0.png").read_bytes()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    records = [{"id": str(k), "image": f"{k}.png", "conversations": turns} for k in range(15)]
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        members = {f"{k}.png": image for k in range(len(records))} | {"all.json": json.dumps(records).encode()}
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(module, "SAID_AFTER", 0.2)

    def prepared():
        return prepare_files(tmp_path / "one.tar", patience=PATIENCE, preprocessing_num_workers=processes)

    with monkeypatch.context() as patched:
        patched.setattr(tokenise, slow, _slow(getattr(tokenise, slow)))
        other = CONTEXT.Process(target=prepared)
        other.start()
    while not list((tmp_path / "cache").glob("*.builder")):
        assert other.is_alive()
        time.sleep(0.02)
    with caplog.at_level(logging.WARNING):
        assert len(prepared()) == len(records)
    assert f"process {other.pid} on " in caplog.text  # which built it, and not this one
    other.join(30)
    assert other.exitcode == 0


def test_of_many_ranks_two_say_it(builder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "SAID_AFTER", 0)
    monkeypatch.setattr(module, "rank", lambda: 2)
    builder(lambda: time.sleep(0.5))
    with caplog.at_level(logging.WARNING), locked(tmp_path / "cache", "data.json", 60):
        assert not caplog.records


@pytest.mark.slow
def test_the_other_rank_ends(warm_server, parts, tmp_path):
    words = settings(parts, tmp_path / "run", max_steps=1, ddp_timeout=5, data_cache=tmp_path / "cache")
    hooks = [["support.ranks:stop_while_building", {}]]
    launch = warm_server.launch(words, tmp_path / "launch", world=2, hooks=hooks, limit=40)
    assert sorted(launch.status) == [-9, 75]  # the first is ended by its launcher, which this one does at the limit
    printed = launch.printed(launch.status.index(75))
    assert "error[P-RANK]" in printed and "the process that prepares this file makes no progress" in printed
