"""A disk that fails at a chosen operation, whoever writes: Python, Rust or C++ (full_disk.c, by LD_PRELOAD).

A command writes into one folder, the disk. It runs once undisturbed, which counts its operations there. Then, from the
same beginning, operation 0, 1, 2 … fails; after each of them the command runs again with space.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.warm_server import Launch, WarmServer

LAYOUT = "qqqq1024s1024s"  # struct state of full_disk.c
SOURCE = Path(__file__).with_name("full_disk.c")
STEP = int(os.environ.get("DISK_STEP", "9"))


def library(folder: Path) -> Path:
    """Compile full_disk.c."""
    built = folder / "full_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, SOURCE, "-ldl"], check=True)
    return built


def begin(*, state: str) -> None:
    """A hook for :mod:`support.warm_server`: from here on operations count, also of processes that are started."""
    os.environ["FULL_DISK"] = state
    ctypes.CDLL(None).full_disk_begin(os.fsencode(state))


@dataclass
class Command:
    """A script's ``main`` with its arguments.

    Attributes:
        main: ``MODULE:FUNCTION``. words: its arguments. reads: folders that are on the disk from the beginning.
        free: patterns of files whose content is not the same in two undisturbed runs.
    """

    main: str
    words: list
    reads: dict[str, Path] = field(default_factory=dict)
    free: Sequence[str] = ()
    hooks: Sequence[list] = ()


@dataclass
class Failed:
    """One operation failed: where, how the command ended, and what is wrong with that."""

    number: int
    operation: str
    status: int
    printed: str
    wrong: list[str]

    def __str__(self) -> str:
        return f"#{self.number} {self.operation}: status {self.status}: {'; '.join(self.wrong)}\n{self.printed[-1500:]}"


class Disk:
    """The folder ``disk`` in ``folder``, of which a command's operations fail."""

    def __init__(self, server: WarmServer, folder: Path):
        self.server, self.folder, self.disk = server, folder, folder / "disk"
        self.state, self.launches = folder / "state", 0

    def launch(self, command: Command, fails: int = -1, error: int = errno.ENOSPC, stays: bool = True) -> Launch:
        place = os.fsencode(self.disk)
        self.state.write_bytes(struct.pack(LAYOUT, 0, fails, error, stays, place, b""))
        self.launches += 1
        hooks = [["support.full_disk:begin", {"state": str(self.state)}], *command.hooks]
        output = self.folder / f"launch{self.launches}"
        return self.server.launch(command.words, output, main=command.main, hooks=hooks, limit=300)

    def counted(self) -> tuple[int, str]:
        count, _, _, _, _, failed = struct.unpack(LAYOUT, self.state.read_bytes())
        return count, failed.rstrip(b"\0").decode().replace(f"{self.disk}/", "")

    def begin(self, command: Command) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        self.disk.mkdir()
        for name, source in command.reads.items():
            shutil.copytree(source, self.disk / name, symlinks=True)

    def undisturbed(self, command: Command) -> tuple[int, dict[str, str]]:
        """The number of operations, and the files at the end."""
        self.begin(command)
        launch = self.launch(command)
        assert launch.succeeded, launch.printed()[-3000:]
        return self.counted()[0], files(self.disk, command.free)

    def fail_everywhere(
        self, command: Command, numbers: Callable[[int], Iterable[int]] | None = None, error: int = errno.ENOSPC,
        codes: Sequence[str] = ("E-DISK",), stays: bool = True, again: bool = True,
    ) -> list[Failed]:  # fmt: skip
        """Everything that went wrong, over all operations or those that ``numbers`` chooses of their count."""
        count, expected = self.undisturbed(command)
        assert count > 0
        found = []
        for number in range(count) if numbers is None else numbers(count):
            self.begin(command)
            before = files(self.disk)
            launch = self.launch(command, number, error, stays)
            operation = self.counted()[1]
            failed = Failed(number, operation, launch.status[0], launch.printed(), [])
            lines = [line for line in launch.printed().splitlines() if line.startswith("error[")]
            if not operation:
                continue  # fewer operations than counted: nothing failed
            if launch.succeeded:
                if (now := files(self.disk, command.free)) != expected:
                    failed.wrong.append(f"succeeded, but differs: {differing(now, expected)}")
            else:
                if len(lines) != 1 or not lines[0].startswith(tuple(f"error[{code}]" for code in codes)):
                    failed.wrong.append(f"not one line of {codes}")
                elif launch.status != [2 if lines[0].startswith("error[C") else 4]:
                    failed.wrong.append("another status than the line's")
                elif str(self.disk) not in lines[0]:
                    failed.wrong.append("the line names no path")
            if "Traceback" in launch.printed():
                failed.wrong.append("a traceback")
            after = files(self.disk)
            if lost := [name for name in before if after.get(name) != before[name]]:
                failed.wrong.append(f"lost: {lost}")
            if again and not launch.succeeded:
                second = self.launch(command)
                now = files(self.disk, command.free)
                if not second.succeeded:
                    failed.wrong.append(f"does not work afterwards: {second.printed()[-600:]}")
                elif now != expected:
                    failed.wrong.append(f"ends differently: {differing(now, expected)}")
            if failed.wrong:
                found.append(failed)
        return found


def every(step: int) -> Callable[[int], Iterable[int]]:
    """Of a count, each ``step``-th; it begins elsewhere for every count."""
    return lambda count: range(count % step, count, step)


def none_wrong(found: Sequence[Failed]) -> None:
    assert not found, "\n\n".join(map(str, found))


def ends_well(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def files(folder: Path, free: Sequence[str] = ()) -> dict[str, str]:
    """Hash by relative path; of files that ``free`` names only that they are there. Locks do not count."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or path.name in (".locked_by", ".lock") or path.name.startswith(".lock-"):
            continue
        changing = next((pattern for pattern in free if name.match(pattern)), None)
        found[changing or str(name)] = "there" if changing else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))[:6]
