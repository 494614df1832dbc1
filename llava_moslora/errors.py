"""The error type of the package: every user error is reported in one line that states the fix.

A refusal prints as::

    error[C-FLAG] --lora_rr: unknown flag; fix: did you mean --lora_r?

The letter before the dash names the subject and decides the script's exit status, by which a shell script or a job
scheduler can react (``EXIT_STATUS``; 70 and 75 are ``EX_SOFTWARE`` and ``EX_TEMPFAIL`` of sysexits.h).

Scripts run their ``main`` through :func:`run_script`, where every other exception becomes a refusal too: a known
failure of the system or a library, or else a bug, whose traceback is saved.
"""

from __future__ import annotations

import difflib
import errno
import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from llava_moslora.defect_report import save_report
from llava_moslora.stopping import (
    Stopped,
    came,
    catch_stop_signals,
    end_progress_bars,
    keep_standard_streams,
    note_interrupts,
    refuse_if_stopped,
    stdout_works,
)

EXIT_STATUS = {
    "C": 2,  # configuration: a flag, a configuration file, a combination of settings
    "D": 2,  # data: a record or a data file
    "I": 2,  # image
    "K": 3,  # checkpoint or model file
    "E": 4,  # environment: disk, memory, compiler, device, a judge's server
    "R": 5,  # the run itself: a non-finite loss
    "M": 6,  # a plan: the setting does not fit the GPU's memory
    "N": 7,  # a plan: the planner cannot tell; also if the range says that it may or may not fit
    "P": 75,  # interrupted by a signal, another rank or a device: the same command, started again, resumes
    "X": 70,  # a bug in this package: starting again does not help
}

