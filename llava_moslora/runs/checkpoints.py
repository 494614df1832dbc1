"""The ``checkpoint-N`` folders of a run: published, listed, verified, pruned; and the lock of the run's folder."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from llava_moslora.errors import NOT_OF_THE_PLACE, Refusal
from llava_moslora.files.disk import write_text
from llava_moslora.files.manifest import MANIFEST, read_facts, verify_manifest
from llava_moslora.files.publish import discard, publish
from llava_moslora.runs.record import check_seed, read_run

NEWEST, BEST = "newest", "best"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def publish_checkpoint(folder: Path, write: Callable[[Path], None], facts: Callable[[], dict]) -> None:
    """:func:`llava_moslora.files.publish.publish` for a ``checkpoint-N`` folder; ``facts`` has its ``step``, N."""
    publish(folder, write, facts, is_valid)


def is_valid(folder: Path) -> bool:
    """Whether the manifest and every hash verify, and the folder has the name of its step."""
    return _verifies(folder, verify_manifest)


def _verifies(folder: Path, read_manifest: Callable[[Path], dict]) -> bool:
    try:
        _check_step(folder, read_manifest(folder))
    except Refusal:
        return False
    return True


def _check_step(folder: Path, manifest: dict) -> None:
    if manifest.get("step") != step_of(folder):
        raise Refusal(
            "K-STEP", "the checkpoint's name and step disagree: it was renamed or copied", file=folder,
            found=f"step {manifest.get('step')} in its {MANIFEST}", expected=f"step {step_of(folder)}",
            fix=f"rename it to checkpoint-{manifest.get('step')}, or move it out of the run folder",
        )  # fmt: skip


def checkpoints(run: Path) -> list[Path]:
    """``checkpoint-N`` folders of a run, newest (largest N) first, valid or not."""
    found = [p for p in run.glob("checkpoint-*") if p.is_dir() and CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def checkpoint_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_valid(run: Path) -> tuple[Path | None, list[Refusal]]:
    """The newest checkpoint whose manifest and hashes verify, or None; and why newer ones, which stay, were skipped.

    Raises:
        Refusal: K-STEP, the newest that verifies was renamed or copied; silently using an older one would be wrong.
    """
    skipped = []
    for folder in checkpoints(run):
        try:
            manifest = verify_manifest(folder)
        except Refusal as refusal:
            skipped.append(refusal)
        else:
            _check_step(folder, manifest)
            return folder, skipped
    return None, skipped


def newest_checkpoint(run: Path) -> Path:
    """The newest valid checkpoint of a run.

    Raises:
        Refusal: the run has none, or the newest is not this run's own: renamed, or of another seed.
    """
    checkpoint, skipped = newest_valid(run)
    if checkpoint is None:
        found = "; ".join(refusal.line() for refusal in skipped) or "none at all"
        fix = "wait until training reaches its first --save_steps, or its end"
        raise Refusal("K-NONE", "the run has no valid checkpoint", file=run, found=found, fix=fix)
    check_seed(read_run(run, None), checkpoint, read_facts(checkpoint))
    return checkpoint


def model_checkpoint(run: Path, which: str | None = None) -> Path:
    """The valid checkpoint that is a run's model, also during training.

    Args:
        which: :data:`NEWEST`, :data:`BEST` (by validation) or a step, as ``40`` or ``checkpoint-40``; None: the best of
            a run with ``--load_best_model_at_end``, once one is known, else the newest.

    Raises:
        Refusal: as :func:`newest_checkpoint`; C-FLAG, there is no such checkpoint; K-..., it is damaged.
    """
    for _ in range(50):
        before = checkpoints(run)
        try:
            return _model_checkpoint(run, which)
        except (FileNotFoundError, Refusal):
            if checkpoints(run) == before:
                raise  # otherwise one was pruned while it was read, and there is a newer one
    return _model_checkpoint(run, which)


def _model_checkpoint(run: Path, which: str | None) -> Path:
    newest = newest_checkpoint(run)
    best = read_facts(newest).get("best")
    if which is None:
        which = BEST if best and read_run(run, None).training_value("load_best_model_at_end") else NEWEST
    if which == NEWEST:
        return newest
    name = f"checkpoint-{which.removeprefix('checkpoint-')}"
    if which == BEST:
        if best is None:
            raise Refusal(
                "C-FLAG", "no checkpoint of this run was evaluated", file=run, key="--checkpoint", found=BEST,
                fix=f"--checkpoint {NEWEST}; runs with --eval_strategy have a best checkpoint",
            )  # fmt: skip
        name = checkpoint_of(run, best["step"]).name
    folder = run / name
    if folder not in checkpoints(run):
        code = "K-NONE" if which == BEST else "C-FLAG"  # the best may just have been pruned, for a better one
        raise Refusal(
            code, "there is no such checkpoint", file=run, key="--checkpoint", found=name,
            expected=" ".join(path.name for path in checkpoints(run)), fix=f"one of these, or {NEWEST}",
        )  # fmt: skip
    manifest = verify_manifest(folder)
    _check_step(folder, manifest)
    check_seed(read_run(run, None), folder, manifest)
    return folder


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest ``keep`` valid checkpoints, at least two: the newest may still turn out damaged.

    A damaged checkpoint does not count towards ``keep``; one whose manifest cannot be read (damaged, or written by
    another version of this package) and that of step ``best`` are not deleted.
    """
    finished = [folder for folder in checkpoints(run) if _verifies(folder, read_facts)]  # the manifest, not the files
    if len(finished) <= max(keep, 2):
        return  # nothing to delete, so nothing to hash
    kept = 0
    for folder in finished:
        if kept == max(keep, 2):
            if step_of(folder) != best:
                discard(folder)
        elif is_valid(folder):
            kept += 1


def lock_run(run: Path, patience: float = 15) -> FileLock:
    """The run folder's lock, held until it is released or this process ends, however it ends.

    Args:
        patience: seconds to wait for it. Data loader processes of a killed run hold its lock for up to 5 s.

    Raises:
        Refusal: C-LOCKED, another process trains into this folder; C-OUTPUT, the folder cannot be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock")
        lock.acquire(timeout=patience)
        write_text(run / ".locked_by", f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        holder = run / ".locked_by"
        raise Refusal(
            "C-LOCKED", "another process is training into this folder", file=run, key="--output_dir",
            found=holder.read_text() if holder.is_file() else None,
            fix="wait for it, stop it, or choose another --output_dir",
        ) from error  # fmt: skip
    except OSError as error:
        if error.errno in NOT_OF_THE_PLACE:
            raise
        raise Refusal("C-OUTPUT", "cannot be written to", file=run, key="--output_dir", found=error) from error
    return lock
