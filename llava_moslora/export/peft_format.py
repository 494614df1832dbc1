"""Folders of plain LoRAs that stock PEFT loads: tensors, names and ``adapter_config.json``."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig

from llava_moslora.adapters.fold import Adapter, LowRank, Update, named_tensors, save_config
from llava_moslora.adapters.kinds import DoraUpdate, PeftUpdate
from llava_moslora.export.writer import PlannedTensor, WeightFiles


@dataclass(frozen=True)
class AdapterFolder:
    """The folder ``name`` of an export: a plain LoRA over one part, or one of PEFT's own methods.

    Attributes:
        layers: by module name of the base, all of one kind; LoRAs without a mixer.
        base: the base's folder, as ``base_model_name_or_path``.
        depth: layers of the base, see :func:`adapter_config`. task: PEFT's ``task_type``.
    """

    name: str
    layers: Mapping[str, Update]
    base: str
    depth: int | None = None
    task: str | None = None

    @property
    def config(self) -> PeftConfig:
        stock = {name: layer for name, layer in self.layers.items() if isinstance(layer, PeftUpdate)}
        if stock:
            return _stock_config(stock, self.base, self.task)
        turned = {name: layer.direction for name, layer in self.layers.items() if isinstance(layer, DoraUpdate)}
        plain = {name: layer for name, layer in self.layers.items() if isinstance(layer, LowRank)}
        config = adapter_config(turned or plain, self.base, depth=self.depth, task=self.task)
        config.use_dora = bool(turned)
        return config

    @property
    def weights(self) -> WeightFiles:
        return adapter_weights(Adapter(self.config, dict(self.layers), {}), self.name)

    def write_config(self, export: Path) -> None:
        save_config(self.config, export / self.name)


def adapter_weights(adapter: Adapter, folder: str) -> WeightFiles:
    """Factors and parameters saved whole (``modules_to_save``) in float32, as trained, under PEFT's names."""
    planned = [PlannedTensor(name, tensor) for name, tensor in named_tensors(adapter).items()]
    return WeightFiles(folder, planned, torch.float32, stem="adapter_model")


def adapter_config(layers: Mapping[str, LowRank], base: str, *, depth: int | None, task: str | None) -> LoraConfig:
    """The configuration of ``layers``: the most frequent rank and alpha, and patterns for the others.

    Args:
        depth: the number of layers of the base. Where some of them (a tower's last) have no adapter, the configuration
            names those that have one; None: all have.
        base: the base's folder, as ``base_model_name_or_path``. task: PEFT's ``task_type``.
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


def _stock_config(layers: Mapping[str, PeftUpdate], base: str, task: str | None) -> PeftConfig:
    """As :func:`adapter_config`, for PEFT's own methods; the configuration lists all layers."""
    config = copy.copy(next(iter(layers.values())).config)
    for setting, field in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        if not isinstance(config, AdaLoraConfig):  # which has one for all
            values = {name: getattr(layer.config, setting) for name, layer in layers.items()}
            usual = Counter(values.values()).most_common(1)[0][0]
            setattr(config, setting, usual)
            setattr(config, field, {re.escape(name): value for name, value in values.items() if value != usual})
    config.target_modules, config.inference_mode = sorted(layers), True
    config.task_type, config.base_model_name_or_path = task, base
    return config


def _whole(number: float) -> float | int:
    """Alphas are usually written as integers, and some readers require it."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
