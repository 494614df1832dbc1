"""Folders appear whole or not at all: written into hidden staging, hashed, fsynced, published by one rename.

All ranks write into the same staging folder; only rank 0 looks at the file system to decide, the others learn by
broadcast (a rank that asks a network file system itself may see yesterday's answer).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import distributed

from llava_moslora.errors import Refusal
from llava_moslora.files.manifest import MANIFEST, fsync, read_facts, read_manifest, write_manifest

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def from_rank_0(value: object) -> object:
    """``value`` as rank 0 has it, on every rank."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: object) -> list:
    """``value`` of every rank, on every rank."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def publish(target: Path, write: Callable[[Path], None], facts: Callable[[], dict]) -> None:
    """Make ``target``, a folder, appear at once with everything ``write`` put into it. Collective.

    Args:
        target: the final folder. If it is already there and valid, nothing is done; a damaged one is replaced, once
            everything of the new one is written.
        write: called on every rank with the staging folder; ranks write different files.
        facts: called on rank 0; JSON facts for the manifest.

    Raises:
        Refusal: E-DISK, on every rank, where one rank could not write. What was published before is untouched.
    """
    # The name is new in every life: what an old rank that outlives its run may still write goes nowhere.
    staging = target.with_name(f".{target.name}.{from_rank_0(secrets.token_hex(4))}.staging")

    def begin() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()

    def finish() -> None:
        _follow_umask(staging)
        write_manifest(staging, facts())
        damaged = _trash(target) if target.exists() else None  # a rename needs the name free
        os.rename(staging, target)
        fsync(target.parent)
        if damaged is not None:
            delete(damaged)

    if from_rank_0(rank() == 0 and is_valid(target)):
        return
    _all_or_none(begin if rank() == 0 else None, staging)
    _all_or_none(lambda: write(staging), staging)
    _all_or_none(finish if rank() == 0 else None, staging)


def _all_or_none(action: Callable[[], None] | None, staging: Path) -> None:
    """Run ``action`` on this rank; if it failed on any rank, remove ``staging`` and raise on all: no rank waits for
    one that gave up."""
    failure = None
    try:
        if action is not None:
            action()
    except Exception as error:  # whatever it is, the other ranks must learn of it before it goes on
        failure = error
    failures = [text for text in from_all_ranks(f"rank {rank()}: {failure}" if failure else None) if text]
    if not failures:
        return
    if rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
    if failure is not None and not isinstance(failure, OSError | SafetensorError):
        raise failure
    raise Refusal(
        "E-DISK",
        "the folder could not be written; what was published before is untouched",
        file=staging.parent,
        found=f"{failures[0]}; {shutil.disk_usage(staging.parent).free:,} bytes free",
        fix="free space or choose another disk, then start the same command again with --resume True",
    ) from failure


def _follow_umask(folder: Path) -> None:
    """Give every file below ``folder`` the mode that a new file gets there; safetensors' are for their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode != mode:  # a file system without modes has nothing to change
            path.chmod(mode & 0o777)


def is_valid(folder: Path) -> bool:
    """Whether the manifest and every hash verify, and a checkpoint has the name of its step."""
    try:
        _check_name(folder, read_manifest(folder))
    except Refusal:
        return False
    return True


def _check_name(folder: Path, manifest: dict) -> None:
    if CHECKPOINT.fullmatch(folder.name) and manifest.get("step") != step_of(folder):
        raise Refusal(
            "K-STEP", "a checkpoint under the name of another step: renamed or copied", file=folder,
            found=f"step {manifest.get('step')} in its {MANIFEST}", expected=f"step {step_of(folder)}",
            fix=f"rename it to checkpoint-{manifest.get('step')}, or move it out of the run folder",
        )  # fmt: skip


def checkpoints(run: Path) -> list[Path]:
    """``checkpoint-N`` folders of a run, newest (largest N) first, valid or not."""
    found = [p for p in run.glob("checkpoint-*") if p.is_dir() and CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is no checkpoint folder"
    return int(match[1])


def newest_valid(run: Path) -> tuple[Path | None, list[Refusal]]:
    """The newest checkpoint whose manifest and hashes verify, and why newer ones, left alone, were passed over.

    Raises:
        Refusal: K-STEP, the newest one that verifies has the name of another step. No damage does that, and an older
            one in its place would be a surprise.
    """
    passed_over = []
    for folder in checkpoints(run):
        try:
            manifest = read_manifest(folder)
        except Refusal as refusal:
            passed_over.append(refusal)
        else:
            _check_name(folder, manifest)
            return folder, passed_over
    return None, passed_over


def prune(run: Path, keep: int) -> None:
    """Delete checkpoints but the newest ``keep`` valid ones, at least two: the newest may yet prove damaged.

    A damaged checkpoint takes no valid one's place, and one whose manifest cannot be read (damaged, or written by
    another version of this package) is left alone.
    """
    finished = [folder for folder in checkpoints(run) if _is_stated(folder)]
    if len(finished) <= max(keep, 2):
        return  # nothing to delete, so nothing to hash
    kept = 0
    for folder in finished:
        if kept == max(keep, 2):
            delete(_trash(folder))
        elif is_valid(folder):
            kept += 1


def _is_stated(folder: Path) -> bool:
    """Whether the manifest itself is undamaged and of the step in the folder's name."""
    try:
        _check_name(folder, read_facts(folder))
    except Refusal:
        return False
    return True


def _trash(path: Path) -> Path:
    """``path`` renamed, and where it is now: a half-deleted folder must never look like a checkpoint."""
    trash = path.with_name(f".{path.name}.{secrets.token_hex(4)}.trash")
    os.rename(path, trash)
    return trash


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with everything in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sweep(run: Path) -> None:
    """Remove what killed lives left behind: unfinished checkpoints and half-deleted ones. Needs the run's lock."""
    for leftover in [*run.glob(".*.staging"), *run.glob(".*.trash")]:
        delete(leftover)


def lock_run(run: Path, patience: float = 15) -> FileLock:
    """The run folder's lock, held until released or until this process ends, however it ends.

    Args:
        patience: seconds to wait for it. Loader processes of a killed run hold its lock until they notice, after 5.

    Raises:
        Refusal: another process trains into this folder, or the folder cannot be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock")
        lock.acquire(timeout=patience)
        (run / ".locked_by").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        holder = run / ".locked_by"
        raise Refusal(
            "C-LOCKED",
            "another process is training into this folder",
            file=run,
            key="--output_dir",
            found=holder.read_text() if holder.is_file() else None,
            fix="wait for it, stop it, or choose another --output_dir",
        ) from error
    except OSError as error:
        raise Refusal("C-OUTPUT", "cannot be written to", file=run, key="--output_dir", found=error) from error
    return lock