# Messages of gloo, NCCL and the store for a lost connection.
LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|failed to recv|broken pipe|timed out (waiting|connecting)"
    r"|remote process exited|connectFullMesh failed",
    re.IGNORECASE,
)
WORKER = re.compile(
    r"DataLoader worker \(pid|shared memory|/torch_\d+|received \d+ items of ancdata|Too many open files", re.IGNORECASE
)
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE
)
CUDA = re.compile(r"\bCUDA\b|\bcu(da|dnn|blas)\w*(error|status)|\bNCCL\b", re.IGNORECASE)
# Failures of a device, not of a program: they may be gone after a restart.
DEVICE_LOST = re.compile(
    r"unspecified launch failure|\bECC\b|hardware|device is lost|fell off|unknown error|busy or unavailable"
    r"|launch timed out|system not (yet )?initialized|nvlink|\bNCCL\b|remote error|internal error",
    re.IGNORECASE,
)
NCCL_SETTINGS = re.compile(r"NCCL.*(invalid (usage|argument)|Duplicate GPU)|ncclInvalid", re.IGNORECASE | re.DOTALL)
NO_DEVICE = re.compile(
    r"no kernel image|invalid device ordinal|driver version is insufficient|no CUDA-capable device|no NVIDIA driver",
    re.IGNORECASE,
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors that are not about a folder's name or permissions: they have a message of their own
NOT_OF_THE_PLACE = (*FULL, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Refusal(ValueError):
    """Input that cannot be used, with the fix.

    Args:
        code: ``LETTER-WORD``; the letter is a key of :data:`EXIT_STATUS`.
        what: the rule that was broken, as a phrase.
        file: the file or folder at fault.
        record: index of the record in ``file``, from 0.
        record_id: the record's own ``id``.
        key: the flag, JSON key or tensor name at fault.
        found, expected: what was there, and what should have been. Control characters are escaped, long values cut.
        fix: what to do.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        file: object = None,
        record: int | None = None,
        record_id: object = None,
        key: str | None = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ):
        assert code[:1] in EXIT_STATUS, f"unknown refusal code {code!r}"
        self.code, self.what, self.file, self.record, self.record_id = code, what, file, record, record_id
        self.key, self.found, self.expected, self.fix = key, found, expected, fix
        super().__init__(self.line())

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.code[0]]

    def line(self) -> str:
        """The refusal as one printable line, without newline."""
        place = "" if self.file is None else printable(self.file)
        if self.record is not None:
            place += (":" if place else "") + f"record {self.record}"
        if self.record_id is not None:
            place += f" id={printable(self.record_id)}"
        if self.key is not None:
            place += (":" if place else "") + printable(self.key)
        parts = [(f"{place}: " if place else "") + printable(self.what, 1000)]
        for name in ("found", "expected"):
            if (value := getattr(self, name)) is not None:
                parts.append(f"{name} {printable(value)}")
        if self.fix:
            parts.append(f"fix: {printable(self.fix, 1000)}")
        return f"error[{self.code}] " + "; ".join(parts)

    def __reduce__(self):  # for pickle: a data worker's refusal crosses a process boundary
        parts = {k: v for k, v in self.__dict__.items() if k not in ("code", "what")}
        return _rebuild, (self.code, self.what, parts)


def _rebuild(code: str, what: str, parts: dict) -> Refusal:
    return Refusal(code, what, **parts)


def printable(value: object, limit: int = 300) -> str:
    """``value`` as one line: control, bidirectional and newline characters escaped, cut after ``limit`` characters."""
    text = value if isinstance(value, str) else str(value)
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text[: limit + 1]
    )
    return text if len(text) <= limit else text[:limit] + "…"


def few(names: Iterable[object], count: int = 3) -> str:
    """The first ``count`` of ``names`` for a message, and how many more there are."""
    texts = list(map(str, names))
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "")


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Which of the ``known`` words was probably meant, as the ``fix`` of a refusal: those that begin or end with
    ``value``, else the one that was mistyped; "" if none is near."""
    words = {word.lower(): word for word in known}
    longer = [word for word in words if value and (word.startswith(value.lower()) or word.endswith(value.lower()))]
    near = longer if 0 < len(longer) <= 5 else difflib.get_close_matches(value.lower(), words, n=1)
    return f"did you mean {' | '.join(words[word] for word in near)}?" if near else ""


def unknown_value(flag: str, found: object, known: Sequence[str], what: str = "unknown value") -> Refusal:
    """The refusal of a flag's value that is not one of the ``known`` ones."""
    fix = did_you_mean(str(found), known) or None
    return Refusal("C-FLAG", what, key=flag, found=found, expected=" | ".join(known), fix=fix)


def run_script(main: Callable[[], object]) -> None:
    """Run a script's ``main``; whatever it raises becomes one line on stderr and an exit status.

    With ``LLAVA_MOSLORA_DEBUG=1`` in the environment the traceback is printed too.
    Ctrl-C and other exceptions while the script's modules are imported later end in the same way.
    """
    keep_standard_streams()
    catch_stop_signals()
    sys.excepthook = _leave_while_importing
    try:
        note_interrupts(False)
        refuse_if_stopped()
        main()
        refuse_if_stopped()
        if sys.stdout is not None:  # None: it was closed from the start
            sys.stdout.flush()  # while a full disk behind it can still change the exit status
        note_interrupts(True)
    except SystemExit:
        if came:  # and a library lost its exception
            leave(_stopped(came[0]))
        raise
    except BaseException as error:  # the boundary: nothing leaves a script as a traceback
        leave(known_failure(error) or defect(error))


def _leave_while_importing(kind: object, error: BaseException, trace: object) -> None:
    leave(known_failure(error) or defect(error))


def leave(refusal: Refusal) -> NoReturn:
    """Print the refusal as one line on stderr and exit with its status."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once, without a traceback
    rank, ranks = (int(text) if (text := os.environ.get(n, "")).isdecimal() else 0 for n in ("RANK", "WORLD_SIZE"))
    if rank > 0:
        # Usually all ranks refuse the same thing at the same time. Rank 0 prints it, and the launcher ends the others
        # within a second; a rank that is still alive then was alone in refusing.
        time.sleep(5)
    try:
        end_progress_bars(rank)
        if os.environ.get("LLAVA_MOSLORA_DEBUG"):
            traceback.print_exc()
        print(refusal.line(), file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass  # stderr is closed
    if rank == 0 and ranks > 1 and refusal.code == "P-RANK":
        time.sleep(5)  # the launcher reports the first status: that should be the lost rank's
    if not stdout_works():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else flushing the rest at exit would change the status
    sys.exit(refusal.exit_status)


def known_failure(error: BaseException) -> Refusal | None:
    """The refusal for an error, or its cause, of the system, a device or another process; None for a bug."""
    if came:
        return _stopped(came[0])
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Refusal):  # a library wrapped it
            return cause
        if found := _failure_of_system(cause) or _failure_of_library(cause):
            return found
        cause = cause.__cause__
    return None


def _failure_of_system(error: BaseException) -> Refusal | None:
    first = _first_line(error)
    if isinstance(error, KeyboardInterrupt | Stopped):
        return _stopped("Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error))
    if isinstance(error, MemoryError):
        return Refusal("E-MEMORY", "not enough memory on this machine", found=first, fix="a machine with more memory")
    if not isinstance(error, OSError):
        return None
    if isinstance(error, ConnectionError):
        if isinstance(error, BrokenPipeError) and not stdout_works():
            return Refusal("E-OUTPUT", "the reader of the output was closed", found=first, fix="redirect it to a file")
        return Refusal(
            "P-CONNECTION", "a connection to another process was lost", found=first,
            fix="see why it ended, then start the same command again",
        )  # fmt: skip
    return _failure_by_number(error.errno, error.filename2 or error.filename or _place_of_output(), first)


def _stopped(by: str) -> Refusal:
    return Refusal("P-STOPPED", f"stopped by {by}", fix="start the same command again")


def failure_in(text: str, file: object) -> Refusal | None:
    """The refusal for a system error in the output of another process, which wrote ``file``; None for a bug."""
    numbers = re.findall(r"\[Errno (\d+)\]|\(os error (\d+)\)", text)
    return _failure_by_number(int("".join(numbers[-1])), file, text.strip().splitlines()[-1]) if numbers else None


def _failure_by_number(number: int | None, file: object, found: str) -> Refusal | None:
    if number in FULL:
        return Refusal("E-DISK", "the disk is full", file=file, found=found, fix="free space, then start again")
    if number in FORBIDDEN:
        fix = "give this user permission, or choose another place"
        return Refusal("E-PERMISSION", "not permitted", file=file, found=found, fix=fix)
    if number in (errno.EMFILE, errno.ENFILE):
        return Refusal("E-FILES", "too many open files", file=file, found=found, fix="raise the limit: ulimit -n 4096")
    if number == errno.ENOMEM:
        return Refusal("E-MEMORY", "not enough memory on this machine", found=found, fix="a machine with more memory")
    if number == errno.EIO:
        return Refusal("E-DISK", "the disk cannot be read or written", file=file, found=found, fix="check the disk")
    return None


def _failure_of_library(error: BaseException) -> Refusal | None:
    """Errors of torch, NCCL and libraries in Rust and C++, recognised from their text."""
    kind, text, first = type(error).__name__, str(error), _first_line(error)
    if number := re.search(r"\(os error (\d+)\)", text):  # of Rust: safetensors, tokenizers
        return _failure_by_number(int(number[1]), _place_of_output(), first)
    if not isinstance(error, RuntimeError):
        return None
    if WORKER.search(text):
        return worker_failure(first)
    if kind == "OutOfMemoryError" or NO_MEMORY.search(text):
        fix = "smaller batches, or a device or machine with more memory"
        return Refusal("E-MEMORY", "not enough memory on the device or host", found=first, fix=fix)
    if "address already in use" in text.lower() or "EADDRINUSE" in text:
        return Refusal("E-PORT", "the port is already in use", found=first, fix="choose another port")
    if NCCL_SETTINGS.search(text):
        return Refusal("E-NCCL", "NCCL cannot be used like this", found=first, fix="NCCL_DEBUG=WARN shows the reason")
    if kind in ("DistBackendError", "DistNetworkError", "DistStoreError") or LOST.search(text):
        return Refusal(
            "P-RANK", "lost contact with another process of this run", found=first,
            fix="see why it ended, then start the same command again with --resume True",
        )  # fmt: skip
    if NO_DEVICE.search(text):
        fix = "see nvidia-smi, and the CUDA version that torch was built for"
        return Refusal("E-DEVICE", "the device cannot be used", found=first, fix=fix)
    if CUDA.search(text) and DEVICE_LOST.search(text):
        fix = "start the same command again; if it fails again, see dmesg and nvidia-smi -q"
        return Refusal("P-DEVICE", "the device failed", found=first, fix=fix)
    return None


def worker_failure(found: str) -> Refusal:
    """A data loader's process ended, or could not start or pass on its batch."""
    return Refusal(
        "E-WORKER", "a process that reads images died", found=found,
        fix="lower --dataloader_num_workers, or give the machine more memory, shared memory (/dev/shm) and open files "
        "(ulimit -n)",
    )  # fmt: skip


def defect(error: BaseException) -> Refusal:
    """Saves a report of an unexpected exception; the refusal names its file."""
    file, where = save_report(error, _place_of_output("--output_dir")), traceback.extract_tb(error.__traceback__)
    place = f" at {where[-1].filename}:{where[-1].lineno}" if where else ""
    saved = f"report it with {file}" if file else "LLAVA_MOSLORA_DEBUG=1 shows the traceback: report it"
    return Refusal("X-DEFECT", "a bug in this package", found=f"{_first_line(error)}{place}", fix=saved)


def _place_of_output(*flags: str) -> Path | None:
    """What the command writes: for an error that names no file."""
    if not (flags or stdout_works()):
        return Path("standard output")
    words = dict(itertools.pairwise(part for word in sys.argv[1:] for part in word.split("=", 1)))
    flags = flags or ("--output_dir", "--output", "--report_dir", "--data_cache")
    return next((Path(words[flag]) for flag in flags if flag in words), None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
