"""Folded adapters as plain LoRAs that stock PEFT loads: tensors, names and ``adapter_config.json`` for one part."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from llava_moslora.adapters.fold import PEFT_PREFIX, LowRank
from llava_moslora.export.trained_run import plan_tensors
from llava_moslora.export.writer import WeightFiles
from llava_moslora.files.json import write_json

STEM = "adapter_model"
FIELDS = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights", "use_rslora", "use_dora"),
)


def adapter_weights(
    layers: Mapping[str, LowRank], folder: str, others: Mapping[str, Tensor] | None = None
) -> WeightFiles:
    """Factors in float32, as trained, under PEFT's names; ``others``: whole tensors (``modules_to_save``)."""
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in (others or {}).items()}
    for name, layer in layers.items():
        assert layer.w is None, f"{name} still has a mixer"
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.a
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.b
    return WeightFiles(folder, plan_tensors(tensors), torch.float32, STEM)


def adapter_config(layers: Mapping[str, LowRank], base: str, *, depth: int | None, task: str | None) -> LoraConfig:
    """The configuration of ``layers``, which are all linears of their names in the layers they stand in.

    Args:
        depth: the layers of the part, so that those without an adapter (the last of a tower) get none; None: all have.
        base: folder of the base, as ``base_model_name_or_path``.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.scaling * layer.rank for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        lora_dropout=0.0,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        rank_pattern={re.escape(name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(name): _whole(a) for name, a in alphas.items() if a != alpha},
        task_type=task,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    adapted = sorted({int(m[1]) for name in layers if (m := re.search(r"\blayers\.(\d+)\.", name))})
    if depth is not None and adapted != list(range(depth)):
        config.layers_to_transform, config.layers_pattern = adapted, "layers"
    return config


def _whole(number: float) -> float | int:
    """Alphas are usually written as whole numbers, and some readers insist."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number


def save_config(config: LoraConfig, folder: Path) -> None:
    """``adapter_config.json`` with the fields that every PEFT knows: one before 0.14 stops at a field it does not."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = config.to_dict()
    stored = {key: sorted(v) if isinstance(v := stored[key], set) else v for key in FIELDS}
    write_json(folder / "adapter_config.json", stored)
