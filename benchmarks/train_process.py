"""Starts the runs of benchmarks/train.py one after the other, with as little time between them as possible.

Common imports are done once, and a run is a fork of this process; while one is measured, the next one loads
its weights and waits for the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from train_row import Job

MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("llava", "llama", "clip")]
PRELOADED = ["transformers.trainer", *MODELS, "peft", "datasets", "accelerate", "deepspeed"]
PRELOADED += [f"llava_moslora.{name}" for name in ("data.prepare", "models.assemble", "training.trainer")]
PR_SET_PDEATHSIG = 1  # of Linux's prctl


_capability = torch.cuda.get_device_capability


def postpone_cuda() -> None:
    """Make imports that ask for the GPU's compute capability, as bitsandbytes does, not start CUDA: a process that has
    started it cannot be forked. To be called before the package is imported."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    capability = tuple(int(number) for number in output.split("."))
    torch.cuda.get_device_capability = lambda *_: capability


def resume_cuda() -> None:
    """Undo :func:`postpone_cuda`."""
    torch.cuda.get_device_capability = _capability


def can_fork() -> bool:
    """Import what all runs import; False if an import has started CUDA."""
    for name in PRELOADED:
        importlib.import_module(name)
    resume_cuda()
    if not torch.cuda.is_available():
        return True
    child = os.fork()
    if child == 0:
        try:
            torch.ones(8, device="cuda").sum().item()
            os._exit(0)
        except BaseException as error:
            print(f"CUDA does not start after a fork, so every run gets a new interpreter: {error}", flush=True)
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


class RowProcess:
    """A row's process: a fork of this one, or a new interpreter; its output goes to a log next to the run folder.

    Args:
        limit: seconds that it may have the GPU.
        deadline: on the clock ``time.time``.
    """

    def __init__(self, job: Job, by_fork: bool, limit: float, deadline: float):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.job = replace(job, port=probe.getsockname()[1])
        self.limit, self.deadline, self.stopped, self.opened = limit, deadline, False, None
        shutil.rmtree(job.run, ignore_errors=True)
        for name in ("has-gpu", "result.json", "log"):
            job.file(name).unlink(missing_ok=True)
        log = os.open(job.file("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if by_fork:
            sys.stdout.flush()
            self.id = os.fork()
            if self.id == 0:
                run_forked_row(self.job, log)
        else:
            command = [sys.executable, Path(__file__).with_name("train.py"), "--child", json.dumps(asdict(self.job))]
            self.opened = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
            self.id = self.opened.pid
        os.close(log)

    @property
    def has_gpu(self) -> bool:
        return self.job.file("has-gpu").exists()

    def ended(self) -> bool:
        """To be called until it is True. A process that is over its time is killed."""
        now, over = time.time(), False
        over = now > self.deadline or (self.has_gpu and now - self.job.file("has-gpu").stat().st_mtime > self.limit)
        if over:
            self.stopped = True
            os.killpg(self.id, signal.SIGKILL)
        if self.opened is not None:
            ended = (self.opened.wait() if over else self.opened.poll()) is not None
        else:
            ended = os.waitpid(self.id, 0 if over else os.WNOHANG)[0] != 0
        if ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.id, signal.SIGKILL)  # workers that are left
            for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.job.port}_*"):
                buffer.unlink()  # which DeepSpeed leaves behind on a CPU
        return ended

    def result(self) -> dict:
        """What the row measured, or the end of its log if it did not get to write that."""
        job = self.job
        facts = {"row": job.row, "batch": job.batch, "lengths": job.lengths, "layers": job.layers}
        facts |= {"steps": job.steps, "warm_up": job.warm_up}
        if job.file("result.json").exists():
            return facts | json.loads(job.file("result.json").read_text())
        end = job.file("log").read_text(errors="replace")[-400:]
        return facts | {"status": "stopped: out of time" if self.stopped else "died", "message": end}


def run_forked_row(job: Job, log: int) -> None:
    """Run a row in this process, which was just forked, and exit."""
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a row must not keep the GPU when this is killed
        os.dup2(log, 1)
        os.dup2(log, 2)
        from train_row import run_row

        run_row(job)
        sys.stdout.flush()
    finally:
        os._exit(0)


def measure(
    jobs: list[Job],
    add: Callable[[dict], None],
    *,
    by_fork: bool,
    alone: bool = False,
    limit: float = float("inf"),
    deadline: float = float("inf"),
) -> None:
    """Run the jobs in order and hand each result to ``add`` as soon as it is there.

    Args:
        alone: a row starts when the one before it has ended; else when that one has the GPU.
        limit: seconds that a row may have the GPU.
        deadline: on the clock ``time.time``; what runs then is killed, what has not begun is skipped.
    """
    waiting, running = deque(jobs), deque()
    while waiting or running:
        if running and running[0].ended():
            add(running.popleft().result())
        if waiting and time.time() > deadline:
            print("out of time, not started: " + ", ".join(job.row for job in waiting), flush=True)
            waiting.clear()
        elif waiting and (not running or (not alone and len(running) == 1 and running[0].has_gpu)):
            running.append(RowProcess(waiting.popleft(), by_fork, limit, deadline))
        time.sleep(0.02)
