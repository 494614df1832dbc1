"""The folder that an export writes: what may lie there before, its lock, its staging, and how a new export takes the
place of an old one.

Only what an export wrote is ever deleted, as far as its manifest names it. Everything is hidden beside the folder while
it is made: ``.NAME.staging`` (the new export), ``.NAME.lock``, ``.NAME.checkpoint`` (what is exported, which training
may prune at any moment) and ``.NAME.old`` (the old export, for the moment between two renames).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import fsync
from llava_moslora.files.json import replace_json
from llava_moslora.files.manifest import MANIFEST, read_facts, sha256
from llava_moslora.inference.load import EXPORT, newest_checkpoint
from llava_moslora.runs.checkpoints import CHECKPOINT, checkpoints
from llava_moslora.runs.record import WEIGHTS

PLAN = ".plan.json"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that this export may not write.

    Args:
        folder: absolute, without links.

    Raises:
        Refusal: C-OUTPUT: it exists and ``overwrite`` is not set, or holds anything but an export as it was written; a
            folder that is not ours has the name of our staging.
    """
    if folder.exists() and not overwrite:
        raise Refusal(
            "C-OUTPUT", "already exists", file=folder, key="--output_dir", fix="choose another, or --overwrite"
        )
    if folder.exists():
        if Path.cwd().is_relative_to(folder):
            raise Refusal(
                "C-OUTPUT", "the current folder is not replaced", file=folder, key="--output_dir",
                fix="call it from another folder",
            )  # fmt: skip
        written(folder)
    staging = staging_of(folder)
    if staging.exists() and not _is_staging(staging):
        raise Refusal(
            "C-OUTPUT", "not the staging of an export, and in its place", file=staging, key="--output_dir",
            found=_some(p.name for p in staging.iterdir()) if staging.is_dir() else "a file",
            fix="move it away, or choose another --output_dir",
        )  # fmt: skip


