"""A folder's manifest: its files with sizes and SHA-256, and the facts needed to judge whether it fits.

Neither safetensors nor ``torch.load`` notices a flipped bit in the data; only a hash does. The manifest guards against
corruption, not against an attacker, who could rewrite it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from llava_moslora.errors import Refusal

MANIFEST = "MANIFEST.json"
SCHEMA = 1


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, facts: dict) -> None:
    """Hash and fsync every file below ``folder``, then write and fsync ``MANIFEST.json`` there."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        fsync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"schema": SCHEMA, **facts, "files": files})
    fsync(folder / MANIFEST)
    for path in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        fsync(path)


def read_manifest(folder: Path) -> dict:
    """The manifest of ``folder`` after every file it lists was found whole.

    Raises:
        Refusal: K-MANIFEST (none, or unreadable), K-MISSING, K-SIZE or K-HASH, naming the file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise Refusal(
            "K-MANIFEST", "no manifest: the folder was never finished", file=folder, fix="use another checkpoint"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        listed = manifest["files"].items()
    except (ValueError, KeyError, AttributeError) as error:
        raise Refusal(
            "K-MANIFEST", "unreadable manifest", file=path, found=error, fix="use another checkpoint"
        ) from error
    for name, recorded in listed:
        file = folder / name
        if not file.is_file():
            raise Refusal("K-MISSING", "a file of the checkpoint is gone", file=file, fix="use another checkpoint")
        if (size := file.stat().st_size) != recorded["size"]:
            raise Refusal(
                "K-SIZE", "truncated or grown", file=file, found=f"{size} bytes", expected=f"{recorded['size']} bytes"
            )
        if sha256(file) != recorded["sha256"]:
            raise Refusal("K-HASH", "the content changed since it was written", file=file, fix="use another checkpoint")
    return manifest
