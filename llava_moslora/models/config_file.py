"""Strict reading of a model's ``config.json``: architecture and sizes are checked before any model is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json
from llava_moslora.files.json import LARGEST_CONFIG

Config = TypeVar("Config", bound=PreTrainedConfig)
FIX = "download it again"
# transformers' and open_clip's names → the largest value, far above any real model's
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "layers"), 512),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "image_size", "patch_size"), 4096),
    **dict.fromkeys(("hidden_size", "width", "projection_dim", "embed_dim", "head_dim", "head_width"), 1 << 17),
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
PARTS = ("text_config", "vision_config", "model_cfg", "vision_cfg", "preprocess_cfg")
TYPES: dict[str, tuple[type | UnionType, str]] = {
    **dict.fromkeys((*PARTS, "rope_scaling", "rope_parameters"), (dict | None, "an object")),
    **dict.fromkeys(("model_type", "torch_dtype", "dtype", "mm_vision_tower"), (str | None, "text")),
    "architectures": (list | None, "a list of names"),
}


def read_model_config(file: Path) -> dict[str, Any]:
    """The content of a ``config.json`` or ``open_clip_config.json``.

    Raises:
        Refusal: K-MISSING, K-JSON; K-CONFIG, a part that is not an object, a size out of :data:`SIZES`.
    """
    raw = read_json(file, largest=LARGEST_CONFIG, finite=False)  # transformers writes Infinity; sizes have ranges
    _check(raw, file)
    return raw


def make_config(kind: type[Config], values: Mapping[str, Any], file: Path) -> Config:
    """``kind.from_dict(values)``; ``values`` are from ``file``.

    Raises:
        Refusal: K-CONFIG, a value that the class refuses.
    """
    try:
        return kind.from_dict(dict(values))
    except Exception as error:  # transformers raises several exception types for invalid fields
        what, found = f"not a usable {kind.__name__}", " ".join(str(error).split())
        raise Refusal("K-CONFIG", what, file=file, found=found, fix=FIX) from error


def _check(raw: Mapping[str, Any], file: Path) -> None:
    for key, (kind, expected) in TYPES.items():
        value = raw.get(key)
        if not isinstance(value, kind) or (isinstance(value, list) and not all(isinstance(v, str) for v in value)):
            raise Refusal("K-CONFIG", "not usable", file=file, key=key, found=value, expected=expected, fix=FIX)
    for key, largest in SIZES.items():
        value = raw.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value <= largest:
            expected = f"1 to {largest}"
            raise Refusal("K-CONFIG", "out of range", file=file, key=key, found=value, expected=expected, fix=FIX)
    for part in PARTS:
        if isinstance(inner := raw.get(part), dict):
            _check(inner, file)
