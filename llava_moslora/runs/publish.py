"""Folders appear whole or not at all: written into hidden staging, hashed, fsynced, published by one rename.

All ranks write into the same staging folder; only rank 0 looks at the file system to decide, the others learn by
broadcast (a rank that asks a network file system itself may see yesterday's answer).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from torch import distributed

from llava_moslora.errors import Refusal
from llava_moslora.runs.manifest import MANIFEST, fsync, read_manifest, write_manifest

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def from_rank_0(value: object) -> object:
    """``value`` as rank 0 has it, on every rank."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def publish(target: Path, write: Callable[[Path], None], facts: Callable[[], dict]) -> None:
    """Make ``target``, a folder, appear at once with everything ``write`` put into it. Collective.

    Args:
        target: the final folder. If it is already there and whole, nothing is done.
        write: called on every rank with the staging folder; ranks write different files.
        facts: called on rank 0; JSON facts for the manifest.
    """
    staging = target.parent / f".{target.name}.staging"
    done = False
    if rank() == 0:
        done = is_valid(target)
        if not done:
            target.parent.mkdir(parents=True, exist_ok=True)
            for leftover in (staging, target):  # of a killed life
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir()
    if from_rank_0(done):
        return
    write(staging)
    barrier()
    if rank() == 0:
        write_manifest(staging, facts())
        os.rename(staging, target)
        fsync(target.parent)
    barrier()


def is_valid(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except Refusal:
        return False
    return True


def checkpoints(run: Path) -> list[Path]:
    """``checkpoint-N`` folders of a run, newest (largest N) first, valid or not."""
    found = [p for p in run.glob("checkpoint-*") if p.is_dir() and CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is no checkpoint folder"
    return int(match[1])


def newest_valid(run: Path) -> tuple[Path | None, list[Refusal]]:
    """The newest checkpoint whose manifest and hashes verify, and why newer ones, left alone, were passed over."""
    passed_over = []
    for folder in checkpoints(run):
        try:
            read_manifest(folder)
        except Refusal as refusal:
            passed_over.append(refusal)
        else:
            return folder, passed_over
    return None, passed_over


def prune(run: Path, keep: int) -> None:
    """Delete finished checkpoints but the newest ``keep``, at least two: the newest may yet prove damaged."""
    finished = [folder for folder in checkpoints(run) if (folder / MANIFEST).is_file()]
    for folder in finished[max(keep, 2) :]:
        trash = folder.with_name(f".{folder.name}.trash")
        os.rename(folder, trash)  # a half-deleted folder must never look like a checkpoint
        shutil.rmtree(trash)


def lock_run(run: Path) -> FileLock:
    """The run folder's lock, held until released or until this process ends, however it ends.

    Raises:
        Refusal: another process trains into this folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Refusal(
            "C-LOCKED",
            "another process is training into this folder",
            file=run,
            key="--output_dir",
            fix="wait for it, stop it, or choose another --output_dir",
        ) from error
    return lock
