"""One export: everything that can be refused is refused first, then written, proven, described, and published whole.

The folder is built in hidden staging beside its place and appears by one rename. What a killed export or a full disk
left there is taken up again, as long as it is the same export of the same checkpoint.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llava_moslora.errors import Refusal
from llava_moslora.export import hf, llava, mapped_weights, parts, peft_adapters, proof, xtuner
from llava_moslora.export.card import summary, write_card
from llava_moslora.export.layout import Layout
from llava_moslora.export.source import DEQUANTIZED, ORIGINAL, Trained, open_trained
from llava_moslora.export.streaming import write_weights
from llava_moslora.inference.load import EXPORT
from llava_moslora.runs.manifest import MANIFEST, fsync, sha256, write_json, write_manifest
from llava_moslora.runs.record import fingerprint

TARGETS: dict[str, Callable[[Trained, torch.dtype], Layout]] = {
    "hf": hf.layout,
    "peft": peft_adapters.per_tower,
    "xtuner": xtuner.merged,
    "xtuner_adapters": xtuner.adapters,
    "llava": llava.layout,
    "llm": parts.llm,
    "vision": parts.vision,
    "projector": parts.projector,
}
PLAN, REPORT = ".plan.json", "export_report.json"
SMALL_FILES = 64 * 1024**2  # room for tokenizer, configurations and the probe


def export(
    run: str | Path,
    output: str | Path,
    formats: Sequence[str] = ("hf",),
    *,
    dtype: torch.dtype | None = None,
    merge_base: str = ORIGINAL,
    with_base: bool = False,
    llm: str | Path | None = None,
    vision_tower: str | None = None,
    overwrite: bool = False,
    prove: bool = True,
) -> dict[str, Path]:
    """Write the newest valid checkpoint of ``run`` in every one of ``formats`` (:data:`TARGETS`).

    Args:
        run: the ``--output_dir`` of a training.
        output: the folder to write; of several formats, the folder of their folders.
        dtype: of merged weights; None: the dtype of the LLM folder. Adapters and projectors apart are float32.
        merge_base: over a 4-bit LLM, :data:`ORIGINAL` or :data:`DEQUANTIZED`.
        with_base: of ``peft``, one adapter over a base LLaVA written beside it.
        llm, vision_tower: where the base is now, if not where it was when the run was trained.
        prove: reopen each folder with stock libraries in a fresh process and compare it with the run.

    Returns:
        Format → folder.

    Raises:
        Refusal: before anything is written: no run, no valid checkpoint, another or changed base, a folder exists,
            too little disk or memory, a format that the run does not have. Then: E-DISK; K-PROOF.
    """
    output = Path(output)
    _check_flags(formats, with_base, merge_base)
    folders = {name: output if len(formats) == 1 else output / name for name in formats}
    for folder in folders.values():
        if folder.exists() and not overwrite:
            raise Refusal(
                "C-OUTPUT", "already exists", file=folder, key="--output_dir", fix="choose another, or --overwrite"
            )
        if folder.exists() and not (folder / EXPORT).is_file():
            raise Refusal(
                "C-OUTPUT", "not an export: nothing is deleted here", file=folder, key="--output_dir",
                expected=f"{EXPORT} in it", fix="choose another",
            )  # fmt: skip
    trained = open_trained(run, llm=llm, vision_tower=vision_tower, merge_base=merge_base)
    dtype = dtype or trained.llm_config.dtype or torch.float32
    layouts = {}
    for name in formats:
        target = peft_adapters.with_base if name == "peft" and with_base else TARGETS[name]
        layouts[name] = target(trained, dtype)
    _check_disk(output, [weights.total_size for layout in layouts.values() for weights in layout.weights])
    prover = functools.partial(proof.prove, mapped=mapped_weights.needed(trained, dtype)) if prove else None
    for name, layout in layouts.items():
        kind = "peft with base" if name == "peft" and with_base else name
        _write(trained, kind, layout, dtype, folders[name], prover)
    return folders


def _write(
    trained: Trained, kind: str, layout: Layout, dtype: torch.dtype, folder: Path, prove: Callable[..., dict] | None
) -> None:
    staging = folder.with_name(f".{folder.name}.staging")
    _open_staging(staging, _plan(trained, kind, layout, dtype))
    write_weights(staging, layout.weights)
    layout.finish(staging)
    if prove is None:
        report = {"proof": "skipped with --no_proof"}
    elif layout.unproven:
        report = {"proof": layout.unproven}
    else:
        report = prove(trained, layout, staging, dtype)
    print(f"proof of {kind}: {summary(report)}", flush=True)
    write_json(staging / REPORT, report)
    write_card(trained, kind, dtype, report, staging)
    facts = {
        "format": kind,
        "run": str(trained.run),
        "checkpoint": trained.checkpoint.name,
        "template": trained.template,
        "image_aspect_ratio": trained.settings["data"]["image_aspect_ratio"],
        "base": trained.settings["model"],
        "merge_base": trained.merge_base if layout.merged else None,
        "merged_layers": len(trained.adapter) if layout.merged and trained.adapter else 0,
    }
    write_json(staging / EXPORT, facts)
    (staging / PLAN).unlink()
    write_manifest(staging, {"format": kind, "proof": report["proof"]})
    _publish(staging, folder)


def _check_flags(formats: Sequence[str], with_base: bool, merge_base: str) -> None:
    if unknown := [name for name in formats if name not in TARGETS]:
        raise Refusal(
            "C-FLAG", "unknown format", key="--format", found=unknown[0], expected=", ".join(TARGETS), fix="choose one"
        )
    if with_base and "peft" not in formats:
        raise Refusal("C-FLAG", "belongs to --format peft", key="--with_base", found=", ".join(formats))
    if merge_base == DEQUANTIZED and (apart := [name for name in formats if name in ("peft", "xtuner_adapters")]):
        raise Refusal(
            "C-FLAG", "nothing is merged in adapters", key="--merge_base", found=f"--format {apart[0]}",
            fix="leave --merge_base out; load the base in 4 bits to have what training saw",
        )  # fmt: skip


def _check_disk(output: Path, sizes: list[int]) -> None:
    """Refuse before the first byte what would not fit, counting what an earlier call already wrote."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    staged = [
        *output.parent.glob(f".{output.name}.staging/**/*.safetensors"),
        *output.glob(".*.staging/**/*.safetensors"),
    ]
    need = sum(sizes) + SMALL_FILES - sum(path.stat().st_size for path in staged)
    have = shutil.disk_usage(place).free
    if need > have:
        raise Refusal(
            "E-DISK", "too little space", file=place, key="--output_dir", found=f"{have / 1e9:.2f} GB",
            expected=f"{need / 1e9:.2f} GB", fix="free some, or choose another disk; a 16-bit --dtype is smaller",
        )  # fmt: skip


