"""The runs of a study as processes: in parallel on several GPUs, on a CPU one at a time or as many as requested.

A run is one process of ``scripts/train_vit_llm.py``, or of DeepSpeed's launcher if the run has ``--deepspeed`` or
several GPUs, followed by one for every evaluation. It resumes where it was stopped, because every run has
``--resume True``. When the study ends, however it ends, its processes are told to stop (on Linux also after kill -9);
a training process that continues, such as one below DeepSpeed's launcher, is waited for when the study is restarted.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from llava_moslora.errors import EXIT_STATUS, Refusal
from llava_moslora.files.disk import naming, read_json, replace_json
from llava_moslora.studies.runs import DIVERGED, DONE, LOG, Run, evaluation_folder, write_asked
from llava_moslora.studies.study_file import Measure

SCRIPTS = Path(__file__).parents[1] / "scripts"  # of an installed package
if not SCRIPTS.is_dir():
    SCRIPTS = Path(__file__).parents[2] / "scripts"
TRAINING = (sys.executable, str(SCRIPTS / "train_vit_llm.py"))
LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))
TRAIN = "training"
NONFINITE = "R-NONFINITE"  # error code of a run that stopped at a loss of NaN or Inf: it diverged
POLL = 0.1  # seconds
PATIENCE = 600  # seconds for a stopped process to save its step
LIBC = ctypes.CDLL(None)  # loaded before a fork
STOPS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Slot:
    """The device of one run: the indices of its GPUs; none on a CPU."""

    number: int
    gpus: tuple[str, ...] = ()


@dataclass
class Failure:
    """A failed run or evaluation: its exit status, and the last line of its log."""

    run: Run
    what: str
    status: int
    line: str

    @property
    def expected(self) -> bool:
        """Divergence while tuning, from too high a learning rate: a valid result."""
        return self.run.tuning and self.run.diverged


@dataclass
class Job:
    """A run with its evaluations; ``steps`` yields the command of each process, the next one after success."""

    run: Run
    steps: Iterator[tuple[str, list[str]]]
    slot: Slot | None = None
    what: str = ""
    command: list[str] | None = None
    waited: bool = False
    process: subprocess.Popen | None = None
    began: float = field(default_factory=time.monotonic)


def visible_gpus() -> tuple[str, ...]:
    """As ``CUDA_VISIBLE_DEVICES`` says, else as nvidia-smi does; none on a machine without."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(filter(None, given.split(",")))
    if (tool := shutil.which("nvidia-smi")) is None:
        return ()
    command = [tool, "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


def slots_of(gpus: Sequence[str], per_run: int, parallel: int) -> list[Slot]:
    """
    Args:
        gpus: all of them; none: a CPU. parallel: runs in parallel on a CPU.

    Raises:
        Refusal: C-FLAG, fewer GPUs than one run needs.
    """
    if not gpus:
        return [Slot(number) for number in range(parallel)]
    if len(gpus) < per_run:
        raise Refusal(
            "C-FLAG", "fewer GPUs than a run needs", key="--gpus", found=len(gpus), expected=per_run,
            fix="--gpus_per_run, with a recipe whose batches fit fewer GPUs",
        )  # fmt: skip
    starts = range(0, len(gpus) - per_run + 1, per_run)
    return [Slot(number, tuple(gpus[start : start + per_run])) for number, start in enumerate(starts)]


def training_command(run: Run, slot: Slot) -> list[str]:
    """How a run is started."""
    deepspeed = any(word.partition("=")[0] == "--deepspeed" for word in run.words)
    if not deepspeed and len(slot.gpus) < 2:
        return [*TRAINING, *run.words]
    where = ["--include", f"localhost:{','.join(slot.gpus)}"] if slot.gpus else ["--num_accelerators", "1"]
    return [
        LAUNCHER, *where, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), TRAINING[1], *run.words
    ]  # fmt: skip


