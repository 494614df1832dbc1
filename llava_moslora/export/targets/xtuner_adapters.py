"""``xtuner_adapters``: as ``xtuner``, but plain LoRAs that are not merged; readers also need the paths of the original
LLM and vision tower.

Over an InternLM2 the adapters carry InternLM2's own names, for its own code: the LoRAs of query, key and value become
one LoRA of the sum of their ranks over the fused ``wqkv``, exactly.

Shapes: d width of a head, K key/value heads, G query heads per key/value head, D width of the LLM, r rank.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llava_moslora.adapters.fold import LowRank
from llava_moslora.errors import Refusal
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.peft_format import AdapterFolder
from llava_moslora.export.target import ExportPlan, Target, check_clip, check_lora
from llava_moslora.export.targets import projector
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.models.internlm2 import LAYER_NAMES, NAMES
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP

INTERNLM2_NAMES = {llama: internlm2 for internlm2, llama in (NAMES | LAYER_NAMES).items()}
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def plan(trained: TrainedRun, _: torch.dtype) -> ExportPlan:
    """Raises C-FORMAT for a vision tower that has no folder of its own, or is not a CLIP."""
    check_clip(trained, "xtuner_adapters")
    if trained.vision_spec.startswith(OPEN_CLIP):
        raise Refusal(
            "C-FORMAT", "adapters need a vision tower folder as their base", key="--format xtuner_adapters",
            found=trained.vision_spec, fix="--format xtuner, which contains the tower",
        )  # fmt: skip
    check_lora(trained, "xtuner_adapters")
    layers = trained.loras("llm", "lm_head")
    if trained.is_internlm2:
        layers = to_internlm2(layers, trained.llm_config)
    tower_layers = {f"vision_model.{name}": layer for name, layer in trained.loras("vision_tower").items()}
    llm, vision = str(trained.llm_folder.resolve()), str(Path(trained.vision_spec).resolve())
    depth, tower_depth = trained.llm_config.num_hidden_layers, trained.vision_config.num_hidden_layers
    adapters = {
        "llm_adapter": AdapterFolder("llm_adapter", layers, llm, depth=depth, task="CAUSAL_LM"),
        "vision_adapter": AdapterFolder("visual_encoder_adapter", tower_layers, vision, depth=tower_depth),
    }
    adapters = {part: adapter for part, adapter in adapters.items() if adapter.layers}
    load_from = {"llm": llm, "vision": vision, "projector": "projector"}
    not_provable = "not possible: the adapters need InternLM2's custom code, which is never run here"

    def write_files(folder: Path) -> None:
        for adapter in adapters.values():
            adapter.write_config(folder)
        projector.write_files(trained, folder / "projector")

    return ExportPlan(
        weights=[projector.weights(trained, "projector"), *(adapter.weights for adapter in adapters.values())],
        write_files=write_files,
        load_from=load_from | {part: adapter.name for part, adapter in adapters.items()},
        not_provable=not_provable if trained.is_internlm2 else None,
    )


TARGET = Target(
    name="xtuner_adapters",
    summary=FORMATS["xtuner_adapters"],
    usage="""from vlmeval.vlm import LLaVA_XTuner
model = LLaVA_XTuner(FOLDER, llm_path="LLM", visual_encoder_path="TOWER", prompt_template=TEMPLATE)""",
    plan=plan,
    merged=(),
)


def to_internlm2(layers: dict[str, LowRank], config: PreTrainedConfig) -> dict[str, LowRank]:
    """LoRAs of a Llama as LoRAs of the InternLM2 that it was made from."""
    result: dict[str, LowRank] = {}
    fused: dict[str, dict[str, LowRank]] = {}
    for name, layer in layers.items():
        block, _, inner = name.partition(".self_attn.")
        if f"self_attn.{inner}" in QUERY_KEY_VALUE:
            fused.setdefault(f"{block}.attention.wqkv", {})[f"self_attn.{inner}"] = layer
            continue
        llama = next(llama for llama in INTERNLM2_NAMES if name == llama or name.endswith(f".{llama}"))
        result[name.removesuffix(llama) + INTERNLM2_NAMES[llama]] = layer
    for name, found in fused.items():
        result[name] = _fuse(found, config)
    return result


def _fuse(found: dict[str, LowRank], config: PreTrainedConfig) -> LowRank:
    """One LoRA over ``wqkv`` [K·(G+2)·d, D]: the A stacked, each B in its own columns and in the rows of its heads."""
    groups, width = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups
    rank = sum(layer.rank for layer in found.values())
    scaling = next(iter(found.values())).scaling
    b = torch.zeros(groups, queries + 2, width, rank)
    first, column = 0, 0
    for name in QUERY_KEY_VALUE:
        heads = queries if name == QUERY_KEY_VALUE[0] else 1
        if layer := found.get(name):
            part = layer.b.read().float() * (layer.scaling / scaling)
            b[:, first : first + heads, :, column : column + layer.rank] = part.unflatten(0, (groups, heads, width))
            column += layer.rank
        first += heads
    a = torch.cat([found[name].a.read() for name in QUERY_KEY_VALUE if name in found])
    return LowRank.of(a, None, b.flatten(0, 2), scaling)
