"""``run.json``: everything needed to repeat, resume, export or judge a run, written when it starts."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from llava_moslora._version import __version__
from llava_moslora.errors import Refusal
from llava_moslora.files.json import replace_json
from llava_moslora.files.manifest import sha256
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP

RUN = "run.json"
TOKENIZER = "tokenizer"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Of ``settings``, what resuming, exporting and answering need: group → key → type.
NEEDED = {
    "model": {
        "model_name_or_path": str,
        "vision_tower": str,
        "pretrain_mm_mlp_adapter": str | None,
        "version": str,
        "bits": int,
    },
    "data": {"image_aspect_ratio": str},
    "adapter": {"lora_r": int, "vision_lora_r": int},
    "training": {},
}
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "bitsandbytes", "safetensors")


def write_run(folder: Path, settings: dict) -> None:
    """Write ``run.json`` into ``folder``: ``settings`` (what was asked for, resolved) and how it was run.

    Of a run that goes on, the record keeps the seeds that its earlier checkpoints were trained with.
    """
    seeds = _seeds(read_run(folder)) if (folder / RUN).is_file() else []
    record = {
        "llava_moslora": __version__,
        "settings": settings,
        "seeds": list(dict.fromkeys([*seeds, settings.get("training", {}).get("seed")])),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _installed(name) for name in _PACKAGES},
        "commit": _commit(),
    }
    replace_json(folder / RUN, record)


def read_run(folder: str | Path) -> dict:
    """``run.json`` of a run folder.

    Raises:
        Refusal: C-PATH, the folder is missing or holds no run; K-RUN, its record is damaged, of something else, or
            lacks what this version of the package reads.
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
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal("K-RUN", "not JSON: damaged", file=folder / RUN, found=error, fix="put its copy back") from error
    if not _is_ours(record):
        raise Refusal("K-RUN", "not the record of a run of this package", file=folder / RUN, fix="another folder")
    needed = {(group,): dict for group in NEEDED}
    needed |= {(group, key): kind for group, keys in NEEDED.items() for key, kind in keys.items()}
    needed = {("settings", *path): kind for path, kind in needed.items()} | {("command",): list, ("versions",): dict}
    for path, kind in needed.items():
        value = record
        for key in path:
            value = value.get(key, _ABSENT)  # its group is a dict: groups are looked at first
        if not isinstance(value, kind):
            raise Refusal(
                "K-RUN", "lacks what this version of the package reads", file=folder / RUN, key=".".join(path),
                found=f"{'nothing' if value is _ABSENT else value}, written by version {record['llava_moslora']}",
                expected=f"{getattr(kind, '__name__', kind)}, as version {__version__} writes it",
                fix="use the version of this package that wrote it, or put its copy back",
            )  # fmt: skip
    return record


_ABSENT = object()


def is_run(folder: Path) -> bool:
    """Whether ``run.json`` is there and this package, of whatever version, wrote it."""
    try:
        return _is_ours(json.loads((folder / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _is_ours(record: object) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("llava_moslora"), str)
        and isinstance(record.get("settings"), dict)
    )


def check_seed(record: dict, checkpoint: Path, manifest: dict) -> None:
    """Refuse a checkpoint of another run that was copied in.

    Args:
        record: of the run, as :func:`read_run` gives it. manifest: the checkpoint's.

    Raises:
        Refusal: K-SEED
    """
    if (seed := manifest.get("seed")) not in (seeds := _seeds(record)):
        raise Refusal(
            "K-SEED", "a checkpoint of a run with another seed", file=checkpoint, found=f"seed {seed}",
            expected=f"seed {' or '.join(map(str, seeds))}", fix="move it out of the run folder",
        )  # fmt: skip


def _seeds(record: dict) -> list:
    """Several where a run went on with ``--allow_change seed``."""
    return record.get("seeds") or [record["settings"]["training"].get("seed")]


def fingerprint(source: str | Path) -> dict[str, str]:
    """What identifies a file by its hash, or a model folder in a second however large it is: hashes of its JSON and
    SentencePiece files, and of its weight files a hash of their size and of 64 places in them, so that another model
    of the same shape is told apart. Of ``open_clip:ARCH@FILE`` it is the file, of ``open_clip:FOLDER`` the folder; of
    one of open_clip's own tags, the tag. The path is no part of it: the same model elsewhere is the same model.
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
