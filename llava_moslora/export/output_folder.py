"""The output folder of an export: lock, staging, and which old export it may replace.

Only files that the manifest of an old export lists are ever deleted. During an export, all working files are hidden
next to the folder: ``.NAME.staging`` (the new export), ``.NAME.lock``, ``.NAME.checkpoint`` (links to the checkpoint,
which a running training may prune at any moment) and ``.NAME.old`` (the old export, between two renames).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from llava_moslora.errors import NOT_OF_THE_PLACE, Refusal, few
from llava_moslora.files.disk import fsync, replace_json
from llava_moslora.files.json import parse_json
from llava_moslora.files.manifest import MANIFEST, read_facts, sha256
from llava_moslora.runs.checkpoints import CHECKPOINT, checkpoints, model_checkpoint
from llava_moslora.runs.fingerprint import WEIGHTS
from llava_moslora.runs.record import EXPORT

RESUME_FILE = ".plan.json"  # in staging: the key that must match to continue an unfinished export
# Errors of file systems without locks, and without hard links between the two places
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that this export may not write.

    Args:
        folder: absolute, links resolved.

    Raises:
        Refusal: C-OUTPUT: the current folder is in it; it exists and ``overwrite`` is not set; it is not an export, or
            one that changed since it was written; another folder has the name of its staging folder.
    """
    if folder.exists():
        if Path.cwd().is_relative_to(folder):
            raise Refusal(
                "C-OUTPUT", "the current folder is not replaced", file=folder, key="--output_dir",
                fix="start the command in another folder, or choose another --output_dir",
            )  # fmt: skip
        if not overwrite:
            fix = "choose another, or --overwrite"
            raise Refusal("C-OUTPUT", "already exists", file=folder, key="--output_dir", fix=fix)
        files_of_export(folder)
    staging = staging_of(folder)
    if staging.exists() and not _is_staging(staging):
        raise Refusal(
            "C-OUTPUT", "not an export's staging folder, but has its name", file=staging, key="--output_dir",
            found=few(sorted(p.name for p in staging.iterdir()), 5) if staging.is_dir() else "a file",
            fix="move it away, or choose another --output_dir",
        )  # fmt: skip


def check_outside(folder: Path, run: Path) -> None:
    """Refuse (C-OUTPUT) to write into the run folder: training may delete what is there."""
    if folder.is_relative_to(run.resolve()):
        raise Refusal(
            "C-OUTPUT", "the output folder is inside the run folder", file=folder, key="--output_dir", found=run,
            expected="a folder outside the run", fix=f"--output_dir merged/{run.resolve().name}",
        )  # fmt: skip


