"""Floating-point operations of training a LLaVA or a text-only LLM, counted from its parameters, for MFU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from llava_moslora.models.adapt import parameter_size
from llava_moslora.models.names import part_of
from llava_moslora.models.towers import kind_of, tokens_per_image


@dataclass(frozen=True)
class Flops:
    """FLOPs of training one token or image; a multiply-add is two.

    Recomputation and padding are not counted, and attention is not halved for causality, as in the MFU of PaLM
    (Chowdhery et al. 2022, appendix B).

    Args:
        token: per token in the LLM, without attention.
        pair: per pair of tokens of the same record, in either order: attention.
        trained_token: per token with a label: the LM head.
        image: per image: vision tower and projector; 0 without them.
    """

    token: float
    pair: float
    trained_token: float
    image: float

    @classmethod
    def of(cls, model: nn.Module) -> Flops:
        """Per weight two in forward, two for the gradient of its input, two for its own if it is trained. There is no
        backward through a vision tower without adapters."""
        text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
        weights = dict.fromkeys(("llm", "vision_tower", "projector", "lm_head"), 0.0)  # per token or patch
        adapted = any(p.requires_grad for name, p in model.named_parameters() if part_of(name) == "vision_tower")
        for name, parameter in model.named_parameters():
            part = part_of(name)
            if len(getattr(parameter, "ds_shape", parameter.shape)) < 2 or "original_module" in name:
                continue  # norms and biases: no matrix product
            if "embed" in name and "patch" not in name:
                continue  # a lookup, no product
            per_weight = 2 + 2 * parameter.requires_grad
            if (part != "vision_tower" or adapted) and not (part == "projector" and not adapted and "linear_1" in name):
                per_weight += 2 if "patch_embedding" not in name else 0
            weights[part] += per_weight * parameter_size(parameter)
        if not weights["lm_head"]:  # tied to the word embeddings, which were skipped above
            weights["lm_head"] = 4.0 * parameter_size(model.get_output_embeddings().weight)
        image = 0.0
        if vision is not None:
            patches = tokens_per_image(vision)
            tower_tokens = patches + kind_of(vision).class_tokens  # the projector does not see the class token
            pairs = model.config.vision_feature_layer * vision.hidden_size * tower_tokens**2
            image = weights["vision_tower"] * tower_tokens + weights["projector"] * patches
            image += (12 if adapted else 4) * pairs
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            token=weights["llm"],
            pair=12 * text.num_hidden_layers * text.num_attention_heads * head_width,
            trained_token=weights["lm_head"],
            image=image,
        )
