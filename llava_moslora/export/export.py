"""One export: everything that can be refused is refused first, then written, proven, described, and published whole.

The folder is built in hidden staging beside its place and appears by one rename (output.py). What a killed export or a
full disk left there is taken up again, as long as it is the same export of the same checkpoint.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from llava_moslora.errors import Refusal
from llava_moslora.export import mapped_weights, verify
from llava_moslora.export.model_card import summary, write_card
from llava_moslora.export.output_folder import (
    PLAN,
    check_folder,
    check_inputs,
    held_checkpoint,
    locked,
    open_staging,
    publish,
    staging_of,
)
from llava_moslora.export.target import Layout
from llava_moslora.export.targets import components, hf, llava, peft, xtuner
from llava_moslora.export.trained_run import DEQUANTIZED, ORIGINAL, TrainedRun, open_trained
from llava_moslora.export.writer import write_weights
from llava_moslora.files.json import write_json
from llava_moslora.files.manifest import MANIFEST, sha256, write_manifest
from llava_moslora.inference.load import EXPORT
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP
from llava_moslora.runs.record import fingerprint, read_run

TARGETS: dict[str, Callable[[TrainedRun, torch.dtype], Layout]] = {
    "hf": hf.layout,
    "peft": peft.per_tower,
    "xtuner": xtuner.merged,
    "xtuner_adapters": xtuner.adapters,
    "llava": llava.layout,
    "llm": components.llm,
    "vision": components.vision,
    "projector": components.projector,
}
REPORT = "export_report.json"
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
        overwrite: replace an export, as it was written, that is there.
        prove: reopen each folder with stock libraries in a fresh process and compare it with the run.

    Returns:
        Format → folder.

    Raises:
        Refusal: before anything is written: no run, no valid checkpoint, another or changed base, a folder exists,
            too little disk or memory, a format that the run does not have. Then: E-DISK; K-PROOF.
    """
    _check_flags(formats, with_base, merge_base)
    folders = {name: Path(output) if len(formats) == 1 else Path(output) / name for name in formats}
    places = {name: folder.resolve() for name, folder in folders.items()}  # through a link: what it points to
    inputs = _inputs(Path(run), read_run(run)["settings"]["model"], llm, vision_tower)
    for folder in places.values():
        check_folder(folder, overwrite)
        check_inputs(folder, inputs)
    with ExitStack() as stack:
        for folder in places.values():
            stack.enter_context(locked(folder))
            check_folder(folder, overwrite)  # as the last holder of the lock left it
        checkpoint = stack.enter_context(held_checkpoint(Path(run), next(iter(places.values()))))
        trained = open_trained(run, checkpoint=checkpoint, llm=llm, vision_tower=vision_tower, merge_base=merge_base)
        dtype = dtype or trained.llm_config.dtype or torch.float32
        layouts = {}
        for name in formats:
            kind = "peft with base" if name == "peft" and with_base else name
            layouts[name] = kind, (peft.with_base if kind != name else TARGETS[name])(trained, dtype)
        sizes = [weights.total_size for _, layout in layouts.values() for weights in layout.weights]
        _check_disk(list(places.values()), sizes)
        prover = functools.partial(verify.prove, mapped=mapped_weights.needed(trained, dtype)) if prove else None
        for name, (kind, layout) in layouts.items():
            _write(trained, kind, layout, dtype, places[name], prover)
    return folders


def _inputs(run: Path, parts: dict, llm: str | Path | None, vision_tower: str | None) -> list[str | Path]:
    """What the export reads: the run, its base as it was trained, and where that is now."""
    towers = [str(tower) for tower in (parts["vision_tower"], vision_tower) if tower]
    towers = [tower.partition("@")[2] if tower.startswith(OPEN_CLIP) else tower for tower in towers]
    others = [parts["model_name_or_path"], parts["pretrain_mm_mlp_adapter"], llm]
    return [run, *(path for path in [*others, *towers] if path)]


def _write(
    trained: TrainedRun, kind: str, layout: Layout, dtype: torch.dtype, folder: Path, prove: Callable[..., dict] | None
) -> None:
    staging = open_staging(folder, _plan(trained, kind, layout, dtype))
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
    publish(staging, folder)


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


def _check_disk(places: list[Path], sizes: list[int]) -> None:
    """Refuse before the first byte what would not fit, counting what an earlier call already wrote."""
    place = places[0].parent
    staged = [file for folder in places for file in staging_of(folder).glob("**/*.safetensors")]
    need = sum(sizes) + SMALL_FILES - sum(path.stat().st_size for path in staged)
    have = shutil.disk_usage(place).free
    if need > have:
        raise Refusal(
            "E-DISK", "too little space", file=place, key="--output_dir", found=f"{have / 1e9:.2f} GB",
            expected=f"{need / 1e9:.2f} GB", fix="free some, or choose another disk; a 16-bit --dtype is smaller",
        )  # fmt: skip


def _plan(trained: TrainedRun, kind: str, layout: Layout, dtype: torch.dtype) -> dict:
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
