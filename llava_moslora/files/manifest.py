"""``MANIFEST.json`` of a folder: its files with sizes and SHA-256, and facts about it, such as a checkpoint's step.

Neither safetensors nor ``torch.load`` notices a flipped bit in the data; only a hash does. The manifest protects
against corruption, not against an attacker, who could rewrite it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import fsync
from llava_moslora.files.json import write_json

MANIFEST = "MANIFEST.json"
SCHEMA = 2  # 1 had no hash of its own


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: dict) -> None:
    """Hash and fsync every file below ``folder``, then write and fsync ``MANIFEST.json`` there.

    Args:
        facts: JSON values that say what the folder is, such as a checkpoint's step; keys of the manifest's top level.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        fsync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    content = json.loads(json.dumps({"schema": SCHEMA, **facts, "files": files}))  # as it will be read
    write_json(folder / MANIFEST, content | {"sha256": _own_hash(content)})
    fsync(folder / MANIFEST)
    for path in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        fsync(path)


def read_facts(folder: Path) -> dict:
    """The manifest of ``folder``, checked against its own hash; the files that it lists are not looked at.

    Raises:
        Refusal: K-MANIFEST (none, unreadable, of an unknown schema) or K-HASH.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise Refusal(
            "K-MANIFEST", "no manifest: the folder was never completed", file=folder, fix="use another checkpoint"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema, files = manifest["schema"], manifest["files"]
        assert all(isinstance(e["size"], int) and isinstance(e["sha256"], str) for e in files.values()), "entries"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise Refusal(
            "K-MANIFEST", "unreadable manifest", file=path, found=error, fix="use another checkpoint"
        ) from error
    if schema != SCHEMA:
        raise Refusal(
            "K-MANIFEST", "a manifest of another version", file=path, found=schema, expected=SCHEMA,
            fix="use the version of this package that wrote it",
        )  # fmt: skip
    own = manifest.pop("sha256", None)
    if own != _own_hash(manifest):
        raise Refusal("K-HASH", "the manifest changed since it was written", file=path, fix="use another checkpoint")
    return manifest


def verify_manifest(folder: Path) -> dict:
    """The manifest of ``folder``, after the size and the hash of every file that it lists were checked.

    Raises:
        Refusal: K-MANIFEST (none, or unreadable), K-PATH (a link, or a name that leads out of the folder), K-MISSING,
            K-SIZE or K-HASH, naming the file.
    """
    manifest = read_facts(folder)
    for name, recorded in manifest["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or file.is_symlink():
            raise Refusal("K-PATH", "a link or a path out of the folder", file=file, fix="use another checkpoint")
        if not file.is_file():
            raise Refusal("K-MISSING", "a listed file is missing", file=file, fix="use another checkpoint")
        if (size := file.stat().st_size) != recorded["size"]:
            raise Refusal(
                "K-SIZE", "truncated or grown", file=file, found=f"{size} bytes", expected=f"{recorded['size']} bytes"
            )
        if sha256(file) != recorded["sha256"]:
            raise Refusal("K-HASH", "the content changed since it was written", file=file, fix="use another checkpoint")
    return manifest


def _own_hash(manifest: dict) -> str:
    """Hash of the manifest's content: a changed fact (a step, a world size) is detected like a changed file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