def _plan(trained: Trained, kind: str, layout: Layout, dtype: torch.dtype) -> dict:
    """What decides every byte of the weight files."""
    return {
        "format": kind,
        "dtype": str(dtype),
        "merge_base": trained.merge_base,
        "checkpoint": sha256(trained.checkpoint / MANIFEST),
        "llm": fingerprint(trained.llm_folder),
        "vision_tower": fingerprint(trained.vision_spec),
        "files": {
            f"{weights.folder}/{file}": [planned.name for planned in tensors]
            for weights in layout.weights
            for file, tensors in weights.files().items()
        },
    }


def _open_staging(staging: Path, plan: dict) -> None:
    """Keep what an earlier call with the same plan finished; delete anything else."""
    if staging.is_dir():
        try:
            same = json.loads((staging / PLAN).read_text(encoding="utf-8")) == plan
        except (OSError, ValueError):
            same = False
        if same:
            done = sum(1 for file in plan["files"] if (staging / file.lstrip("/")).is_file())
            print(f"going on: {done} of {len(plan['files'])} weight files are there", flush=True)
            return
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    write_json(staging / PLAN, plan)


def _publish(staging: Path, folder: Path) -> None:
    """One rename; an old folder goes only when the new one is complete."""
    trash = folder.with_name(f".{folder.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        os.rename(folder, trash)
    os.rename(staging, folder)
    fsync(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)
