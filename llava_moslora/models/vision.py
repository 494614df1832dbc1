"""Vision towers: whatever CLIP ViT the user holds becomes a ``CLIPVisionModel`` with its own picture preprocessing.

Three spellings are understood::

    FOLDER                  a transformers folder of CLIPVisionModel or CLIPModel, transformers-4 or -5 key names,
                            or a complete LLaVA with such a tower inside
    open_clip:ARCH@FILE     weights of the open_clip architecture ARCH; or @TAG, one of open_clip's pretrained tags
    open_clip:FOLDER        open_clip_config.json with open_clip_model.safetensors or open_clip_pytorch_model.bin

Names and shapes are compared with the architecture before any weight is read; the weights then go through
``from_pretrained``, where ZeRO-3 partitions them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_moslora.errors import Refusal
from llava_moslora.models import llava_folder, open_clip
from llava_moslora.models.preprocessing import read_preprocessing
from llava_moslora.models.tensors import Stored, check_tensors, held, read_json, read_tensor_folder

SUPPORTED = f"a CLIPVisionModel or CLIPModel folder, {open_clip.SUPPORTED}"
# Of a whole CLIPModel, what the vision tower does not use; position_ids was a saved buffer in early transformers 4.
NOT_VISION = re.compile(r"text_model\.|logit_scale$|(text|visual)_projection\.weight$|.*embeddings\.position_ids$")
# Kinds of towers that are asked for and refused, each with what LLaVA would compute otherwise.
REASONS = {
    "siglip": "it has no class token, which the feature selection and the processor of this package drop",
    "siglip2": "it has no class token, which the feature selection and the processor of this package drop",
    "dinov2": "its layers are scaled and named otherwise",
}


def load_vision_tower(spec: str | Path, dtype: torch.dtype = torch.float32) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """The vision tower that ``spec`` names, in ``dtype``, and its preprocessing as ``preprocessor_config.json`` has it.

    The tower is complete (last layer and post-layernorm included) and in eval mode.

    Raises:
        Refusal: as :func:`read_vision_config`; a file is missing or damaged; not exactly the tower's tensors.
    """
    spec = str(spec)
    if spec.startswith(open_clip.PREFIX):
        model_cfg, preprocess_cfg, weights = open_clip.find_source(spec)
        return from_open_clip(model_cfg, open_clip.read_visual_tensors(weights), preprocess_cfg, dtype, source=weights)
    folder, config = Path(spec), _folder_config(Path(spec))
    whole = llava_folder.is_llava_folder(folder)
    settings = read_preprocessing(llava_folder.tower_description(folder) if whole else folder, config.image_size)
    found = llava_folder.read_parts(folder).vision if whole else read_tensor_folder(folder)
    kept = {name.removeprefix("vision_model."): s for name, s in found.items() if not NOT_VISION.match(name)}
    return _build(config, kept, folder, dtype), settings


def read_vision_config(spec: str | Path) -> CLIPVisionConfig:
    """The configuration of the tower that ``spec`` names; no weight is read.

    Raises:
        Refusal: not a tower of one of the three spellings, or not a plain CLIP ViT.
    """
    spec = str(spec)
    if not spec.startswith(open_clip.PREFIX):
        return _folder_config(Path(spec))
    model_cfg, _, weights = open_clip.find_source(spec)
    return open_clip.tower_config(model_cfg, weights)


def from_open_clip(
    model_cfg: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    preprocess_cfg: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    source: Path = Path("open_clip"),
) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """An open_clip vision tower as a ``CLIPVisionModel`` in eval mode and its preprocessing.

    Args:
        model_cfg: an open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu``, …).
        tensors: open_clip's state; only ``visual.*`` is read.
        preprocess_cfg: open_clip's ``mean``, ``std``, ``interpolation``, ``resize_mode``; its defaults where absent.
        source: named in refusals.
    """
    config = open_clip.tower_config(model_cfg, source)
    settings = open_clip.preprocessing(preprocess_cfg, config.image_size, source)
    return _build(config, held(open_clip.clip_tensors(tensors, source), source), source, dtype), settings


def _folder_config(folder: Path) -> CLIPVisionConfig:
    if not folder.is_dir():
        fix = "check --vision_tower, or download the tower first: nothing is fetched at run time"
        raise Refusal("K-MISSING", "no such folder", file=folder, expected=SUPPORTED, fix=fix)
    file = folder / "config.json"
    raw = read_json(file)
    if llava_folder.is_llava(raw):
        raw = llava_folder.vision_config(folder)
    if "auto_map" in raw:
        fix = "give a tower that transformers or open_clip has itself: code in a folder is never run"
        raise Refusal("K-CODE", "the folder asks for code of its own", file=file, key="auto_map", fix=fix)
    if raw.get("quantization_config") is not None:
        fix = "give the tower in 16 or 32 bits"
        raise Refusal("K-QUANT", "a quantised tower", file=file, key="quantization_config", fix=fix)
    if (kind := raw.get("model_type")) not in ("clip", "clip_vision_model"):
        reason = REASONS.get(str(kind).removesuffix("_vision_model"))
        what = "not a CLIP vision tower" + (f": {reason}" if reason else "")
        fix = "use a CLIP ViT, such as clip-vit-large-patch14-336"
        raise Refusal("K-TOWER", what, file=file, key="model_type", found=kind, expected=SUPPORTED, fix=fix)
    own = raw.get("vision_config", {}) if kind == "clip" else raw
    try:
        return CLIPVisionConfig.from_dict({**own, "model_type": "clip_vision_model"})
    except Exception as error:  # transformers validates fields with several kinds of errors of its own
        what = "not a usable CLIP configuration"
        raise Refusal("K-CONFIG", what, file=file, found=error, fix="download it again") from error


def _build(config: CLIPVisionConfig, found: Mapping[str, Stored], source: Path, dtype: torch.dtype) -> CLIPVisionModel:
    """The tower of ``config`` with the tensors ``found``, which must be exactly its own."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in CLIPVisionModel(config).state_dict().items()}
    check_tensors(found, expected, source)
    model, info = CLIPVisionModel.from_pretrained(
        None,
        config=config,
        state_dict={name: stored.read() for name, stored in found.items()},
        dtype=dtype,
        output_loading_info=True,
    )
    model.config.name_or_path = ""  # loading from no folder leaves the word "None" there
    assert not info["missing_keys"], f"compared, yet missing: {sorted(info['missing_keys'])[:3]}"
    return model.eval()
