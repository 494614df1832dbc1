"""Runs readers on wrong files in forked processes with a time and a memory limit, and tells what was not a refusal.

Each case is decided by the seed, the reader's name and the case's number alone, so that one can be repeated::

    FUZZ_ONLY=tokenizer.json:1234 python -m pytest -m faults tests/faults/test_fuzz_readers.py
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llava_moslora.errors import Refusal, known_failure
from support.mutations import mutate

SECONDS, MEMORY = 5.0, 1 << 30  # of a case; memory is counted above what the imports took
PATIENCE = 180.0  # of a process that waits: the processor is shared, the other limit counts its own time
ACCEPTED, REFUSED = "accepted", "refused"


@dataclass(frozen=True)
class Reader:
    """
    Attributes:
        files: name below the seed's folder → kind of mutation; one of them is changed in a case.
        make: writes the seed into an empty folder.
        read: reads it; an exception that is no ``Refusal`` is a finding.
    """

    name: str
    files: dict[str, str]
    make: Callable[[Path], object]
    read: Callable[[Path], object]


@dataclass
class Outcome:
    """Of the cases of one reader."""

    reader: str
    counts: Counter = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0
    megabytes: float = 0.0  # the largest, above the imports
    seconds: float = 0.0


def chance_of(seed: int, name: str, number: int) -> random.Random:
    return random.Random(f"{seed}:{name}:{number}")


def fuzz(reader: Reader, folder: Path, seed: int, numbers: range) -> Outcome:
    """Cases ``numbers`` of ``reader``; a worker that hangs or dies is replaced, and its case is a finding."""
    outcome, begun = Outcome(reader.name), time.monotonic()
    seed_folder = folder / "seed"
    seed_folder.mkdir(parents=True)
    reader.make(seed_folder)
    shutil.copytree(seed_folder, folder / "case")  # some readers change what they read
    result = guarded(lambda: _verdict(reader.read, folder / "case"))
    if result["verdict"] != ACCEPTED:
        outcome.findings.append(f"{reader.name}: the right file itself is {result}")
        return outcome

    work = folder / "case"
    untouched: tuple[str, dict] | None = None  # the file that the last case changed, and all files before it was read

    def case(number: int) -> dict:
        nonlocal untouched
        chance = chance_of(seed, reader.name, number)
        name = chance.choice(sorted(reader.files))
        if untouched is None or _state(work) != untouched[1]:  # a copy takes longer than many a reader
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(seed_folder, work)
        else:
            shutil.copy(seed_folder / untouched[0], work / untouched[0])
        (work / name).write_bytes(mutate((work / name).read_bytes(), reader.files[name], chance))
        untouched = name, _state(work)
        return {"file": name} | _verdict(reader.read, work)

    rest = list(numbers)
    while rest:
        results = _worker(case, rest)
        for number, result in zip(rest, results, strict=False):
            kind = result["verdict"]
            outcome.counts[kind] += 1
            outcome.slowest = max(outcome.slowest, result.get("seconds", SECONDS))
            outcome.megabytes = max(outcome.megabytes, result.get("megabytes", 0.0))
            if kind not in (ACCEPTED, REFUSED):
                outcome.findings.append(f"{reader.name}:{number} {result.get('file')} {kind}: {result.get('said', '')}")
        rest = rest[len(results) :]
    outcome.seconds = time.monotonic() - begun
    return outcome


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """What any change below ``folder`` changes."""
    found = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            found[entry.path] = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if entry.is_dir(follow_symlinks=False):
                found |= _state(Path(entry.path))
    return found


def guarded(call: Callable[[], dict]) -> dict:
    """One call in a process of its own."""
    return _worker(lambda _: call(), [0])[0]


def verdict(call: Callable[[], object]) -> dict:
    """How ``call`` ends under the limits."""
    return guarded(lambda: _verdict(lambda _: call(), Path()))


def _verdict(read: Callable[[Path], object], folder: Path) -> dict:
    begun = time.process_time()
    said = ""
    try:
        with contextlib.redirect_stdout(None):
            read(folder)
        kind = ACCEPTED
    except Refusal as refusal:
        kind, said = REFUSED, refusal.line()
        if not said.isprintable() or len(said) > 5000 or refusal.exit_status == 70:
            kind = "an unreadable refusal"
    except BaseException as error:
        if (refusal := known_failure(error)) and refusal.code != "E-MEMORY":  # as every script's boundary prints it
            return {
                "verdict": REFUSED,
                "said": refusal.line(),
                "seconds": time.process_time() - begun,
                "megabytes": _peak(),
            }
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "llava_moslora" in f.filename][-2:]
        kind, said = (
            type(error).__name__,
            f"{str(error)[:200]!r} at {' '.join(ours)} {where[-1].filename}:{where[-1].lineno}",
        )
    seconds = time.process_time() - begun
    if seconds > SECONDS:
        kind = f"{seconds:.1f} s"
    return {"verdict": kind, "said": said, "seconds": seconds, "megabytes": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _worker(case: Callable[[int], dict], numbers: list[int]) -> list[dict]:
    """Results of ``numbers`` up to the first that hangs or kills the process; that one is the last."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(out)
            _limit()
            gc.freeze()  # what was imported is never collected: looking through it takes longer than most cases
            before = _peak()
            with os.fdopen(into, "w", buffering=1) as stream:
                for number in numbers:
                    signal.setitimer(signal.ITIMER_PROF, SECONDS * 1.2)  # ends the process
                    result = case(number)
                    result["megabytes"] = max(0.0, result["megabytes"] - before)
                    print(json.dumps(result), file=stream)
            code = 0
        finally:
            os._exit(code)
    os.close(into)
    results, data, hung = [], b"", False
    while True:
        if not select.select([out], [], [], PATIENCE)[0]:
            if _wants_to_run(child):
                continue  # other programs have the processor; the limit on its own time holds
            hung = True
            os.kill(child, signal.SIGKILL)
            break
        if not (block := os.read(out, 1 << 20)):
            break
        data += block
    os.close(out)
    _, status = os.waitpid(child, 0)
    results = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    if len(results) < len(numbers):
        hung = hung or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
        said = "hangs" if hung else f"the process ended with status {status}"
        results.append({"verdict": said})
    return results


def _wants_to_run(process: int) -> bool:
    """Whether ``process`` is not waiting for anything but a processor."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "R"


def _limit() -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # pytest's would write a page for each process that is ended
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    sys.stdout = open(1, "w")  # noqa: SIM115 (pytest's is a file of the parent)
    sys.stderr = open(2, "w")  # noqa: SIM115
