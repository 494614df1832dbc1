"""The kinds of vision towers, and all that differs between them; everywhere else they are treated alike.

``LlavaForConditionalGeneration`` takes the features of a layer as they are (``vision_feature_select_strategy`` "full")
or without their first token ("default"). CLIP puts a class token before the patches, SigLIP has none: it pools the last
layer with an attention head of its own, which LLaVA never reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)


@dataclass(frozen=True)
class TowerKind:
    """A kind of vision tower.

    Attributes:
        name: the ``model_type`` of a whole model of this kind, texts included; a tower's own adds ``_vision_model``.
        config, model: the tower's classes.
        class_tokens: tokens in front of the patches, which the projector does not see.
    """

    name: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    class_tokens: int

    @property
    def strategy(self) -> str:
        """LLaVA's ``vision_feature_select_strategy`` that leaves exactly the patches."""
        return "default" if self.class_tokens else "full"


CLIP = TowerKind("clip", CLIPVisionConfig, CLIPVisionModel, class_tokens=1)
SIGLIP = TowerKind("siglip", SiglipVisionConfig, SiglipVisionModel, class_tokens=0)
KINDS = {kind.name: kind for kind in (CLIP, SIGLIP)}


def kind_name(model_type: object) -> str:
    """The kind that a configuration's ``model_type`` names, known here or not."""
    return str(model_type).removesuffix("_vision_model")


def kind_of(config: PreTrainedConfig) -> TowerKind:
    """The kind of a tower by its own configuration."""
    return KINDS[kind_name(config.model_type)]


def tokens_per_image(config: PreTrainedConfig) -> int:
    """Placeholders per image of a tower with this configuration: its patches, without a class token."""
    return (config.image_size // config.patch_size) ** 2


def drop_unused(tower: PreTrainedModel, layers: int) -> None:
    """Keep the first ``layers`` layers; with them goes SigLIP's pooling head.

    What is not there is neither computed nor adapted, and no rank of ZeRO-3 waits for it: the head's attention is
    torch's own module, which reads the weights of its output linear without calling it, so that nothing gathers them.
    """
    tower.encoder.layers = tower.encoder.layers[:layers]
    if isinstance(tower, SiglipVisionModel) and tower.use_head:
        tower.use_head = False
        del tower.head
