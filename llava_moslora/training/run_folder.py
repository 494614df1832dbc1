"""Opening ``--output_dir`` for a new run without losing what is in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from llava_moslora.errors import Refusal
from llava_moslora.runs import publish


def open_run(run: Path, *, overwrite: bool) -> FileLock:
    """An empty, locked run folder.

    Raises:
        Refusal: the folder holds something and ``overwrite`` was not asked for, is no folder, or is in use.
    """
    if run.exists() and not run.is_dir():
        raise Refusal("C-OUTPUT", "not a folder", file=run, key="--output_dir", fix="choose another path")
    lock = publish.lock_run(run)
    present = [p for p in run.iterdir() if p.name != ".lock"]
    if present and not overwrite:
        lock.release()
        raise Refusal(
            "C-OUTPUT",
            "the folder is not empty",
            file=run,
            key="--output_dir",
            found=", ".join(sorted(p.name for p in present)[:5]),
            fix="choose another folder, or --overwrite True to delete this run",
        )
    for path in present:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return lock
