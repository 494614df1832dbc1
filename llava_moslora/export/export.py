"""One export from start to end: check, write, verify, write the model card, publish.

The folder is built in a hidden staging folder next to its final place and renamed into place (output_folder.py). An
export that was killed, or that filled the disk, is continued by the same export of the same checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from llava_moslora.config import ModelSettings
from llava_moslora.errors import Refusal, did_you_mean
from llava_moslora.export import output_folder
from llava_moslora.export.card_data import read_scores
from llava_moslora.export.formats import DEQUANTIZED, ORIGINAL
from llava_moslora.export.model_card import proof_in_one_line, write_card
from llava_moslora.export.target import ExportPlan, Target, check_text_only
from llava_moslora.export.targets import (
    hf,
    llava,
    llm,
    peft,
    peft_with_base,
    projector,
    vision,
    vllm,
    xtuner,
    xtuner_adapters,
)
from llava_moslora.export.trained_run import TrainedRun, open_trained
from llava_moslora.export.writer import write_weights
from llava_moslora.files.disk import write_json
from llava_moslora.files.manifest import MANIFEST, sha256, write_manifest
from llava_moslora.models.names import select_parts
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP
from llava_moslora.runs.hyper_parameters import hyper_parameters
from llava_moslora.runs.output_dir import real_place
from llava_moslora.runs.record import EXPORT, read_run

# Values of --format
TARGETS: dict[str, Target] = {
    "hf": hf.TARGET,
    "peft": peft.TARGET,
    "peft_with_base": peft_with_base.TARGET,
    "vllm": vllm.TARGET,
    "xtuner": xtuner.TARGET,
    "xtuner_adapters": xtuner_adapters.TARGET,
    "llava": llava.TARGET,
    "llm": llm.TARGET,
    "vision": vision.TARGET,
    "projector": projector.TARGET,
}
REPORT = "export_report.json"
OTHER_FILES = 64 * 1024**2  # bytes, at most: tokenizer, configurations and the probe


def export(
    run: str | Path,
    output: str | Path,
    formats: Sequence[str] = ("hf",),
    *,
    dtype: torch.dtype | None = None,
    merge_base: str = ORIGINAL,
    with_base: bool = False,
    checkpoint: str | None = None,
    llm: str | Path | None = None,
    vision_tower: str | None = None,
    evaluation: str | Path | None = None,
    overwrite: bool = False,
    prove: bool = True,
) -> dict[str, Path]:
    """Write a valid checkpoint of ``run`` in every one of ``formats`` (:data:`TARGETS`).

    Args:
        run: the ``--output_dir`` of a training.
        output: the folder to write; of several formats, the folder of their folders.
        dtype: of merged weights; None: the dtype of the LLM folder. Adapters and separate projectors are float32.
        merge_base: over a 4-bit LLM, :data:`ORIGINAL` or :data:`DEQUANTIZED`.
        with_base: ``peft`` as ``peft_with_base``.
        checkpoint: which one (:func:`llava_moslora.runs.checkpoints.model_checkpoint`).
        llm, vision_tower: the current paths of the base models, if they were moved.
        evaluation: the ``--output`` of ``scripts/evaluate.py``, whose scores of this checkpoint the model card states.
        overwrite: replace an existing export, if none of its files changed since it was written.
        prove: load each folder with stock libraries in a fresh process and compare it with the run.

    Returns:
        Format → folder.

    Raises:
        Refusal: before anything is written: no run, no valid checkpoint, another or changed base, a folder exists,
            too little disk or memory, a format that cannot hold the run, an evaluation of another model. Later:
            E-DISK, K-NONFINITE, K-PROOF.
    """
    _check_flags(formats, with_base, merge_base)
    folders = {name: Path(output) if len(formats) == 1 else Path(output) / name for name in formats}
    places = {name: real_place(folder) for name, folder in folders.items()}  # of a link: what it points to
    inputs = _inputs(Path(run), read_run(run).located.model, llm, vision_tower)
    for place in places.values():
        output_folder.check_outside(place, Path(run))
        output_folder.check_output_folder(place, overwrite)
        output_folder.check_inputs(place, inputs)
    with ExitStack() as stack:
        for place in places.values():
            stack.enter_context(output_folder.lock_output(place))
            output_folder.check_output_folder(place, overwrite)  # as the last holder of the lock left it
        place = next(iter(places.values()))
        pinned = stack.enter_context(output_folder.pinned_checkpoint(Path(run), place, checkpoint))
        trained = open_trained(run, pinned, llm=llm, vision_tower=vision_tower, merge_base=merge_base)
        if best := trained.manifest.get("best"):
            print(f"{pinned.name}; best by {best['metric']} until then: checkpoint-{best['step']}", flush=True)
        scores = read_scores(evaluation, trained) if evaluation else None
        dtype = dtype or trained.llm_config.dtype or torch.float32
        targets = {n: TARGETS["peft_with_base" if n == "peft" and with_base else n] for n in formats}
        check_text_only(trained, targets)
        plans = {name: target.plan(trained, dtype) for name, target in targets.items()}
        _check_disk(list(places.values()), list(plans.values()))
        proof = None
        if prove:
            from llava_moslora.export import mapped_weights, verify  # not needed with --no_proof

            proof = partial(verify.prove, mapped=mapped_weights.needed(trained, dtype))
        for name, target in targets.items():
            _write(trained, target, plans[name], dtype, places[name], scores, proof)
    return folders


def _check_flags(formats: Sequence[str], with_base: bool, merge_base: str) -> None:
    if unknown := [name for name in formats if name not in TARGETS]:
        raise Refusal(
            "C-FLAG", "unknown format", key="--format", found=unknown[0], expected=", ".join(TARGETS),
            fix=did_you_mean(unknown[0], TARGETS) or "choose one",
        )  # fmt: skip
    if with_base and "peft" not in formats:
        raise Refusal("C-FLAG", "belongs to --format peft", key="--with_base", found=", ".join(formats))
    if merge_base == DEQUANTIZED and (unmerged := [name for name in formats if "llm" not in TARGETS[name].merged]):
        raise Refusal(
            "C-FLAG", "adapters are not merged", key="--merge_base", found=f"--format {unmerged[0]}",
            fix="omit --merge_base; load the base in 4 bits to reproduce the training weights",
        )  # fmt: skip


def _inputs(run: Path, base: ModelSettings, llm: str | Path | None, vision_tower: str | None) -> list[str | Path]:
    """The inputs of the export: the run, its original base paths, and the current ones."""
    towers = [str(tower) for tower in (base.vision_tower, vision_tower) if tower]
    towers = [tower.partition("@")[2] if tower.startswith(OPEN_CLIP) else tower for tower in towers]
    others = [base.model_name_or_path, base.pretrain_mm_mlp_adapter, llm]
    return [run, *(path for path in [*others, *towers] if path)]


def _check_disk(places: list[Path], plans: list[ExportPlan]) -> None:
    """Refuse an export that does not fit on the disk, before writing, counting what an earlier call already wrote."""
    parent = places[0].parent
    staged = [file for folder in places for file in output_folder.staging_of(folder).glob("**/*.safetensors")]
    need = sum(weights.total_size for plan in plans for weights in plan.weights) + OTHER_FILES
    need -= sum(path.stat().st_size for path in staged)
    have = shutil.disk_usage(parent).free
    if need > have:
        raise Refusal(
            "E-DISK", "too little space", file=parent, key="--output_dir", found=f"{have / 1e9:.2f} GB",
            expected=f"{need / 1e9:.2f} GB", fix="free space, or choose another disk; a 16-bit --dtype is smaller",
        )  # fmt: skip


def _write(
    trained: TrainedRun,
    target: Target,
    plan: ExportPlan,
    dtype: torch.dtype,
    folder: Path,
    scores: dict | None,
    prove: Callable | None,
) -> None:
    staging = output_folder.open_staging(folder, _resume_key(trained, target, plan, dtype))
    write_weights(staging, plan.weights)
    plan.write_files(staging)
    if prove is None:
        report = {"proof": "skipped with --no_proof"}
    elif plan.not_provable:
        report = {"proof": plan.not_provable}
    else:
        report = prove(trained, target, plan, staging, dtype)
    print(f"verification of {target.name}: {proof_in_one_line(report)}", flush=True)
    write_json(staging / REPORT, report)
    write_card(trained, target, dtype, report, staging, scores)
    facts = {
        "format": target.name,
        "run": str(trained.run),
        "checkpoint": trained.checkpoint.name,
        "checkpoint_sha256": sha256(trained.checkpoint / MANIFEST),  # which has the hashes of all its files
        "template": trained.template,
        "image_aspect_ratio": trained.record.data.image_aspect_ratio,
        "base": asdict(trained.record.model),
        "adapter": asdict(trained.record.adapter),
        "training": hyper_parameters(trained.record),
        "merge_base": trained.merge_base if "llm" in target.merged else None,
        "merged_layers": len(select_parts(trained.adapter or {}, target.merged)),
    }
    write_json(staging / EXPORT, facts)
    (staging / output_folder.RESUME_FILE).unlink()
    write_manifest(staging, {"format": target.name, "proof": report["proof"]})
    output_folder.publish(staging, folder)


def _resume_key(trained: TrainedRun, target: Target, plan: ExportPlan, dtype: torch.dtype) -> dict:
    """Everything that the weight files depend on: a staging folder with a different key is not continued."""
    return {
        "format": target.name,
        "dtype": str(dtype),
        "merge_base": trained.merge_base,
        "checkpoint": sha256(trained.checkpoint / MANIFEST),
        "llm": trained.manifest["llm"],  # fingerprints, which the base was compared with
        "vision_tower": trained.manifest["vision_tower"],
        "files": {
            f"{weights.folder}/{file}": [planned.name for planned in tensors]
            for weights in plan.weights
            for file, tensors in weights.files().items()
        },
    }
