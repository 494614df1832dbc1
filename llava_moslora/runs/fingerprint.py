"""Fingerprints of a run's base models: resuming, export and inference need the base that the run was trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llava_moslora.config import ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.files.manifest import MANIFEST, read_facts, sha256
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def base_fingerprints(model: ModelSettings) -> dict[str, dict[str, str]]:
    """Fingerprints of the three parts that a run starts from, as recorded in every checkpoint's manifest; for a
    text-only run two of them are ``none``."""
    return {
        "llm": fingerprint(model.model_name_or_path),
        "vision_tower": fingerprint(model.vision_tower or "none"),
        "projector": fingerprint(model.pretrain_mm_mlp_adapter or "none"),
    }


def check_base(source: str | Path, checkpoint: Path, part: str, flag: str | None = None) -> None:
    """Refuse a base whose configuration or weight files are not those that ``checkpoint`` was trained on: another model
    of the same shape would run too, and answer differently.

    Args:
        part: of the base, as the manifest calls it: ``llm``, ``vision_tower`` or ``projector``.
        flag: with which the user chose ``source``; None: it is from run.json.

    Raises:
        Refusal: K-BASE; K-MANIFEST, the checkpoint does not say what it was trained on.
    """
    manifest = read_facts(checkpoint)
    if part not in manifest:
        raise Refusal(
            "K-MANIFEST", "the checkpoint does not record its base", file=checkpoint / MANIFEST,
            key=part, fix="use a checkpoint that scripts/train_vit_llm.py wrote",
        )  # fmt: skip
    recorded, now = manifest[part], fingerprint(source)
    matter = [name for name in recorded.keys() | now.keys() if name == "config.json" or not name.endswith(".json")]
    if differing := sorted(name for name in matter if recorded.get(name) != now.get(name)):
        name = differing[0]
        file = source if str(source).endswith(f"/{name}") else f"{source}/{name}"
        raise Refusal(
            "K-BASE", "not the base that this run was trained on, or changed since", file=file, key=flag,
            found=now.get(name, "no such file"), expected=recorded.get(name, "no such file"),
            fix=f"give the run's own base as {flag}" if flag else "put the run's own base there",
        )  # fmt: skip


def fingerprint(source: str | Path) -> dict[str, str]:
    """File name → hash, for a file or a model folder, within a second whatever the size; the path is not part of it.

    JSON and SentencePiece files are hashed in full; of each weight file, its size and 64 samples, which differ
    between models of the same shape. ``open_clip:ARCH@FILE`` and ``open_clip:FOLDER`` have the fingerprint of the file
    or folder, open_clip's own tags are their own.
    """
    folder = Path(source)
    if str(source).startswith(OPEN_CLIP):
        arch, at, where = str(source).removeprefix(OPEN_CLIP).partition("@")
        folder = Path(where if at else arch)
    if folder.is_file():
        return {folder.name: sha256(folder)}
    if not folder.is_dir():
        return {"name": str(source)}
    files = sorted(p for p in folder.iterdir() if p.is_file())
    facts = {p.name: sha256(p) for p in files if p.suffix in (".json", ".model")}
    return facts | {p.name: _sampled(p) for p in files if p.suffix in WEIGHTS}


def _sampled(path: Path, places: int = 64, length: int = 1 << 16) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in sorted({max(0, size - length) * i // (places - 1) for i in range(places)}):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()
