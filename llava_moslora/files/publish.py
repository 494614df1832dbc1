"""Publishes folders atomically: written into a hidden staging folder, hashed, fsynced, renamed into place.

All ranks write into the same staging folder. Only rank 0 decides by looking at the file system, and broadcasts the
decision: on a network file system other ranks may see an outdated state.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from llava_moslora.distributed import from_all_ranks, from_rank_0, rank
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import delete, follow_umask, replace_folder
from llava_moslora.files.manifest import verify_manifest, write_manifest


def publish(
    target: Path,
    write: Callable[[Path], None],
    facts: Callable[[], dict],
    is_valid: Callable[[Path], bool] | None = None,
) -> None:
    """Publish the folder ``target`` with everything that ``write`` puts into it. Collective.

    Args:
        target: the final folder. If it is valid, nothing is done; an invalid one is replaced once the new one is
            written.
        write: called on every rank with the staging folder; ranks write different files.
        facts: called on rank 0; JSON facts for the manifest.
        is_valid: called on rank 0 with ``target``; default: :func:`is_verified`.

    Raises:
        Refusal: E-DISK, on every rank, if one rank could not write. What was published before is untouched.
    """
    # A new name for every run: a rank that survives its killed run must not write into a later run's folder.
    staging = target.with_name(f".{target.name}.{from_rank_0(secrets.token_hex(4))}.staging")

    def begin() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()

    def finish() -> None:
        follow_umask(staging)
        write_manifest(staging, facts())
        replace_folder(staging, target, _trash(target))

    if from_rank_0(rank() == 0 and (is_valid or is_verified)(target)):
        return
    _all_or_none(begin if rank() == 0 else None, staging)
    _all_or_none(lambda: write(staging), staging)
    _all_or_none(finish if rank() == 0 else None, staging)


def _all_or_none(action: Callable[[], None] | None, staging: Path) -> None:
    """Run ``action`` on this rank; if it failed on any rank, delete ``staging`` and raise on all, so that no rank
    waits for one that failed."""
    failure = None
    try:
        if action is not None:
            action()
    except Exception as error:  # of any kind: the other ranks must be told first
        failure = error
    failures = [text for text in from_all_ranks(f"rank {rank()}: {failure}" if failure else None) if text]
    if not failures:
        return
    if rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
    if failure is not None and not isinstance(failure, OSError | SafetensorError):
        raise failure
    raise Refusal(
        "E-DISK", "the folder could not be written; what was published before is untouched", file=staging.parent,
        found=f"{failures[0]}; {shutil.disk_usage(staging.parent).free:,} bytes free",
        fix="free space or choose another disk, then start the same command again with --resume True",
    ) from failure  # fmt: skip


def is_verified(folder: Path) -> bool:
    """Whether ``folder`` has a manifest and every file in it is as it was written."""
    try:
        verify_manifest(folder)
    except Refusal:
        return False
    return True


def discard(folder: Path) -> None:
    """Delete a published folder. It is renamed first: a half-deleted one must not look like a finished one."""
    trash = _trash(folder)
    os.rename(folder, trash)
    delete(trash)


def _trash(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.trash")


def sweep(parent: Path) -> None:
    """Delete the staging folders and half-deleted folders of killed processes in ``parent``, while nobody publishes
    there."""
    for leftover in [*parent.glob(".*.staging"), *parent.glob(".*.trash")]:
        delete(leftover)