def check_inputs(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse (C-OUTPUT) to replace a folder that is, or contains, an input of this export."""
    for given in inputs:
        if Path(given).resolve().is_relative_to(folder):
            raise Refusal(
                "C-OUTPUT", "an input of this export is in that folder", file=folder, key="--output_dir", found=given,
                fix="choose another --output_dir",
            )  # fmt: skip


def files_of_export(folder: Path) -> list[str]:
    """The files of the export in ``folder``, its manifest included, as relative paths; none of an empty folder.

    Raises:
        Refusal: C-OUTPUT: not an export, or files that the export did not write or that changed since.
    """
    if not folder.is_dir():
        raise Refusal("C-OUTPUT", "not a folder", file=folder, key="--output_dir", fix="choose another")
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    if not present:
        return []
    if (recorded := listed_files(folder)) is None:
        raise Refusal(
            "C-OUTPUT", "not an export: nothing is deleted here", file=folder, key="--output_dir",
            expected=f"{EXPORT} in it, and a {MANIFEST} that lists it", fix="choose another",
        )  # fmt: skip
    strange = sorted(present.keys() - recorded.keys() - {MANIFEST})
    changed = sorted(name for name in present.keys() & recorded.keys() if has_changed(present[name], recorded[name]))
    if strange or changed:
        what = "files that no export wrote" if strange else "files that changed since the export"
        raise Refusal(
            "C-OUTPUT", f"{what} are not deleted", file=folder, key="--output_dir", found=few(strange or changed, 5),
            fix="move them away, or choose another --output_dir",
        )  # fmt: skip
    return sorted(present)


def listed_files(folder: Path) -> dict[str, dict] | None:
    """Size and SHA-256 of each file that an export's manifest lists, whichever version of this package wrote it; None
    if ``folder`` has no manifest of an export."""
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        inside = all(".." not in (path := PurePosixPath(name)).parts and not path.is_absolute() for name in files)
        if manifest["format"] and EXPORT in files and inside:
            return {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def has_changed(file: Path, recorded: dict) -> bool:
    """Weight files are compared by size only: hashing them takes longer than writing the new ones."""
    if file.is_symlink() or file.stat().st_size != recorded["size"]:
        return True
    return file.suffix not in WEIGHTS and sha256(file) != recorded["sha256"]


@contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this process. Parent folders are created, and removed at the end if they are empty.

    Raises:
        Refusal: C-LOCKED, another process exports into it; C-OUTPUT, nothing can be written there.
    """
    file = folder.with_name(f".{folder.name}.lock")
    missing = [p for p in folder.parents if not p.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(file)
    except OSError as error:
        if error.errno in NOT_OF_THE_PLACE:
            raise
        raise Refusal(
            "C-OUTPUT", "cannot be written to", file=folder.parent, key="--output_dir", found=error.strerror,
            fix="choose another, or change its permissions",
        ) from error  # fmt: skip
    if descriptor is None:
        raise Refusal(
            "C-LOCKED", "another process is exporting into this folder", file=folder, key="--output_dir",
            fix="wait for it, or choose another --output_dir",
        )  # fmt: skip
    try:
        _finish_replacement(folder)
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
    """A file descriptor that holds the lock of ``file``; None if another process holds it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(
                    f"{file.parent} does not support locks ({error.strerror}): run only one export at a time",
                    flush=True,
                )
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
        os.close(descriptor)  # the other process ended between the two calls and deleted its lock


@contextmanager
def pinned_checkpoint(run: Path, folder: Path, which: str | None = None) -> Iterator[Path]:
    """A valid checkpoint of ``run``, without optimizer state, as hard links (on another disk: copies) next to
    ``folder``, whose lock is held: a training that is still running may prune the original.

    Args:
        which: as for :func:`llava_moslora.runs.checkpoints.model_checkpoint`.

    Raises:
        Refusal: as ``model_checkpoint``; C-OUTPUT, something else has that name.
    """
    place = folder.with_name(f".{folder.name}.checkpoint")
    if place.exists():  # of an export that was killed
        if not place.is_dir() or not all(CHECKPOINT.fullmatch(p.name) for p in place.iterdir()):
            what = "not an export's checkpoint copy, but has its name"
            raise Refusal("C-OUTPUT", what, file=place, key="--output_dir", fix="move it away")
        shutil.rmtree(place)
    try:
        original, pinned = _pin(run, place, which)
        yield pinned
    except Refusal as refusal:
        if refusal.file is not None and (file := Path(str(refusal.file))).is_relative_to(place):
            refusal.file = original / file.relative_to(pinned)  # the one that is kept
            refusal.args = (refusal.line(),)
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _pin(run: Path, place: Path, which: str | None, attempts: int = 50) -> tuple[Path, Path]:
    while True:
        attempts -= 1
        before = checkpoints(run)
        try:
            checkpoint = model_checkpoint(run, which)
            names = [MANIFEST, *read_facts(checkpoint)["files"]]
            pinned = place / checkpoint.name
            for name in names:
                if name.startswith(("adapter/", "projector/")) or name in (MANIFEST, "trainer_state.json"):
                    _link(checkpoint / name, pinned / name)
            return checkpoint, pinned
        except (FileNotFoundError, Refusal) as error:  # pruned while it was read, so there is a newer one
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


def _old_export_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _is_staging(staging: Path) -> bool:
    """Whether an export made this folder: unfinished, or finished and not renamed yet."""
    if not staging.is_dir() or staging.is_symlink():
        return False
    for name in (RESUME_FILE, EXPORT):
        try:
            if "format" in parse_json((staging / name).read_bytes()):
                return True
        except (OSError, ValueError, TypeError):
            continue
    return {p.name for p in staging.iterdir()} <= {f".{RESUME_FILE}.unfinished"}  # killed while that file was written


def open_staging(folder: Path, resume_key: dict) -> Path:
    """The staging folder of ``folder``, whose lock is held. Weight files that an earlier call with the same
    ``resume_key`` finished are kept, others are deleted.
    """
    staging = staging_of(folder)
    if staging.exists():
        try:
            same = parse_json((staging / RESUME_FILE).read_bytes()) == resume_key
        except (OSError, ValueError):
            same = False
        if same:
            files = resume_key["files"]
            done = sum((staging / file.lstrip("/")).is_file() for file in files)
            print(f"continuing an unfinished export: {done} of {len(files)} weight files are complete", flush=True)
            return staging
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    replace_json(staging / RESUME_FILE, resume_key)
    return staging


def publish(staging: Path, folder: Path) -> None:
    """Rename ``staging`` to ``folder``, whose lock is held; an old export is renamed before and deleted afterwards.

    Raises:
        Refusal: C-OUTPUT, files were added to the old export in the meantime: it stays.
    """
    if folder.exists():
        files_of_export(folder)
        os.rename(folder, _old_export_of(folder))
    os.rename(staging, folder)
    fsync(folder.parent)
    try:
        _finish_replacement(folder)
    except Refusal as refusal:  # a file was added between check and rename; the new export is already published
        print(f"the old export is kept: {refusal.line()}", flush=True)


def _finish_replacement(folder: Path) -> None:
    """Delete the old export, if there is one; rename it back if the new one was never published."""
    old = _old_export_of(folder)
    if not old.exists():
        return
    names = files_of_export(old)
    if not folder.exists():
        os.rename(old, folder)
        return
    last = [name for name in (EXPORT, MANIFEST) if name in names]  # an export is recognised from these
    for name in [name for name in names if name not in last] + last:
        (old / name).unlink()
    for path in sorted((p for p in old.rglob("*") if p.is_dir()), reverse=True):
        path.rmdir()
    old.rmdir()
