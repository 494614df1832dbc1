"""Strict reading of JSON objects; atomic replacement of files and folders (write elsewhere, fsync, rename)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llava_moslora.errors import Refusal
from llava_moslora.files.json import LARGEST, parse_json

DOWNLOAD_AGAIN = "copy or download it again"


def read_json(file: Path, code: str | None = None, *, finite: bool = True, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a UTF-8 file, read strictly: :func:`llava_moslora.files.json.parse_json`.

    Args:
        code: of the refusals, in the place of the two below. finite: False: NaN and Infinity are read too.
        largest: size in bytes.

    Raises:
        Refusal: K-MISSING, no such file, or it cannot be read; K-JSON, not valid JSON, or not an object.
    """
    try:
        value = parse_json(file.read_bytes(), finite=finite, largest=largest)
    except (FileNotFoundError, NotADirectoryError) as error:
        fix = "download it, or check the path"
        raise Refusal(code or "K-MISSING", "no such file", file=file, fix=fix) from error
    except OSError as error:
        fix = "fix its permissions"
        raise Refusal(code or "K-MISSING", "cannot be read", file=file, found=error.strerror, fix=fix) from error
    except UnicodeDecodeError as error:
        raise Refusal(code or "K-JSON", "not UTF-8", file=file, found=error, fix=DOWNLOAD_AGAIN) from error
    except ValueError as error:
        raise Refusal(code or "K-JSON", "not valid JSON", file=file, found=error, fix=DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise Refusal(code or "K-JSON", "not a JSON object", file=file, found=kind, fix=DOWNLOAD_AGAIN)
    return value


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to system errors while it is written: a failed write does not know its file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8, in place: for files of a folder that is published when it is complete."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """As :func:`write_text`."""
    write_text(path, _text(content))


def replace_json(path: Path, content: object) -> None:
    """As :func:`write_json`, atomically: a reader sees the old file or the new one, also after a power failure."""
    replace_file(path, _text(content).encode())
    fsync(path.parent)


def _text(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def fsync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write ``path``: after a crash it holds ``content`` or what it held before. The folder is not fsynced."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece; it becomes ``path`` when the block ends without an error."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with naming(unfinished), unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # on a full disk its space is needed
        raise


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
        follow_umask(staging)
        for path in [*staging.rglob("*"), staging]:
            fsync(path)
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync(target.parent)


def follow_umask(folder: Path) -> None:
    """Give every file below ``folder`` the mode that a new file gets there; safetensors makes its files 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode != mode:  # a file system without modes has nothing to change
            path.chmod(mode & 0o777)


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with everything in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
