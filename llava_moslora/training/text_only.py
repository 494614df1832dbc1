"""Text-only runs, without ``--vision_tower``: the flags that they refuse, and those that only they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings, TrainingSettings
from llava_moslora.errors import Refusal

# Flags about images, the vision tower and the projector.
VISION_FLAGS: dict[type, tuple[str, ...]] = {
    ModelSettings: ("pretrain_mm_mlp_adapter",),
    DataSettings: ("image_folder", "image_aspect_ratio", "image_engine", "follow_image_links", "decode_images"),
    AdapterSettings: (
        "tune_mm_mlp_adapter",
        *(f.name for f in fields(AdapterSettings) if f.name.startswith("vision_") and f.name != "vision_lora_r"),
    ),
    TrainingSettings: ("vision_lr", "mm_projector_lr", "sample_image_folder"),
}
STAGE_1_TEMPLATE = "plain"  # prompts of which only the answers are left without images


def check_text_only(
    model: ModelSettings, data: DataSettings, adapter: AdapterSettings, training: Mapping[str, Any]
) -> AdapterSettings:
    """``adapter`` as used by the run: for a text-only run without the vision tower's.

    Args:
        model: whose parts are named. training: values of the training flags by name.

    Raises:
        Refusal: as :func:`check_flags_of_images`; C-FLAG, a text-only run without an adapter.
    """
    check_flags_of_images(model, data, adapter, training)
    if not model.text_only:
        return adapter
    if adapter.llm is None:
        raise Refusal("C-FLAG", "nothing to train", key="--lora_r", found=0, expected="above 0")
    return replace(adapter, vision_lora_r=0)


def check_flags_of_images(
    model: ModelSettings,
    data: DataSettings,
    adapter: AdapterSettings | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Check the flags that depend on whether there is a vision tower; the last two may be None.

    Raises:
        Refusal: C-FLAG, without a vision tower an image flag that is not at its default; with one
            ``--train_on_prompt``.
    """
    if not model.text_only:
        if data.train_on_prompt:
            raise Refusal("C-FLAG", "is for an LLM without a vision tower", key="--train_on_prompt", fix="omit it")
        return
    given = asdict(model) | asdict(data) | asdict(adapter or AdapterSettings()) | dict(training or {})
    for settings, names in VISION_FLAGS.items():
        for f in fields(settings):
            default = [] if f.default is MISSING else f.default  # a list's default is a new object
            if f.name in names and given.get(f.name, default) != default:
                _refuse(f.name, given[f.name])
    vision_rank = next(f.default for f in fields(AdapterSettings) if f.name == "vision_lora_r")
    if given["vision_lora_r"] not in (0, vision_rank):
        _refuse("vision_lora_r", given["vision_lora_r"])
    if model.version == STAGE_1_TEMPLATE:
        _refuse("version", model.version)


def _refuse(name: str, value: object) -> None:
    raise Refusal(
        "C-FLAG", "has no effect without a vision tower: the run would be text-only", key=f"--{name}", found=value,
        fix="give --vision_tower, or omit this flag",
    )  # fmt: skip
