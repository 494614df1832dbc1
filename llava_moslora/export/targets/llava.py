"""``llava``: the original LLaVA's layout, ``LlavaLlamaForCausalLM`` with the tuned tower and the projector inside.

LLaVA builds the vision tower from ``mm_vision_tower`` and, as ``unfreeze_mm_vision_tower`` is set, loads the weights of
this folder into it. It stops at the tokenizer's end token and has its templates in its own code.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.errors import Refusal
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target, check_clip
from llava_moslora.export.targets import llm
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles, plan_tensors, renamed
from llava_moslora.files.disk import read_json, write_json
from llava_moslora.models.names import PARTS
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    """Raises C-FORMAT if the original LLaVA has no class for the LLM or the vision tower, or no name for it."""
    llm_type = trained.llm_config.model_type
    if llm_type != "llama":
        raise Refusal(
            "C-FORMAT", "the original LLaVA's class is a Llama", file=trained.llm_folder, key="--format llava",
            found=llm_type, expected="llama (InternLM2 becomes one)", fix="--format hf supports every LLM",
        )  # fmt: skip
    if trained.vision_spec.startswith(OPEN_CLIP):
        raise Refusal(
            "C-FORMAT", "the original LLaVA takes its tower from a transformers folder", key="--format llava",
            found=trained.vision_spec, fix="--format hf, or train on a tower written by --format vision",
        )  # fmt: skip
    check_clip(trained, "llava")
    projector = ("linear_1.", "model.mm_projector.0."), ("linear_2.", "model.mm_projector.2.")
    tensors = [
        *trained.llm_tensors(),
        *renamed(trained.vision_tensors(), ("", "model.vision_tower.vision_tower.vision_model.")),
        *renamed(plan_tensors(trained.projector), *projector),
    ]
    tower = str(Path(trained.vision_spec).resolve())
    return ExportPlan(
        weights=[WeightFiles("", tensors, dtype)],
        write_files=lambda folder: write_files(trained, folder, dtype, tower),
        load_from={"original_llava": ".", "vision": tower},
        rounded=tuple(PARTS),
    )


TARGET = Target(
    name="llava",
    summary=FORMATS["llava"],
    usage="""from llava.model.builder import load_pretrained_model
tokenizer, model, image_processor, _ = load_pretrained_model(FOLDER, None, "llava-tuned")""",
    plan=plan,
)


def write_files(trained: TrainedRun, folder: Path, dtype: torch.dtype, tower: str) -> None:
    llm.write_files(trained, folder, dtype)
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
        "unfreeze_mm_vision_tower": True,  # otherwise the tower's weights in this folder are ignored
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", read_json(folder / "config.json") | multimodal)
