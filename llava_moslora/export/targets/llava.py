"""``llava``: the original LLaVA's layout, ``LlavaLlamaForCausalLM`` with the tuned tower and the projector inside.

LLaVA makes the tower from ``mm_vision_tower`` and, told that it was unfrozen, then loads the weights of this folder
into it. It stops at the tokenizer's end token and has its templates in its own code.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.errors import Refusal
from llava_moslora.export.target import Layout, check_clip, renamed
from llava_moslora.export.targets.components import write_llm
from llava_moslora.export.trained_run import TrainedRun, plan_tensors
from llava_moslora.export.writer import WeightFiles
from llava_moslora.files.json import read_json, write_json
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP

TOWER = "model.vision_tower.vision_tower.vision_model."


def layout(trained: TrainedRun, dtype: torch.dtype) -> Layout:
    """
    Raises:
        Refusal: C-FORMAT, the original LLaVA has no class for this LLM or this tower, or no way to name it.
    """
    kind = trained.llm_config.model_type
    if kind != "llama":
        raise Refusal(
            "C-FORMAT", "the original LLaVA's class is a Llama", file=trained.llm_folder, key="--format llava",
            found=kind, expected="llama (InternLM2 becomes one)", fix="--format hf takes every LLM",
        )  # fmt: skip
    if trained.vision_spec.startswith(OPEN_CLIP):
        raise Refusal(
            "C-FORMAT", "the original LLaVA takes its tower from a transformers folder", key="--format llava",
            found=trained.vision_spec, fix="--format hf, or train on the tower as --format vision writes it",
        )  # fmt: skip
    check_clip(trained, "llava")
    tensors = [
        *trained.llm_tensors(),
        *renamed(trained.vision_tensors(), ("", TOWER)),
        *renamed(
            plan_tensors(trained.projector),
            ("linear_1.", "model.mm_projector.0."),
            ("linear_2.", "model.mm_projector.2."),
        ),
    ]
    tower = str(Path(trained.vision_spec).resolve())
    return Layout(
        weights=[WeightFiles("", tensors, dtype)],
        finish=lambda folder: write_files(trained, folder, dtype, tower),
        reopen={"original_llava": ".", "vision": tower},
        merged=True,
        rounded=("llm", "vision", "projector"),
    )


def write_files(trained: TrainedRun, folder: Path, dtype: torch.dtype, tower: str) -> None:
    write_llm(trained, folder, dtype)
    config = read_json(folder / "config.json")
    multimodal = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "pad" if trained.pads else None,
        "mm_vision_tower": tower,
        "mm_hidden_size": trained.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": True,  # else the tower's weights in this folder are passed over
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config | multimodal)
