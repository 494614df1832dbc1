"""``xtuner`` and ``xtuner_adapters``: the folders that VLMEvalKit's ``LLaVA_XTuner`` and ``xtuner chat`` take apart.

======================  ==============================================  ===========================================
target                  folders                                         VLMEvalKit's arguments besides the folder
======================  ==============================================  ===========================================
``xtuner``              ``llm/ visual_encoder/ projector/``, merged     ``llm_path=None, visual_encoder_path=None``
``xtuner_adapters``     ``llm_adapter/ visual_encoder_adapter/          both paths: the original LLM's and tower's
                        projector/``, plain LoRAs
======================  ==============================================  ===========================================

XTuner runs on transformers 4: names are that version's. Over an InternLM2 the adapters carry InternLM2's own names, for
its own code: the LoRAs of query, key and value become one of the sum of their ranks over the fused ``wqkv``, exactly.

Shapes: d width of a head, K key/value heads, G query heads per key/value head, r rank.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.adapters.fold import LowRank
from llava_moslora.errors import Refusal
from llava_moslora.export import peft_format
from llava_moslora.export.target import Layout, check_clip
from llava_moslora.export.targets import components
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.files.json import read_json
from llava_moslora.models.internlm2 import LAYER_NAMES, MODEL_TYPE, NAMES
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP

THEIRS = {ours: theirs for theirs, ours in (NAMES | LAYER_NAMES).items()}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def merged(trained: TrainedRun, dtype: torch.dtype) -> Layout:
    """
    Raises:
        Refusal: C-FORMAT, not a CLIP tower.
    """
    check_clip(trained, "xtuner")

    def finish(folder: Path) -> None:
        components.write_llm(trained, folder / "llm", dtype)
        components.write_vision(trained, folder / "visual_encoder", dtype)
        components.write_projector(trained, folder / "projector")

    return Layout(
        weights=[
            components.llm_weights(trained, dtype, "llm"),
            components.vision_weights(trained, dtype, "visual_encoder"),
            components.projector_weights(trained, "projector"),
        ],
        finish=finish,
        reopen={"llm": "llm", "vision": "visual_encoder", "projector": "projector"},
        merged=True,
        rounded=("llm", "vision"),
    )


def adapters(trained: TrainedRun, _: torch.dtype) -> Layout:
    """
    Raises:
        Refusal: C-FORMAT, a tower that has no folder of its own, or is no CLIP.
    """
    check_clip(trained, "xtuner_adapters")
    if trained.vision_spec.startswith(OPEN_CLIP):
        raise Refusal(
            "C-FORMAT", "adapters lie over a tower's folder", key="--format xtuner_adapters", found=trained.vision_spec,
            fix="--format xtuner, which holds the tower",
        )  # fmt: skip
    layers = trained.updates_of_original("llm", "lm_head")
    tower = {f"vision_model.{name}": layer for name, layer in trained.updates_of_original("vision_tower").items()}
    native = read_json(trained.llm_folder / "config.json").get("model_type") == MODEL_TYPE
    if native:
        layers = to_internlm2(layers, trained.llm_config)
    weights = [components.projector_weights(trained, "projector")]
    reopen = {"llm": str(trained.llm_folder.resolve()), "vision": str(Path(trained.vision_spec).resolve())}
    configs = {}
    for folder, of, base, depth, task in (
        ("llm_adapter", layers, "llm", trained.llm_config.num_hidden_layers, "CAUSAL_LM"),
        ("visual_encoder_adapter", tower, "vision", trained.vision_config.num_hidden_layers, None),
    ):
        if of:
            weights.append(peft_format.adapter_weights(of, folder))
            configs[folder] = peft_format.adapter_config(of, reopen[base], depth=depth, task=task)
            reopen[f"{base}_adapter"] = folder

    def finish(folder: Path) -> None:
        for name, config in configs.items():
            peft_format.save_config(config, folder / name)
        components.write_projector(trained, folder / "projector")

    reopen["projector"] = "projector"
    unproven = "not possible: the adapters lie over InternLM2's own code, which is never run here" if native else None
    return Layout(weights, finish, reopen, merged=False, unproven=unproven)


def to_internlm2(layers: dict[str, LowRank], config) -> dict[str, LowRank]:
    """LoRAs of a Llama as LoRAs of the InternLM2 that it was made from."""
    result: dict[str, LowRank] = {}
    fused: dict[str, dict[str, LowRank]] = {}
    for name, layer in layers.items():
        block, _, inner = name.partition(".self_attn.")
        if f"self_attn.{inner}" in QKV:
            fused.setdefault(f"{block}.attention.wqkv", {})[f"self_attn.{inner}"] = layer
            continue
        ours = next(ours for ours in THEIRS if name == ours or name.endswith(f".{ours}"))
        result[name[: -len(ours)] + THEIRS[ours]] = layer
    for name, found in fused.items():
        result[name] = _fuse(found, config)
    return result


def _fuse(found: dict[str, LowRank], config) -> LowRank:
    """One LoRA over ``wqkv`` [K·(G+2)·d, D]: the A stacked, each B in its own columns and in the rows of its heads."""
    groups, width = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups
    rank = sum(layer.rank for layer in found.values())
    scaling = next(iter(found.values())).scaling
    b = torch.zeros(groups, queries + 2, width, rank)
    first, column = 0, 0
    for name in QKV:
        heads = queries if name == QKV[0] else 1
        if layer := found.get(name):
            part = layer.b.float() * (layer.scaling / scaling)
            b[:, first : first + heads, :, column : column + layer.rank] = part.unflatten(0, (groups, heads, width))
            column += layer.rank
        first += heads
    a = torch.cat([found[name].a for name in QKV if name in found])
    return LowRank(a, None, b.flatten(0, 2), scaling)
