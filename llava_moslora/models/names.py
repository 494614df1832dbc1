"""Names of modules and parameters by part: in ``LlavaForConditionalGeneration``, in a text-only LLM, in SDXL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
LLM = "model.language_model"
VISION_TOWER = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
LM_HEAD = "lm_head"
LLM_ALONE = "model"  # the module of the LLM in a text-only causal LM
ADAPTER_NAME = "default"  # PEFT's own default, and the name of the one adapter over all parts

# part → its module in the composed model
PARTS = {"llm": LLM, "vision_tower": VISION_TOWER, "projector": PROJECTOR, "lm_head": LM_HEAD}
# part → its prefix in the part's own model, such as LlamaForCausalLM or CLIPVisionModel
STANDALONE = {"llm": "model.", "vision_tower": "", "projector": "", "lm_head": "lm_head."}
# Parts of SDXL in training, which are named as diffusers names them in files of LoRAs.
SDXL_PARTS = ("unet", "text_encoder", "text_encoder_2")
# Modules of a transformers decoder; PEFT's own wrapper is called model too.
_ALONE = re.compile(rf"(?:^|\.){LLM_ALONE}\.((?:embed_tokens|layers|norm|rotary_emb)(?:\.|$).*)")
# The last level of an adapter's tensor before the adapter's name: lora_A, hada_w1_a, lokr_w2 …
_ADAPTER_TENSOR = re.compile(rf"\.((?:lora|hada|lokr)_\w+|ranknum)\.(?:{ADAPTER_NAME}\b)?")


def adapter_tensor(name: str) -> str | None:
    """Which tensor of an adapter a parameter is, such as ``lora_A`` or ``hada_w1_a``; None if of no adapter."""
    found = _ADAPTER_TENSOR.search(name)
    return found[1] if found else None


def part_of(name: str) -> str:
    """The part with this module or parameter, a key of :data:`PARTS` or one of :data:`SDXL_PARTS`, whatever prefix PEFT
    or DeepSpeed added.

    Raises:
        ValueError: not a name in one of these models.
    """
    return _split(name)[0]


def standalone_name(name: str) -> str:
    """The name in the part's own model: ``model.language_model.layers.0.mlp`` → ``model.layers.0.mlp``.

    Raises:
        ValueError: not a name in one of these models.
    """
    part, rest = _split(name)
    return (STANDALONE.get(part, "") + rest).removesuffix(".")


def select_parts(named: Mapping[str, T], parts: Iterable[str]) -> dict[str, T]:
    """What belongs to one of ``parts``, by :func:`standalone_name`."""
    return {standalone_name(name): value for name, value in named.items() if part_of(name) in parts}


def _split(name: str) -> tuple[str, str]:
    for part, module in PARTS.items():
        _, found, rest = f".{name}.".partition(f".{module}.")
        if found:
            return part, rest.removesuffix(".")
    if alone := _ALONE.search(name):
        return "llm", alone[1]
    for part in SDXL_PARTS:
        _, found, rest = f".{name}.".partition(f".{part}.")
        if found:
            return part, rest.removesuffix(".")
    raise ValueError(f"{name} is not a name of LlavaForConditionalGeneration, of an LLM or of SDXL")