def evaluation_command(run: Run, measure: Measure) -> list[str]:
    words = [word for flag, values in measure.flags for word in (f"--{flag}", *values)]
    output = evaluation_folder(run, measure)
    return [sys.executable, str(SCRIPTS / measure.script), str(run.output), *words, "--output", str(output)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def steps_of(
    run: Run, measures: Sequence[Measure], gpus: int, slot: Callable[[], Slot], trained: Callable[[], None]
) -> Iterator:
    """The remaining steps of a run: a name and a command, each taken after the previous one succeeded. ``trained`` is
    called after training."""
    if run.diverged:
        return
    if not run.done:
        write_asked(run, gpus)
        began = time.time()
        yield TRAIN, training_command(run, slot())
        replace_json(
            run.folder / DONE, {"ended": time.strftime("%Y-%m-%d %H:%M:%S %z"), "seconds": time.time() - began}
        )
        trained()
    for measure in measures:
        kept = evaluation_folder(run, measure).with_suffix(".json")
        if measure.script and not kept.is_file():
            yield measure.name, evaluation_command(run, measure)
            replace_json(kept, read_json(evaluation_folder(run, measure) / "results.json"))


def run_all(
    runs: Sequence[Run],
    measures: Sequence[Measure],
    slots: Sequence[Slot],
    gpus: int,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> list[Failure]:
    """Run the unfinished runs, each on the next free slot, and return those that failed. The others continue.

    Args:
        gpus: of a run; 0 on a CPU.
        check: called first and after every successful training; its refusal, of code C-STUDY, ends the study.

    Raises:
        Refusal: P-STOPPED, a signal came: the processes were stopped and ended; ``check``'s.
    """
    check()
    waiting = deque(runs)
    working: dict[Slot, Job] = {}
    failures: list[Failure] = []
    stopped: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: stopped.append(number)) for number in STOPS}
    try:
        while (waiting or working) and not stopped:
            for slot in slots:
                if slot not in working and waiting:
                    working[slot] = _job(waiting.popleft(), measures, gpus, slot, check)
            for slot, job in list(working.items()):
                if _advance(job, failures, say, f"{len(waiting)} waiting"):
                    del working[slot]
            time.sleep(POLL if working else 0)
    finally:
        _stop([job for job in working.values() if job.process is not None])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped:
        name = signal.Signals(stopped[0]).name
        raise Refusal("P-STOPPED", "the study was stopped", found=name, fix="run the same command again: it continues")
    here = {failure.run.folder for failure in failures}
    failures += [failure for failure in diverged(runs) if failure.run.folder not in here]
    return sorted(failures, key=lambda failure: failure.run.name)


def diverged(runs: Sequence[Run]) -> list[Failure]:
    """The runs whose loss became NaN or Inf, now or in an earlier start; they are not repeated."""
    status = EXIT_STATUS[NONFINITE[0]]
    return [Failure(run, TRAIN, status, read_json(run.folder / DIVERGED)["line"]) for run in runs if run.diverged]


def _job(run: Run, measures: Sequence[Measure], gpus: int, slot: Slot, trained: Callable[[], None]) -> Job:
    return Job(run, steps_of(run, measures, gpus, lambda: slot, trained), slot)


def _advance(job: Job, failures: list[Failure], say: Callable[[str], None], left: str) -> bool:
    """Start the job's next process if none is running; whether the job is over."""
    if job.process is not None:
        if (status := job.process.poll()) is None:
            return False
        seconds = time.monotonic() - job.began
        if status:
            failures.append(failure := Failure(job.run, job.what, status, last_line(job.run.folder / LOG)))
            if job.what == TRAIN and failure.line.startswith(f"error[{NONFINITE}]"):
                replace_json(job.run.folder / DIVERGED, {"line": failure.line})
            say(f"{job.run.name}: {job.what} failed, status {status}: {failure.line}")
            job.process = None
            return True
        say(f"{job.run.name}: {job.what} done in {seconds:.0f} s, {left}")
        job.process = None
    if job.command is None:
        try:
            job.what, job.command = next(job.steps)
        except StopIteration:
            return True
        except Refusal as refusal:  # results of an evaluation that cannot be read
            if refusal.code == "C-STUDY":  # it applies to every run
                raise
            failures.append(Failure(job.run, job.what, refusal.exit_status, refusal.line()))
            say(f"{job.run.name}: {refusal.line()}")
            return True
    if job.what == TRAIN and still_trained(job.run):
        if not job.waited:
            say(f"{job.run.name}: waiting for a process that is still training it")
        job.waited = True
        return False
    assert job.slot is not None
    job.began, job.process, job.command = time.monotonic(), start(job.command, job.run, job.slot), None
    return False


def still_trained(run: Run) -> bool:
    """Whether a process that a stopped study left behind holds the lock of the run's folder."""
    if not (run.output / ".lock").is_file():
        return False
    lock = FileLock(run.output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def start(command: Sequence[str], run: Run, slot: Slot) -> subprocess.Popen:
    """A process of the run; what it prints is appended to the run's log."""
    environment = dict(os.environ)
    if slot.gpus and LAUNCHER not in command:  # the launcher gets it by --include
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    file = run.folder / LOG
    with naming(file), file.open("ab") as log:
        log.write(f"$ {json.dumps(list(command), ensure_ascii=False)}\n".encode())
    with file.open("ab") as log:
        return subprocess.Popen(
            command, cwd=run.start, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=partial(_end_with, os.getpid()) if sys.platform == "linux" else None,
        )  # fmt: skip


def _end_with(study: int) -> None:
    """In the new process: ask the kernel for a SIGTERM when the study's ends; a training then saves its step
    (prctl(2))."""
    LIBC.prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != study:  # it has already ended
        os._exit(1)


def _stop(jobs: Sequence[Job]) -> None:
    """Let the processes save their step and end; those that take too long are killed, and resume from their last
    checkpoint."""
    processes = [job.process for job in jobs if job.process is not None]
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # also the ranks below a launcher
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(log: Path) -> str:
    """The refusal that a process printed last, else its last line."""
    if not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [k for k, line in enumerate(lines) if line.startswith("$ [")]
    lines = lines[own[-1] + 1 :] if own else lines
    refusals = [line for line in lines if line.startswith("error[")]
    return (refusals or lines or ["nothing was printed"])[-1]
