"""``peft``: plain LoRA adapters, or adapters of PEFT's own methods, for stock PEFT, and the projector.

Each adapter is over the part it was trained on:
``llm_adapter/`` is for the original LLM's folder (an InternLM2 converted by ``scripts/convert_internlm2.py``),
``vision_adapter/`` for the original vision tower's; ``projector/`` is complete. transformers 5.6 removed a level from
the tower's names, and PEFT only warns about adapters with unknown names and ignores them: earlier versions need
``vision_adapter_transformers4/``, whose names have that level. A text-only run has only ``llm_adapter/``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.errors import Refusal
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.peft_format import AdapterFolder
from llava_moslora.export.target import ExportPlan, Target, check_adapters
from llava_moslora.export.targets import projector
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP


def plan(trained: TrainedRun, _: torch.dtype) -> ExportPlan:
    """Raises C-FORMAT for a vision tower that has no folder of its own, and for a run without adapters."""
    if trained.vision_spec.startswith(OPEN_CLIP):
        raise Refusal(
            "C-FORMAT", "the tower has no transformers folder for PEFT to load", key="--format peft",
            found=trained.vision_spec, fix="--format peft --with_base",
        )  # fmt: skip
    check_adapters(trained, "peft")
    llm, vision = str(trained.llm_folder.resolve()), str(Path(trained.vision_spec).resolve())
    sees = not trained.text_only
    layers, tower_layers = trained.peft_updates("llm", "lm_head"), trained.peft_updates("vision_tower")
    old_names = {f"vision_model.{name}": layer for name, layer in tower_layers.items()}
    depth = trained.llm_config.num_hidden_layers
    tower_depth = trained.vision_config.num_hidden_layers if sees else 0
    adapters = [
        AdapterFolder("llm_adapter", layers, llm, depth=depth, task="CAUSAL_LM"),
        AdapterFolder("vision_adapter", tower_layers, vision, depth=tower_depth),
        AdapterFolder("vision_adapter_transformers4", old_names, vision, depth=tower_depth),
    ]
    adapters = [adapter for adapter in adapters if adapter.layers]
    load_from = {"vision": vision, "projector": "projector"} if sees else {}
    load_from |= {a.name: a.name for a in adapters if a.name in ("llm_adapter", "vision_adapter")}
    if not trained.is_internlm2:  # no stock library loads one: the verification loads the same weights as a Llama
        load_from["llm"] = llm

    def write_files(folder: Path) -> None:
        for adapter in adapters:
            adapter.write_config(folder)
        if sees:
            projector.write_files(trained, folder / "projector")

    projectors = [projector.weights(trained, "projector")] if sees else []
    return ExportPlan(
        weights=[*projectors, *(adapter.weights for adapter in adapters)],
        write_files=write_files,
        load_from=load_from,
    )


TARGET = Target(
    name="peft",
    summary=FORMATS["peft"],
    usage="""from peft import PeftModel
from transformers import AutoModelForCausalLM, VISION_CLASS
llm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("LLM"), FOLDER + "/llm_adapter")
tower = PeftModel.from_pretrained(VISION_CLASS.from_pretrained("TOWER"), FOLDER + "/vision_adapter")""",
    plan=plan,
    merged=(),
    text_usage="""from peft import PeftModel
from transformers import AutoModelForCausalLM
llm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("LLM"), FOLDER + "/llm_adapter")""",
)
