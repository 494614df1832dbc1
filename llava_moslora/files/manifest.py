"""``MANIFEST.json`` of a folder: its files with sizes and SHA-256, and facts about it, such as a checkpoint's step.

Neither safetensors nor ``torch.load`` notices a flipped bit in the data; only a hash does. The manifest protects
against corruption, not against an attacker, who could rewrite it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import fsync, replace_json, write_json
from llava_moslora.files.json import parse_json

MANIFEST = "MANIFEST.json"
SCHEMA = 2  # version 1 had no hash of the manifest itself
FIX = "use another checkpoint"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: dict) -> None:
    """Hash and fsync every file below ``folder``, then write and fsync ``MANIFEST.json`` there.

    Args:
        facts: JSON values about the folder, such as a checkpoint's step; top-level keys of the manifest.
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


def add_facts(folder: Path, facts: dict) -> None:
    """Add facts to the manifest of a published folder. A crash leaves the old manifest or the new one.

    Raises:
        Refusal: as :func:`read_facts`.
    """
    content = read_facts(folder) | json.loads(json.dumps(facts))
    replace_json(folder / MANIFEST, content | {"sha256": _own_hash(content)})


def read_facts(folder: Path) -> dict:
    """The manifest of ``folder``, checked against its own hash; the listed files are not read.

    Raises:
        Refusal: K-MANIFEST (none, unreadable, of an unknown schema) or K-HASH.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise Refusal("K-MANIFEST", "no manifest: the folder was never completed", file=folder, fix=FIX)
    try:
        manifest = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Refusal("K-MANIFEST", "unreadable manifest", file=path, found=error, fix=FIX) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA and isinstance(schema, int):
        what, fix = "a manifest of another version", "use the version of this package that wrote it"
        raise Refusal("K-MANIFEST", what, file=path, found=schema, expected=SCHEMA, fix=fix)
    if wrong := _wrong_form(manifest):
        key, found, expected = wrong
        raise Refusal(
            "K-MANIFEST", "unreadable manifest", file=path, key=key, found=found, expected=expected, fix=FIX
        )  # fmt: skip
    own = manifest.pop("sha256", None)
    if own != _own_hash(manifest):
        raise Refusal("K-HASH", "the manifest changed since it was written", file=path, fix=FIX)
    return manifest


def _wrong_form(manifest: Any) -> tuple[str | None, object, str] | None:
    """Key, found and expected value of the first deviation from what :func:`write_manifest` writes."""
    if not isinstance(manifest, dict):
        return None, manifest, "an object"
    for key, kind in {"schema": int, "files": dict}.items():
        if type(manifest.get(key)) is not kind:
            return key, manifest.get(key, "no such key"), f"schema {SCHEMA}" if kind is int else "file: size and hash"
    for name, entry in manifest["files"].items():
        if "\0" in name:
            return "files", name, "the name of a file"
        if not (isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)):
            return f"files.{name}", entry, '{"size": bytes, "sha256": text}'
    best = manifest.get("best")
    if best is not None and not (isinstance(best, dict) and type(best.get("step")) is int):
        return "best", best, '{"step": number}'
    return None


def verify_manifest(folder: Path) -> dict:
    """The manifest of ``folder``; the size and the hash of every listed file are checked.

    Raises:
        Refusal: K-MANIFEST (none, or unreadable), K-PATH (a link, or a name that leads out of the folder), K-MISSING,
            K-SIZE or K-HASH, naming the file.
    """
    manifest = read_facts(folder)
    for name, recorded in manifest["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or file.is_symlink():
            raise Refusal("K-PATH", "a link or a path out of the folder", file=file, fix=FIX)
        if not file.is_file():
            raise Refusal("K-MISSING", "a listed file is missing", file=file, fix=FIX)
        if (size := file.stat().st_size) != recorded["size"]:
            found, expected = f"{size} bytes", f"{recorded['size']} bytes"
            raise Refusal("K-SIZE", "truncated or grown", file=file, found=found, expected=expected)
        if sha256(file) != recorded["sha256"]:
            raise Refusal("K-HASH", "the content changed since it was written", file=file, fix=FIX)
    return manifest


def _own_hash(manifest: dict) -> str:
    """Hash of the manifest's content: a changed fact (a step, a world size) is detected like a changed file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
