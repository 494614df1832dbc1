"""The alphas in a LoRA file of diffusers; its tensor names are read like every other adapter's (load.py).

Such a file contains layers of a UNet and of text encoders, under their names in a pipeline:
``unet.….to_q.lora_A.weight``, or with older key names ``unet.….to_q.lora.down.weight``. The MoSLoRA authors' files name
the mixer ``unet.….to_q.lora.downB.weight``: diffusers' renaming finds ``lora_A`` in their ``lora_AB``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from llava_moslora.errors import Refusal, few
from llava_moslora.files.tensors import LazyTensor

PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.")
METADATA = "lora_adapter_metadata"  # in the file's header: JSON, ``unet.lora_alpha`` …
# The end of a tensor's name in such a file → A, B or W of the adapter
NAMES = {
    "lora.down.weight": "A", "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A", "lora_linear_layer.up.weight": "B",
}  # fmt: skip
MIXER_NAMES = {"lora.downB.weight": "W"}
NO_MEANING = ("use_dora", "use_rslora", "lora_bias")


def is_diffusers_file(layers: Iterable[str]) -> bool:
    """Whether these names of adapted layers are those of a pipeline's parts."""
    names = list(layers)
    return bool(names) and all(name.startswith(PREFIXES) for name in names)


def read_alphas(
    path: Path, layers: Mapping[str, Mapping[str, LazyTensor]], others: dict[str, LazyTensor]
) -> dict[str, float]:
    """Layer → its ``lora_alpha``: from the file's header, or its ``….alpha`` tensors, which are removed from
    ``others``, or, as in diffusers without either, the rank (a scaling of 1).

    Raises:
        Refusal: K-ADAPTER, settings that change the update otherwise; layers with a mixer next to layers without.
    """
    without = [name for name, tensors in layers.items() if "W" not in tensors]
    if without and len(without) < len(layers):
        expected = few([f"{name}.lora.downB.weight" for name in without])
        raise Refusal("K-ADAPTER", f"{len(without)} missing mixers", file=path, expected=expected)
    stored = _metadata(path)
    alphas = {}
    for name, tensors in layers.items():
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        if foreign := [key for key in NO_MEANING if stored.get(prefix + key)]:
            what = "a setting that changes what the adapter computes"
            raise Refusal("K-ADAPTER", what, file=path, key=prefix + foreign[0], fix="merge it with diffusers")
        alpha = float(next(iter(tensors["A"].shape), 0)) if "A" in tensors else 0.0
        if f"{prefix}lora_alpha" in stored:
            patterns = stored.get(f"{prefix}alpha_pattern") or {}
            alpha = patterns.get(get_pattern_key(patterns.keys(), name), stored[f"{prefix}lora_alpha"])
        if (tensor := others.pop(f"{name}.alpha", None)) is not None:
            alpha = float(tensor.read())
        alphas[name] = alpha
    return alphas


def _metadata(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            return found if isinstance(found, dict) else {}
    except (SafetensorError, ValueError):  # a torch file has no header
        return {}
