"""``run.json``: everything needed to repeat, resume, export or judge a run, written when it starts."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from llava_moslora._version import __version__
from llava_moslora.errors import Refusal
from llava_moslora.runs.manifest import sha256, write_json

RUN = "run.json"
TOKENIZER = "tokenizer"
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "bitsandbytes", "safetensors")


def write_run(folder: Path, settings: dict) -> None:
    """Write ``run.json`` into ``folder``: ``settings`` (what was asked for, resolved) and how it was run."""
    record = {
        "llava_moslora": __version__,
        "settings": settings,
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _installed(name) for name in _PACKAGES},
        "commit": _commit(),
    }
    write_json(folder / RUN, record)


def read_run(folder: str | Path) -> dict:
    """``run.json`` of a run folder.

    Raises:
        Refusal: the folder is missing or holds no run.
    """
    folder = Path(folder)
    if not (folder / RUN).is_file():
        raise Refusal(
            "C-PATH",
            "not a run folder" if folder.is_dir() else "no such folder",
            file=folder,
            expected=f"a folder with {RUN}, as --output_dir of scripts/train_vit_llm.py",
            fix="give the --output_dir of a training run",
        )
    return json.loads((folder / RUN).read_text(encoding="utf-8"))


def fingerprint(folder: str | Path) -> dict[str, str]:
    """What identifies a model folder without reading weights: hashes of its JSON files, sizes of its weight files."""
    folder = Path(folder)
    if folder.is_file():
        return {folder.name: sha256(folder)}
    facts = {p.name: sha256(p) for p in sorted(folder.glob("*.json"))}
    return facts | {p.name: str(p.stat().st_size) for p in sorted(folder.glob("*.safetensors"))}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one and git is there."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
