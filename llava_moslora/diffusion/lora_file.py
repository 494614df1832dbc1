"""``pytorch_lora_weights.safetensors``: adapters for diffusers, ComfyUI and others, and kohya's key names.

diffusers' own ``save_lora_weights`` writes the mixer too, which its loader drops with only a log line, and omits
alpha, for which its loader uses the rank. So here W is folded into A, alpha / rank multiplied into B, and alpha is
the rank: every reader computes ΔW = B·A, whether it supports alphas or not. float32: the rank is small.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from llava_moslora.adapters.diffusers_file import METADATA, PREFIXES
from llava_moslora.adapters.fold import Adapter, LowRank, fold_layers
from llava_moslora.errors import Refusal

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya.safetensors"
# transformers 5.6 removed this level from the first text encoder's names; LoRA files have it.
TEXT_LEVEL = "text_model."


def write_lora(adapter: Adapter, folder: Path, *, kohya: bool = False) -> None:
    """Write ``adapter`` into ``folder`` for diffusers, and with ``kohya`` also in kohya's spelling.

    Raises:
        Refusal: K-ADAPTER, an adapter that is not a LoRA, or layers outside a pipeline's parts.
    """
    layers = fold_layers(adapter.layers)
    if foreign := [name for name in layers if not name.startswith(PREFIXES)]:
        expected = " | ".join(PREFIXES)
        raise Refusal("K-ADAPTER", "not a layer of a pipeline's part", key=foreign[0], expected=expected)
    tensors = lora_tensors(layers)
    metadata = {"format": "pt", METADATA: json.dumps(lora_metadata(layers), indent=2, sort_keys=True)}
    save_file(tensors, folder / LORA_FILE, metadata=metadata)
    if kohya:
        from diffusers.utils import convert_state_dict_to_kohya

        renamed = convert_state_dict_to_kohya(of_one_rank(tensors))
        save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, folder / KOHYA_FILE)


def lora_tensors(layers: dict[str, LowRank]) -> dict[str, Tensor]:
    """Names in the file → A float32[r, in] and s·B float32[out, r]; A has W in it already."""
    tensors = {}
    for name, layer in layers.items():
        stored = stored_name(name)
        tensors[f"{stored}.lora_A.weight"] = layer.a.read().float().contiguous()
        tensors[f"{stored}.lora_B.weight"] = (layer.b.read().float() * layer.scaling).contiguous()
    return tensors


def of_one_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same updates, zero-padded to the largest rank. A kohya file has an alpha for every layer, and diffusers
    0.42 ignores those that differ from the most frequent one."""
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    padded = {}
    for name, tensor in tensors.items():
        more = rank - tensor.shape[0 if ".lora_A." in name else 1]
        padded[name] = F.pad(tensor, (0, 0, 0, more) if ".lora_A." in name else (0, more))
    return padded


def lora_metadata(layers: dict[str, LowRank]) -> dict[str, object]:
    """A plain LoRA's settings for each part, as ``peft.LoraConfig`` takes them, in names ``PART.SETTING``."""
    metadata: dict[str, object] = {}
    for prefix in PREFIXES:
        own = {name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)}
        if not own:
            continue
        rank = Counter(layer.rank for layer in own.values()).most_common(1)[0][0]
        others = {name.removeprefix(TEXT_LEVEL): layer.rank for name, layer in own.items() if layer.rank != rank}
        settings = {
            "peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": sorted(name.removeprefix(TEXT_LEVEL) for name in own), "lora_dropout": 0.0,
            "bias": "none",
        }  # fmt: skip
        metadata |= {prefix + key: value for key, value in settings.items()}
    return metadata


def stored_name(name: str) -> str:
    """``text_encoder.encoder.…`` → ``text_encoder.text_model.encoder.…``; others as they are."""
    part, _, rest = name.partition(".")
    if part != "unet" and not rest.startswith(TEXT_LEVEL):
        return f"{part}.{TEXT_LEVEL}{rest}"
    return name
