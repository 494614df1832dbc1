"""The kinds of vision towers, and what differs between them.

CLIP has a class token before the patches. SigLIP has none; it pools the last layer with an attention head, which LLaVA
does not use.
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
    """A kind of vision tower."""

    name: str  # the model_type of a complete model with text; a tower's own is NAME_vision_model
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    class_tokens: int  # before the patches; the projector does not get them

    @property
    def strategy(self) -> str:
        """LLaVA's ``vision_feature_select_strategy`` for the patches alone: "default" drops the first token."""
        return "default" if self.class_tokens else "full"


CLIP = TowerKind("clip", CLIPVisionConfig, CLIPVisionModel, class_tokens=1)
SIGLIP = TowerKind("siglip", SiglipVisionConfig, SiglipVisionModel, class_tokens=0)
KINDS = {kind.name: kind for kind in (CLIP, SIGLIP)}


def kind_name(model_type: object) -> str:
    """The kind in a configuration's ``model_type``, supported or not."""
    return str(model_type).removesuffix("_vision_model")


def kind_of(config: PreTrainedConfig) -> TowerKind:
    return KINDS[kind_name(config.model_type)]


def tokens_per_image(config: PreTrainedConfig) -> int:
    """Placeholders per image of a tower with this configuration: its patches, without a class token."""
    return (config.image_size // config.patch_size) ** 2


def drop_unused(tower: PreTrainedModel, layers: int) -> None:
    """Remove all but the first ``layers`` layers, and SigLIP's pooling head.

    They would be computed and adapted without effect. Under ZeRO-3 the head would also fail: its attention is torch's
    own module, which reads the weights of its output projection without calling it, so that they are not gathered.
    """
    tower.encoder.layers = tower.encoder.layers[:layers]
    if isinstance(tower, SiglipVisionModel) and tower.use_head:
        tower.use_head = False
        del tower.head
