"""Settings objects from what tests have at hand: paths, and the adapters of the two towers."""

from __future__ import annotations

from llava_moslora.config import AdapterSettings, ModelSettings, TowerAdapter


def parts_of(llm, vision_tower, projector=None, **changes) -> ModelSettings:
    """LLM, vision tower and projector by their paths; ``changes`` are other fields."""
    paths = (None if path is None else str(path) for path in (llm, vision_tower, projector))
    llm, vision_tower, projector = paths
    return ModelSettings(llm, vision_tower=vision_tower, pretrain_mm_mlp_adapter=projector, **changes)


def adapters(llm: TowerAdapter | None, vision: TowerAdapter | None = None) -> AdapterSettings:
    """The settings whose ``llm`` and ``vision`` are these; None: no adapter there."""
    names = {"r": "lora_r", "mixer_init": "mixer_init", "train_mixer": "train_mixer"}
    values = {}
    for prefix, adapter in (("", llm), ("vision_", vision)):
        for name, value in vars(adapter or TowerAdapter(0, 1)).items():
            flag = names.get(name, name if name.startswith("lora_") else f"lora_{name}")
            values[prefix + flag] = list(value) if isinstance(value, tuple) else value
    settings = AdapterSettings(**values)
    assert (settings.llm, settings.vision) == (llm, vision)
    return settings
