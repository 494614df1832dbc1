"""The export of an SDXL run: the LoRA file, its verification and its model card (``--format diffusers``).

As :mod:`llava_moslora.export.export`: built in a hidden folder next to its final place, and renamed into place.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_moslora.adapters.load import read_adapter
from llava_moslora.diffusion.card import write_card
from llava_moslora.diffusion.lora_file import KOHYA_FILE, LORA_FILE, write_lora
from llava_moslora.diffusion.parts import open_folder, require_diffusers
from llava_moslora.export import output_folder
from llava_moslora.files.disk import follow_umask, write_json
from llava_moslora.files.manifest import MANIFEST, read_facts, sha256, write_manifest
from llava_moslora.runs.fingerprint import check_base
from llava_moslora.runs.output_dir import real_place
from llava_moslora.runs.record import EXPORT, SDXL, read_run

REPORT = "export_report.json"  # as of every export
FORMAT = "diffusers"


def export_lora(
    run: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    checkpoint: str | None = None,
    kohya: bool = False,
    overwrite: bool = False,
    prove: bool = True,
) -> Path:
    """Write a valid checkpoint of ``run``, a training of ``scripts/train_sdxl.py``, as a LoRA of diffusers.

    Args:
        output: the folder to write.
        base: the current path of the model, if it was moved.
        checkpoint: which one (:func:`llava_moslora.runs.checkpoints.model_checkpoint`).
        kohya: also a file with kohya's key names.
        overwrite: replace an existing export, if none of its files changed since it was written.
        prove: generate with each file in stock diffusers, in a fresh process, and compare.

    Raises:
        Refusal: before anything is written: no run of this kind, no valid checkpoint, another or changed base, a folder
            exists, diffusers is missing. Later: E-DISK, K-PROOF.
    """
    run, place = Path(run), real_place(Path(output))
    record = read_run(run, SDXL)
    model: Any = record.model
    root = Path(base or record.located.model.model_name_or_path)
    output_folder.check_outside(place, run)
    output_folder.check_output_folder(place, overwrite)
    output_folder.check_inputs(place, [run, root])
    require_diffusers()
    folder = open_folder(root)
    with output_folder.lock_output(place), output_folder.pinned_checkpoint(run, place, checkpoint) as pinned:
        output_folder.check_output_folder(place, overwrite)  # as the last holder of the lock left it
        for part in ("unet", "text_encoder", "text_encoder_2"):
            check_base(folder.root / part, pinned, part, "--model_name_or_path" if base else None)
        adapter = read_adapter(pinned / "adapter")
        files = [LORA_FILE, KOHYA_FILE] if kohya else [LORA_FILE]
        key = {"format": FORMAT, "checkpoint": sha256(pinned / MANIFEST), "files": {name: [] for name in files}}
        staging = output_folder.open_staging(place, key)
        write_lora(adapter, staging, kohya=kohya)
        follow_umask(staging)  # safetensors makes its files 0600
        data: Any = record.data
        report: dict[str, Any] = {"proof": "skipped with --no_proof"}
        if prove:
            from llava_moslora.diffusion import verify

            report = verify.prove(adapter, folder.root, data.prompt, data.resolution, staging, files)
        print(f"verification of {FORMAT}: {proof_in_one_line(report)}", flush=True)
        write_json(staging / REPORT, report)
        write_card(staging, record, read_facts(pinned), folder.root, report, files)
        facts = {
            "format": FORMAT, "run": str(run), "checkpoint": pinned.name, "base": asdict(model),
            "adapter": asdict(record.adapter), "prompt": data.prompt,
        }  # fmt: skip
        write_json(staging / EXPORT, facts)
        (staging / output_folder.RESUME_FILE).unlink()
        write_manifest(staging, {"format": FORMAT, "proof": report["proof"]})
        output_folder.publish(staging, place)
    return Path(output)


def proof_in_one_line(report: dict) -> str:
    if "largest_difference" not in report:
        return report["proof"]
    worst = {
        key: max(found[key] for found in report["largest_difference"].values()) for key in ("step", "picture")
    }  # fmt: skip
    return (
        f"{report['proof']}; stock diffusers' denoising step differs by {worst['step']:.1e}, its picture by "
        f"{worst['picture']:.1e} of 1 (the untrained base: {report['difference_of_the_base']['picture']:.2g})"
    )
