"""``peft --with_base``: one plain LoRA adapter, projector included, over a complete LLaVA that is written next to it.

The base is the LLaVA that the run started from. transformers 5.6 removed a level from the vision tower's names; inside
a LLaVA the adapter's names have it, and PEFT drops it if it does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig

from llava_moslora.adapters.fold import Adapter, LowRank, fold_layers, save_config
from llava_moslora.export import peft_format
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target, check_adapters, check_lora
from llava_moslora.export.targets import hf
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles
from llava_moslora.files.tensors import in_memory
from llava_moslora.models.names import LLM, LM_HEAD, PARTS, PROJECTOR, VISION_TOWER
from llava_moslora.models.projector import read_projector


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    """Raises C-FORMAT for a run without adapters."""
    check_adapters(trained, "peft")
    check_lora(trained, "peft --with_base")
    start = trained.record.located.model.pretrain_mm_mlp_adapter
    widths = trained.vision_config.hidden_size, trained.llm_config.hidden_size
    projector = None if start is None else read_projector(start, *widths)
    layers = composed_names(fold_layers(trained.updates("llm", "lm_head")))
    for name, layer in fold_layers(trained.updates("vision_tower")).items():
        layers[f"{VISION_TOWER}.vision_model.{name}"] = layer
    whole = {f"{PROJECTOR}.{name}": tensor for name, tensor in trained.projector.items()}
    adapter = Adapter(config_of_both(layers), dict(layers), in_memory(whole, trained.checkpoint))

    def write_files(folder: Path) -> None:
        hf.write_files(trained, folder / "base", dtype)
        save_config(adapter.config, folder / "adapter")

    base = WeightFiles("base", hf.tensors(trained, projector, merged=()), dtype)
    return ExportPlan(
        weights=[base, peft_format.adapter_weights(adapter, "adapter")],
        write_files=write_files,
        load_from={"llava": "base", "adapter": "adapter"},
        rounded=tuple(PARTS),
    )


TARGET = Target(
    name="peft with base",
    summary=FORMATS["peft_with_base"],
    usage=f"""from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(FOLDER + "/base", backend="pil")  # scales images as in training
base = AutoModelForImageTextToText.from_pretrained(FOLDER + "/base", dtype="auto")
model = PeftModel.from_pretrained(base, FOLDER + "/adapter")
{hf.ASK}""",
    plan=plan,
    merged=(),
)


def composed_names(llm_layers: dict[str, LowRank]) -> dict[str, LowRank]:
    """The LLM's layers under their names in the complete LLaVA."""
    return {n if n == LM_HEAD else f"{LLM}.{n.removeprefix('model.')}": layer for n, layer in llm_layers.items()}


def config_of_both(layers: dict[str, LowRank]) -> LoraConfig:
    """One configuration for LLM and vision tower: their linear layers share names, but not ranks or depth."""
    vision = {name: layer for name, layer in layers.items() if ".vision_tower." in name}
    llm = {name: layer for name, layer in layers.items() if name not in vision}
    config = peft_format.adapter_config(llm or vision, "base", depth=None, task=None)
    if llm and vision:
        own = peft_format.adapter_config(vision, "base", depth=None, task=None)
        assert not own.rank_pattern and not own.alpha_pattern, "one rank in the whole tower"
        config.rank_pattern[r".*vision_tower\..*"] = own.r
        config.alpha_pattern[r".*vision_tower\..*"] = own.lora_alpha
    config.target_modules = "|".join(target_patterns(layers))
    config.modules_to_save = ["multi_modal_projector"]
    return config


def target_patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions that match ``names`` and nothing else; the tower's also without ``vision_model.``"""
    blocks: dict[str, dict[str, list[str]]] = {}  # "….layers." -> linear -> the numbers of its layers
    patterns = []
    for name in names:
        if found := re.fullmatch(r"(.+\.layers\.)(\d+)\.(.+)", name):
            block, number, linear = found.groups()
            blocks.setdefault(block, {}).setdefault(linear, []).append(number)
        else:
            patterns.append(re.escape(name))
    for block, linears in blocks.items():
        block = re.escape(block).replace(r"vision_model\.", r"(?:vision_model\.)?")
        same_layers: dict[str, list[str]] = {}
        for linear, numbers in linears.items():
            same_layers.setdefault("|".join(numbers), []).append(re.escape(linear))
        patterns += [f"{block}(?:{numbers})\\.(?:{'|'.join(linears)})" for numbers, linears in same_layers.items()]
    return patterns
