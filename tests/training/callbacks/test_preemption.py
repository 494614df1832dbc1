"""A signal is heard, agreed on, and ends in a published checkpoint and status 75."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch import distributed
from transformers import TrainerControl, TrainerState, TrainingArguments

from llava_moslora.errors import Refusal
from llava_moslora.runs.checkpoints import checkpoints, newest_valid, step_of
from llava_moslora.training.callbacks.preemption import SIGNALS, Preemption, catch_lost_ranks, ignore_signals
from support.launching import LAUNCHER, ROOT, flags, free_port


@pytest.fixture
def pause():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test run below nohup ignores it
    pause = Preemption()
    yield pause
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def second_rank(monkeypatch, pause):
    """As ``pause``, of rank 1."""
    monkeypatch.setenv("RANK", "1")
    return Preemption()


@pytest.fixture
def trainer(tmp_path):
    """Arguments, state and control as a Trainer hands them to its callbacks, at step 3 of 10."""
    state = TrainerState(global_step=3, max_steps=10)
    return TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl()


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_it_leaves_at_once(pause, number):
    with pytest.raises(SystemExit) as leaving:
        os.kill(os.getpid(), number)
    assert leaving.value.code == 75


@pytest.mark.parametrize("number", SIGNALS)
def test_while_training_the_step_is_finished_and_saved(pause, trainer, number, capfd):
    args, state, control = trainer
    pause.on_train_begin(args, state, control)
    pause.on_step_end(args, state, control)
    assert not control.should_save and not control.should_training_stop
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # at once again: a terminal and a launcher both send it
    assert f"{number.name}: finishing the step" in capfd.readouterr().err
    pause.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop
    pause.on_train_end(args, state, control)
    with pytest.raises(Refusal, match=r"P-PAUSED.*start the same command again with --resume True") as refusal:
        pause.refuse_if_interrupted("run")
    assert refusal.value.exit_status == 75


def test_other_ranks_are_silent(second_rank, trainer, capfd):
    """Rank 0 says what happens, once for all of them."""
    args, state, control = trainer
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
    second_rank.on_train_begin(args, state, control)
    os.kill(os.getpid(), signal.SIGTERM)
    second_rank.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop
    second_rank.on_train_end(args, state, control)
    with pytest.raises(SystemExit) as leaving:
        second_rank.refuse_if_interrupted("run")
    assert leaving.value.code == 75 and capfd.readouterr().err == ""


def test_rank_0_names_another_ranks_signal(pause, trainer, monkeypatch, capfd):
    args, state, control = trainer
    pause.on_train_begin(args, state, control)
    pause._group = "all ranks"
    monkeypatch.setattr(distributed, "all_reduce", lambda number, *_: number.fill_(signal.SIGUSR1))
    for _ in range(2):
        pause.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop
    assert capfd.readouterr().err.splitlines() == [
        "SIGUSR1: finishing the step and publishing a checkpoint; SIGUSR1 again ends at once"
    ]


def test_the_death_of_the_deepspeed_command_is_a_signal(pause, trainer, monkeypatch, capfd):
    args, state, control = trainer
    pause.on_train_begin(args, state, control)
    pause.on_step_end(args, state, control)
    assert not control.should_save
    monkeypatch.setattr(pause.launcher, "died", lambda: True)
    pause.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop
    said = capfd.readouterr().err
    assert said.startswith("the deepspeed command has ended\nSIGTERM: finishing the step")
    assert said.count("\n") == 2


def test_a_signal_after_the_death_of_the_command_is_the_first(pause, trainer, monkeypatch):
    """Such as of a scheduler that ends the job: the checkpoint is still written."""
    pause.on_train_begin(*trainer)
    monkeypatch.setattr(pause.launcher, "died", lambda: True)
    pause.on_step_end(*trainer)
    now, sent, kill = time.monotonic(), [], os.kill
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    kill(os.getpid(), signal.SIGTERM)
    pause.on_step_end(*trainer)
    assert sent == [] and trainer[2].should_save
    monkeypatch.setattr(time, "monotonic", lambda: now + 20)
    kill(os.getpid(), signal.SIGTERM)
    assert sent == [signal.SIGTERM]


def test_another_use_of_sigusr1_is_left_alone(pause, monkeypatch):
    theirs = signal.signal(signal.SIGUSR1, print)
    Preemption()
    assert signal.signal(signal.SIGUSR1, theirs) is print


def test_alone_no_device_is_asked(pause, trainer):
    """A process without others knows by itself whether it was signalled."""
    _, state, control = trainer
    pause.on_train_begin(None, state, control)
    pause.on_step_end(None, state, control)
    os.kill(os.getpid(), signal.SIGTERM)
    pause.on_step_end(None, state, control)
    assert control.should_training_stop


def test_a_second_one_later_ends_at_once(pause, trainer, monkeypatch):
    pause.on_train_begin(*trainer)
    os.kill(os.getpid(), signal.SIGTERM)
    pause.received_at -= 10
    sent = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    kill(os.getpid(), signal.SIGINT)  # another kind is no impatience
    assert sent == []
    kill(os.getpid(), signal.SIGTERM)
    assert sent == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_at_the_last_step_there_is_nothing_to_go_on_with(pause, trainer):
    args, state, control = trainer
    pause.on_train_begin(args, state, control)
    os.kill(os.getpid(), signal.SIGTERM)
    state.global_step = 10
    pause.on_step_end(args, state, control)
    pause.on_train_end(args, state, control)
    pause.refuse_if_interrupted("run")


def test_loader_processes_let_it_pass(pause):
    ignore_signals(0)
    for number in SIGNALS:
        os.kill(os.getpid(), number)


# R2: one rank killed
@pytest.mark.parametrize(
    "lost",
    [  # as they were met when a rank was killed
        "[/pytorch/third_party/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:41234\nmore",
        "[/pytorch/third_party/gloo/pair.cc:534] Read error [127.0.0.1]:41234: Connection reset by peer\nmore",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?\nmore",
        "Timed out waiting 1800000ms for recv operation to complete\nmore",
    ],
)
def test_a_lost_rank_is_told_in_one_line(lost):
    contact_lost = r"P-RANK.*lost contact with another process.*--resume True"
    with (
        pytest.raises(Refusal, match=contact_lost) as refusal,
        catch_lost_ranks(lambda: "rank 1 (process 7 on node-a)"),
    ):
        raise RuntimeError(lost)
    assert refusal.value.exit_status == 75 and "more" not in str(refusal.value)
    assert f"found rank 1 (process 7 on node-a); {lost.splitlines()[0]}" in str(refusal.value)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), catch_lost_ranks():
        raise RuntimeError("shapes do not match")


# R1: SIGTERM and SIGINT
@pytest.mark.slow
@pytest.mark.parametrize("to", ["one rank", "the launcher", "the command"])
def test_under_deepspeeds_launcher(parts, tmp_path, to):
    """One rank's status comes through; a launcher that is itself told to end says 1, after its ranks have published.
    The command ends at once, and its ranks notice."""
    run = tmp_path / "run"
    settings = {"deepspeed": "zero_configs/zero2.json", "max_steps": 500, "save_steps": 2, "save_total_limit": 2}
    arguments = flags(parts, run, **settings, dataloader_num_workers=1, resume=True)
    command = [*LAUNCHER, "--master_port", str(free_port()), "scripts/train_vit_llm.py", *arguments]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    with (tmp_path / "said").open("w") as said:
        deepspeed = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
    until = time.monotonic() + 400
    while not checkpoints(run):
        assert deepspeed.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.5)
    launcher = psutil.Process(deepspeed.pid).children()[0]
    ranks = [p for p in launcher.children() if "train_vit_llm.py" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    {"one rank": ranks[1], "the launcher": launcher, "the command": deepspeed}[to].send_signal(signal.SIGTERM)
    status = deepspeed.wait(120)
    _, left = psutil.wait_procs([launcher, *ranks], timeout=60)
    text = (tmp_path / "said").read_text()
    assert not left, text[-3000:]
    assert status == {"one rank": 75, "the launcher": 1, "the command": -signal.SIGTERM}[to], text[-3000:]
    assert text.count("SIGTERM: finishing the step") == text.count("error[P-PAUSED]") == 1, text[-3000:]
    assert text.count("Loading weights: 100%") == 2 and "Traceback" not in text, text  # of LLM and tower
    newest, skipped = newest_valid(run)
    assert skipped == []
    last = max(int(step) for step in re.findall(r"\s(\d+)/500 \[", text))
    assert step_of(newest) >= last  # the step that was under way is in it
    shutil.rmtree(run)
