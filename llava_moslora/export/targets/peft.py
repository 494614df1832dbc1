"""``peft``: the folded adapters for stock PEFT, each over the part it was trained on, and the projector.

``llm_adapter/`` lies over the original LLM's folder (an InternLM2 converted by ``scripts/convert_internlm2.py``),
``vision_adapter/`` over the original tower's, ``projector/`` is whole. transformers 5.6 took a level away from the
tower's names, and PEFT would leave adapters out with no more than a warning: ``vision_adapter_transformers4/`` has it.

With ``with_base`` there is instead one adapter
over a complete LLaVA that is written beside it::

    base = AutoModelForImageTextToText.from_pretrained("export/base")
    model = PeftModel.from_pretrained(base, "export/adapter")

Inside a LLaVA the level is in the names: there PEFT drops it where it is gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig

from llava_moslora.adapters.fold import LowRank
from llava_moslora.errors import Refusal
from llava_moslora.export import peft_format
from llava_moslora.export.target import Layout
from llava_moslora.export.targets import components, hf
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles
from llava_moslora.files.json import read_json
from llava_moslora.models.internlm2 import MODEL_TYPE
from llava_moslora.models.names import LLM, PROJECTOR, VISION_TOWER
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP
from llava_moslora.models.projector import read_projector

# parts; prefix where they stand alone, in LlavaForConditionalGeneration as saved by transformers 4.52 and later
INSIDE = (
    (("llm", "lm_head"), "model.", f"{LLM}."),  # the head has the same name in both
    (("vision_tower",), "", f"{VISION_TOWER}.vision_model."),
)


def per_tower(trained: TrainedRun, _: torch.dtype) -> Layout:
    """
    Raises:
        Refusal: C-FORMAT, a tower that has no folder of its own, or a run without adapters.
    """
    if trained.vision_spec.startswith(OPEN_CLIP):
        raise Refusal(
            "C-FORMAT", "the tower has no transformers folder for PEFT to load", key="--format peft",
            found=trained.vision_spec, fix="--format peft --with_base",
        )  # fmt: skip
    _refuse_without(trained)
    weights = [components.projector_weights(trained, "projector")]
    reopen = {"llm": str(trained.llm_folder.resolve()), "vision": str(Path(trained.vision_spec).resolve())}
    reopen["projector"] = "projector"
    configs: dict[str, LoraConfig] = {}
    llm_depth, depth = trained.llm_config.num_hidden_layers, trained.vision_config.num_hidden_layers
    llm, tower = ("llm", "lm_head"), ("vision_tower",)
    for folder, parts, base, level, layers_there, task in (
        ("llm_adapter", llm, "llm", "", llm_depth, "CAUSAL_LM"),
        ("vision_adapter", tower, "vision", "", depth, None),
        ("vision_adapter_transformers4", tower, "vision", "vision_model.", depth, None),
    ):
        if layers := {level + name: layer for name, layer in trained.updates_of_original(*parts).items()}:
            weights.append(peft_format.adapter_weights(layers, folder))
            configs[folder] = peft_format.adapter_config(layers, reopen[base], depth=layers_there, task=task)
            reopen.setdefault(f"{base}_adapter", folder)
    if read_json(trained.llm_folder / "config.json").get("model_type") == MODEL_TYPE:
        del reopen["llm"]  # no stock library loads an InternLM2; reopened over the same weights as a Llama

    def finish(folder: Path) -> None:
        for name, config in configs.items():
            peft_format.save_config(config, folder / name)
        components.write_projector(trained, folder / "projector")

    return Layout(weights, finish, reopen, merged=False)


def with_base(trained: TrainedRun, dtype: torch.dtype) -> Layout:
    """One adapter, projector included, over ``base/``: the LLaVA that the run began from, in ``dtype``.

    Raises:
        Refusal: C-FORMAT, a run without adapters.
    """
    _refuse_without(trained)
    start = trained.settings["model"]["pretrain_mm_mlp_adapter"]
    widths = trained.vision_config.hidden_size, trained.llm_config.hidden_size
    projector = None if start is None else read_projector(start, *widths)
    layers = {}
    for parts, alone, inside in INSIDE:
        for name, layer in trained.updates(*parts).items():
            name = name.removesuffix(".weight")
            layers[inside + name.removeprefix(alone) if name.startswith(alone) else name] = layer.read()
    saved = {f"{PROJECTOR}.{name}": tensor for name, tensor in trained.projector.items()}

    def finish(folder: Path) -> None:
        hf.write_files(trained, folder / "base", dtype)
        peft_format.save_config(_over_both(layers), folder / "adapter")

    return Layout(
        weights=[
            WeightFiles("base", hf.tensors(trained, projector, merged=False), dtype),
            peft_format.adapter_weights(layers, "adapter", saved),
        ],
        finish=finish,
        reopen={"llava": "base", "adapter": "adapter"},
        merged=False,
        rounded=("base",),
    )


def _refuse_without(trained: TrainedRun) -> None:
    if trained.adapter is None:
        raise Refusal(
            "C-FORMAT", "stage 1 trains the projector and no adapters", file=trained.run, key="--format peft",
            fix="--format projector",
        )  # fmt: skip


def _over_both(layers: dict[str, LowRank]) -> LoraConfig:
    """Settings per tower and targets as patterns: the towers share the names of their linears, not ranks or numbers."""
    vision = {name: layer for name, layer in layers.items() if ".vision_tower." in name}
    llm = {name: layer for name, layer in layers.items() if name not in vision}
    config = peft_format.adapter_config(llm or vision, "base", depth=None, task=None)
    if llm and vision:
        own = peft_format.adapter_config(vision, "base", depth=None, task=None)
        assert not own.rank_pattern and not own.alpha_pattern, "one rank in the whole tower"
        config.rank_pattern[r".*vision_tower\..*"] = own.r
        config.alpha_pattern[r".*vision_tower\..*"] = own.lora_alpha
    config.target_modules = "|".join(_patterns(layers))
    config.modules_to_save = ["multi_modal_projector"]
    return config


def _patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions that match ``names`` and nothing else, the tower's also without its level."""
    grid: dict[str, dict[str, dict[str, None]]] = {}
    rest = []
    for name in names:
        if found := re.fullmatch(r"(.+\.layers\.)(\d+)\.(.+)", name):
            grid.setdefault(found[1], {}).setdefault(found[3], {})[found[2]] = None
        else:
            rest.append(re.escape(name))
    for block, linears in grid.items():
        block = re.escape(block).replace(r"vision_model\.", r"(?:vision_model\.)?")
        by_layers: dict[str, list[str]] = {}
        for linear, numbers in linears.items():
            by_layers.setdefault("|".join(numbers), []).append(re.escape(linear))
        rest += [f"{block}(?:{numbers})\\.(?:{'|'.join(found)})" for numbers, found in by_layers.items()]
    return rest
