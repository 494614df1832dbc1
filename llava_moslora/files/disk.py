"""Files and folders that a crash or a power cut leaves whole: written under another name, fsynced, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write ``path``: after a crash it holds ``content`` or what it held before. The folder is not fsynced."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def replace_folder(staging: Path, target: Path, old: Path) -> None:
    """Rename ``staging`` to ``target``. A folder of that name is renamed to ``old`` first and deleted last."""
    replaces = target.exists()
    if replaces:  # a rename needs the name free
        os.rename(target, old)
    os.rename(staging, target)
    fsync(target.parent)
    if replaces:
        delete(old)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A staging folder to write into; it becomes ``target``, which must not exist, when the block ends without an
    error, and is deleted otherwise."""
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            fsync(path)
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync(target.parent)


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with everything in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
