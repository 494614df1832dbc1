"""Verification of an exported LoRA: stock diffusers, in a fresh process, must generate the trained model's images.

The reference is the base model with A, W and B as trained; both compute in float32.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llava_moslora.adapters.attach import attach
from llava_moslora.adapters.fold import Adapter
from llava_moslora.diffusion.lora_file import LORA_FILE
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import write_json
from llava_moslora.models.names import SDXL_PARTS

PROBE, QUESTION = "probe", "question.json"
STEP_BOUND = 1e-4  # relative to the largest value
PICTURE_BOUND = 1 / 510  # half of a grey level in 255
STEPS, TIMESTEP, SEED, LARGEST = 4, 500, 0, 512


def prove(adapter: Adapter, base: Path, prompt: str, resolution: int, folder: Path, files: list[str]) -> dict:
    """Compare the LoRAs in ``folder`` with ``adapter``, as it was trained; the report, for ``export_report.json``.

    Args:
        base: folder of the model. files: names of the LoRA files in ``folder``.

    Raises:
        Refusal: K-PROOF, they differ, or diffusers cannot load a file.
    """
    from llava_moslora.diffusion import probe  # imported here: it needs diffusers

    place = folder / PROBE
    place.mkdir(exist_ok=True)
    shutil.copyfile(probe.__file__, place / "probe.py")
    question = {
        "base": str(base.resolve()), "lora": LORA_FILE, "prompt": prompt, "seed": SEED, "timestep": TIMESTEP,
        "size": min(resolution, LARGEST), "steps": STEPS, "device": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    write_json(place / QUESTION, question)
    found = {name: _run_probe(folder, name) for name in files}
    untrained, expected = _answers_of_run(probe, adapter, question)
    differences = {
        name: {key: _difference(value, expected[key]) for key, value in answer.items()}
        for name, answer in found.items()
    }  # fmt: skip
    report = {
        "proof": "passed",
        "process": "a fresh one, with stock diffusers only; repeat it with probe/probe.py",
        "compared": "one step of denoising and one picture, in float32, with a fixed seed",
        "question": {key: question[key] for key in ("prompt", "seed", "timestep", "size", "steps", "device")},
        "largest_difference": differences,
        "bounds": {"step": STEP_BOUND * float(expected["step"].abs().max()), "picture": PICTURE_BOUND},
        "difference_of_the_base": {key: _difference(value, expected[key]) for key, value in untrained.items()},
        "versions": {n: metadata.version(n) for n in ("torch", "diffusers", "transformers", "peft", "safetensors")},
    }
    _refuse_differences(folder, report)
    return report


def _answers_of_run(probe, adapter: Adapter, question: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of the base, and of the base with the adapter in training form."""
    pipeline = probe.load_base(question)
    untrained = probe.answers(pipeline, question)
    holder = nn.Module()  # names as in training; the adapter goes into the pipeline's own modules
    for part in SDXL_PARTS:
        holder.add_module(part, getattr(pipeline, part))
    attach(holder, adapter)
    return untrained, probe.answers(pipeline, question)


def _run_probe(folder: Path, name: str) -> dict[str, Tensor]:
    output = folder / PROBE / ".found.safetensors"
    command = [sys.executable, str(folder / PROBE / "probe.py"), "--output", str(output), "--lora", str(folder / name)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise Refusal("E-DISK", "the disk is full", file=output, fix="free space, then start again")
        raise Refusal(
            "K-PROOF", "stock diffusers cannot load the export", file=folder / name,
            found=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}",
            fix="--no_proof writes the export anyway; inspect it with probe/probe.py",
        )  # fmt: skip
    found = load_file(output)
    output.unlink()
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _refuse_differences(folder: Path, report: dict) -> None:
    for name, differences in report["largest_difference"].items():
        for key, difference in differences.items():
            if not difference <= report["bounds"][key]:  # also NaN
                raise Refusal(
                    "K-PROOF", "the export's images differ from the run's", file=folder / name, key=key,
                    found=difference, expected=f"at most {report['bounds'][key]:.2g}",
                    fix="please report this; --no_proof writes the export anyway",
                )  # fmt: skip
