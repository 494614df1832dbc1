"""The report file to send with a bug in this package."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path

PACKAGES = ("llava_moslora", "torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "safetensors")


def save_report(error: BaseException, output: Path | None) -> Path | None:
    """Save command, versions and traceback of ``error``: into ``output`` if it is a folder, else into the current or
    the temporary one; None where none can be written.

    The file is hidden, so that a run folder with nothing else still counts as empty, and an export as unchanged.
    """
    report = "\n".join([
        f"command: {shlex.join([sys.executable, *sys.argv])}",
        f"time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}; folder: {os.getcwd()}",
        f"rank {os.environ.get('RANK') or 0} of {os.environ.get('WORLD_SIZE') or 1}",
        f"python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        "",
        "".join(traceback.format_exception(error)),
    ])  # fmt: skip
    name = f".defect-{time.strftime('%Y%m%d-%H%M%S')}-{os.environ.get('RANK') or 0}-{os.getpid()}.txt"
    for folder in (output, Path.cwd(), Path(tempfile.gettempdir())):
        try:
            if folder and folder.is_dir():
                (folder / name).write_text(report, encoding="utf-8", errors="backslashreplace")
                return (folder / name).absolute()
        except OSError:
            continue
    return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