def check_inputs(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to replace a folder that is, or holds, what this export reads.

    Raises:
        Refusal: C-OUTPUT
    """
    for given in inputs:
        if Path(given).resolve().is_relative_to(folder):
            raise Refusal(
                "C-OUTPUT", "an input of this export lies there", file=folder, key="--output_dir", found=given,
                fix="choose another --output_dir",
            )  # fmt: skip


def written(folder: Path) -> list[str]:
    """The files of the export in ``folder``, relative to it, manifest and all; none of an empty folder.

    Raises:
        Refusal: C-OUTPUT: it is no export, or holds files that the export did not write or that changed since.
    """
    if not folder.is_dir():
        raise Refusal("C-OUTPUT", "not a folder", file=folder, key="--output_dir", fix="choose another")
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    if not present:
        return []
    recorded = _recorded(folder)
    strange = sorted(present.keys() - recorded.keys() - {MANIFEST})
    changed = sorted(name for name in present.keys() & recorded.keys() if _changed(present[name], recorded[name]))
    for what, names in (("files that no export wrote", strange), ("files that changed since the export", changed)):
        if names:
            raise Refusal(
                "C-OUTPUT", f"{what} are not deleted", file=folder, key="--output_dir", found=_some(names),
                fix="move them away, or choose another --output_dir",
            )  # fmt: skip
    return sorted(present)


def _recorded(folder: Path) -> dict[str, dict]:
    """What the manifest of an export lists, whichever version of this package wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] and EXPORT in files and all(_inside(name) for name in files):
            return {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise Refusal(
        "C-OUTPUT", "not an export: nothing is deleted here", file=folder, key="--output_dir",
        expected=f"{EXPORT} in it, and a {MANIFEST} that lists it", fix="choose another",
    )  # fmt: skip


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _changed(file: Path, recorded: dict) -> bool:
    """Weights by their size: hashing them takes longer than writing the new ones."""
    if file.is_symlink() or file.stat().st_size != recorded["size"]:
        return True
    return file.suffix not in WEIGHTS and sha256(file) != recorded["sha256"]


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """``folder`` for this process alone. Folders above it are made, and are gone again if they are empty at the end.

    Raises:
        Refusal: C-LOCKED, another process exports into it; C-OUTPUT, nothing can be written there.
    """
    file = folder.with_name(f".{folder.name}.lock")
    missing = [p for p in folder.parents if not p.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(file)
    except OSError as error:
        raise Refusal(
            "C-OUTPUT", "cannot be written to", file=folder.parent, key="--output_dir", found=error.strerror,
            fix="choose another, or its rights",
        ) from error  # fmt: skip
    if descriptor is None:
        raise Refusal(
            "C-LOCKED", "another process is exporting into this folder", file=folder, key="--output_dir",
            fix="wait for it, or choose another --output_dir",
        )  # fmt: skip
    try:
        _finish_replacing(folder)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        for path in missing:
            try:
                path.rmdir()
            except OSError:
                break


def _lock(file: Path) -> int | None:
    """A descriptor of ``file`` that holds its lock; None if another process does."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"{file.parent} has no locks ({error.strerror}): export into it once at a time", flush=True)
                return descriptor
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the other process ended between the two calls, and took its file away


@contextmanager
def held_checkpoint(run: Path, folder: Path) -> Iterator[Path]:
    """The newest valid checkpoint of ``run``, what was trained of it, as links (copies on another disk) beside
    ``folder``, whose lock is held: a training that goes on may prune the original.

    Raises:
        Refusal: K-NONE; C-OUTPUT, something else has the name.
    """
    place = folder.with_name(f".{folder.name}.checkpoint")
    if place.exists():  # of an export that was killed
        if not place.is_dir() or not all(CHECKPOINT.fullmatch(p.name) for p in place.iterdir()):
            raise Refusal("C-OUTPUT", "in the way", file=place, key="--output_dir", fix="move it away")
        shutil.rmtree(place)
    try:
        original, held = _hold(run, place)
        yield held
    except Refusal as refusal:
        if refusal.file is not None and Path(refusal.file).is_relative_to(place):
            refusal.file = original / Path(refusal.file).relative_to(held)  # the one that is there afterwards
            refusal.args = (refusal.line(),)
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _hold(run: Path, place: Path, attempts: int = 50) -> tuple[Path, Path]:
    while True:
        attempts -= 1
        before = checkpoints(run)
        try:
            checkpoint = newest_checkpoint(run)
            names = [MANIFEST, *read_facts(checkpoint)["files"]]
            held = place / checkpoint.name
            for name in names:
                if name.startswith(("adapter/", "projector/")) or name in (MANIFEST, "trainer_state.json"):
                    _link(checkpoint / name, held / name)
            return checkpoint, held
        except (FileNotFoundError, Refusal) as error:  # pruned while it was read: there is a newer one
            pruned = checkpoints(run) != before
            if not attempts or not pruned or getattr(error, "code", "K-NONE")[0] != "K":
                raise
            shutil.rmtree(place, ignore_errors=True)


def _link(file: Path, other: Path) -> None:
    other.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, other)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(file, other)


def staging_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.staging")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _is_staging(staging: Path) -> bool:
    """Whether an export made this folder: its plan is there, or it is finished and was not renamed yet."""
    if not staging.is_dir() or staging.is_symlink():
        return False
    for name in (PLAN, EXPORT):
        try:
            if "format" in json.loads((staging / name).read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            continue
    return {p.name for p in staging.iterdir()} <= {f".{PLAN}.unfinished"}  # killed before there was a plan


def open_staging(folder: Path, plan: dict) -> Path:
    """The staging of ``folder``, whose lock is held: what an earlier call with the same plan finished is kept, of
    another plan deleted.

    Raises:
        Refusal: as :func:`check_folder`.
    """
    staging = staging_of(folder)
    if staging.exists():
        try:
            same = json.loads((staging / PLAN).read_text(encoding="utf-8")) == plan
        except (OSError, ValueError):
            same = False
        if same:
            done = sum(1 for file in plan["files"] if (staging / file.lstrip("/")).is_file())
            print(f"going on: {done} of {len(plan['files'])} weight files are there", flush=True)
            return staging
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    replace_json(staging / PLAN, plan)
    return staging


def publish(staging: Path, folder: Path) -> None:
    """``staging`` as ``folder``, whose lock is held; an old export is renamed away before and deleted after.

    Raises:
        Refusal: C-OUTPUT, files were put beside the old export in the meantime: it stays.
    """
    if folder.exists():
        written(folder)
        os.rename(folder, _old(folder))
    os.rename(staging, folder)
    fsync(folder.parent)
    try:
        _finish_replacing(folder)
    except Refusal as refusal:  # a file came between the look and the rename; the new export is in its place
        print(f"the old export is kept: {refusal.line()}", flush=True)


def _finish_replacing(folder: Path) -> None:
    """Delete the old export, if there is one; put it back, if an export was killed before the new one had its name."""
    old = _old(folder)
    if not old.exists():
        return
    names = written(old)
    if not folder.exists():
        os.rename(old, folder)
        return
    last = [name for name in (EXPORT, MANIFEST) if name in names]  # by which it is known until the end
    for name in [name for name in names if name not in last] + last:
        (old / name).unlink()
    for path in sorted((p for p in old.rglob("*") if p.is_dir()), reverse=True):
        path.rmdir()
    old.rmdir()
