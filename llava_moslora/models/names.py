"""Names in the composed model (``LlavaForConditionalGeneration``): its four parts, and which one a name belongs to."""

from __future__ import annotations

LLM = "model.language_model"
VISION_TOWER = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
LM_HEAD = "lm_head"
ADAPTER_NAME = "default"  # PEFT's own default, and the name of the one adapter over all parts

# part → the module that it is in the composed model
PARTS = {"llm": LLM, "vision_tower": VISION_TOWER, "projector": PROJECTOR, "lm_head": LM_HEAD}
# part → the same module in the model of that part alone, such as LlamaForCausalLM or CLIPVisionModel
STANDALONE = {"llm": "model.", "vision_tower": "", "projector": "", "lm_head": "lm_head."}


def part_of(name: str) -> str:
    """``llm``, ``vision_tower``, ``projector`` or ``lm_head``: the part with this module or parameter.

    What a wrapper (PEFT, DeepSpeed) puts before the name does not matter.

    Raises:
        ValueError: no such name is in a composed model.
    """
    return _split(name)[0]


def standalone_name(name: str) -> str:
    """The name of a module or parameter in the model of its part alone: ``model.language_model.layers.0.mlp`` →
    ``model.layers.0.mlp``; of a vision tower, without ``model.vision_tower.``.

    Raises:
        ValueError: no such name is in a composed model.
    """
    part, rest = _split(name)
    return (STANDALONE[part] + rest).removesuffix(".")


def _split(name: str) -> tuple[str, str]:
    """The part, and the rest of the name behind it."""
    for part, module in PARTS.items():
        _, found, rest = f".{name}.".partition(f".{module}.")
        if found:
            return part, rest.removesuffix(".")
    raise ValueError(f"{name} is not a name of LlavaForConditionalGeneration")
