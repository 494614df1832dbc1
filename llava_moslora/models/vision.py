"""Vision towers: a CLIP or SigLIP ViT → transformers' model of it and its image processor settings.

``--vision_tower`` has three forms::

    FOLDER                  a transformers folder of CLIPVisionModel, CLIPModel, SiglipVisionModel or SiglipModel, with
                            the tensor names of transformers 4 or 5, or a complete LLaVA with such a tower inside
    open_clip:ARCH@FILE     weights of the open_clip CLIP ViT ARCH; or @TAG, one of open_clip's pretrained tags
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
from transformers import PreTrainedConfig, PreTrainedModel

from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import LazyTensor, check_tensors, in_memory, read_tensor_folder
from llava_moslora.models import llava_folder, open_clip
from llava_moslora.models.config_file import make_config, read_model_config
from llava_moslora.models.preprocessing import read_preprocessing
from llava_moslora.models.towers import KINDS, kind_name, kind_of

FOLDERS = ", ".join(kind.model.__name__ for kind in KINDS.values())
SUPPORTED = f"a folder of {FOLDERS} or the complete model around it, {open_clip.SUPPORTED}"
# Tensors of a complete CLIPModel or SiglipModel that the vision tower does not use; position_ids was a saved buffer in
# early transformers 4.
NOT_VISION = re.compile(
    r"text_model\.|logit_(scale|bias)$|(text|visual)_projection\.weight$|.*embeddings\.position_ids$"
)
# Kinds of towers that are refused with a specific reason.
REASONS = {
    "siglip2": "NaFlex, whose images have any number of patches, where LLaVA gives every image the same; SigLIP 2 "
    "of a fixed size, such as siglip2-so400m-patch14-384, has the model_type siglip and works",
    "dinov2": "its layers are scaled, and named differently",
}


def load_vision_tower(spec: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The complete vision tower ``spec`` in ``dtype`` and eval mode, and its settings of ``preprocessor_config.json``.

    Raises:
        Refusal: as :func:`read_vision_config`; a file is missing or damaged; not exactly the tower's tensors.
    """
    settings = read_image_settings(spec)  # refused before a weight is read
    config = read_vision_config(spec)
    return _load(config, read_vision_tensors(spec, config), dtype), settings


def read_vision_tensors(spec: str | Path, config: PreTrainedConfig) -> dict[str, LazyTensor]:
    """The tensors of the tower ``spec``, not read yet, under the names and in the order of its class.

    Args:
        config: :func:`read_vision_config` of the same tower.

    Raises:
        Refusal: a file is missing or damaged; K-KEYS, K-SHAPE, not exactly the tensors of the architecture.
    """
    spec = str(spec)
    if spec.startswith(open_clip.PREFIX):
        _, _, source = open_clip.find_source(spec)
        found = in_memory(open_clip.clip_tensors(open_clip.read_visual_tensors(source), source), source)
        return _checked(config, found, source)
    folder = Path(spec)
    whole = llava_folder.is_llava_folder(folder)
    found = llava_folder.read_tensors(folder).vision if whole else read_tensor_folder(folder)
    kept = {name.removeprefix("vision_model."): t for name, t in found.items() if not NOT_VISION.match(name)}
    return _checked(config, kept, folder)


def read_image_settings(spec: str | Path) -> dict[str, Any]:
    """The image processor settings of the tower ``spec``; no weight is read.

    Raises:
        Refusal: as :func:`read_vision_config`; settings are missing, or training would not follow them.
    """
    spec = str(spec)
    if spec.startswith(open_clip.PREFIX):
        model_cfg, preprocess_cfg, weights = open_clip.find_source(spec)
        described = open_clip.described_in(weights)
        size = open_clip.tower_config(model_cfg, described).image_size
        return open_clip.preprocessing(preprocess_cfg, size, described)
    folder, config = Path(spec), _folder_config(Path(spec))
    whole = llava_folder.is_llava_folder(folder)
    return read_preprocessing(llava_folder.tower_description(folder) if whole else folder, config.image_size)


def read_vision_config(spec: str | Path) -> PreTrainedConfig:
    """The configuration of the tower ``spec``; no weight is read.

    Raises:
        Refusal: K-MISSING, K-TOWER, K-CONFIG, K-CODE, K-QUANT, C-TOWER: not a tower in one of the three forms, or of a
            kind that is not supported.
    """
    spec = str(spec)
    if not spec.startswith(open_clip.PREFIX):
        return _folder_config(Path(spec))
    model_cfg, _, weights = open_clip.find_source(spec)
    return open_clip.tower_config(model_cfg, open_clip.described_in(weights))


def from_open_clip(
    model_cfg: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    preprocess_cfg: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    source: Path = Path("open_clip"),
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """An open_clip vision tower as a ``CLIPVisionModel`` in eval mode, and its image processor settings.

    Args:
        model_cfg: an open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu``, …).
        tensors: open_clip's state dict; only ``visual.*`` is read.
        preprocess_cfg: open_clip's ``mean``, ``std``, ``interpolation``, ``resize_mode``; its defaults where absent.
        source: the file that error messages name.
    """
    config = open_clip.tower_config(model_cfg, source)
    settings = open_clip.preprocessing(preprocess_cfg, config.image_size, source)
    found = _checked(config, in_memory(open_clip.clip_tensors(tensors, source), source), source)
    return _load(config, found, dtype), settings


def _folder_config(folder: Path) -> PreTrainedConfig:
    if not folder.is_dir():
        fix = "check --vision_tower, or download the tower first: nothing is fetched at run time"
        raise Refusal("K-MISSING", "no such folder", file=folder, expected=SUPPORTED, fix=fix)
    file = folder / "config.json"
    raw = read_model_config(file)
    if llava_folder.is_llava(raw):
        raw = llava_folder.vision_config(folder)
    if "auto_map" in raw:
        fix = "give a tower that transformers or open_clip has itself: code in a folder is never run"
        raise Refusal("K-CODE", "the folder needs custom code", file=file, key="auto_map", fix=fix)
    if raw.get("quantization_config") is not None:
        fix = "give the tower in 16 or 32 bits"
        raise Refusal("K-QUANT", "a quantised tower", file=file, key="quantization_config", fix=fix)
    name = kind_name(model_type := raw.get("model_type"))
    if (kind := KINDS.get(name)) is None:
        what = "not a CLIP or SigLIP vision tower" + (f": {REASONS[name]}" if name in REASONS else "")
        fix = "use one such as clip-vit-large-patch14-336 or siglip-so400m-patch14-384"
        raise Refusal("K-TOWER", what, file=file, key="model_type", found=model_type, expected=SUPPORTED, fix=fix)
    own = raw.get("vision_config") or {} if model_type == name else raw
    config = make_config(kind.config, {**own, "model_type": kind.config.model_type}, file)
    for key in ("image_size", "patch_size"):  # both classes also accept pairs, but use one number
        if type(side := getattr(config, key)) is not int or side < 1:
            raise Refusal(
                "K-CONFIG", "not a single side length", file=file, key=key, found=side, expected="a whole number",
                fix="use a tower for square images",
            )  # fmt: skip
    return config


def _checked(config: PreTrainedConfig, found: Mapping[str, LazyTensor], source: Path) -> dict[str, LazyTensor]:
    """``found`` in the order of the tower's class; its names and shapes must be exactly the class's."""
    tower_class = kind_of(config).model
    try:
        with torch.device("meta"):
            expected = {name: tuple(t.shape) for name, t in tower_class(config).state_dict().items()}
    except Exception as error:  # such as heads that do not divide the width, or an unknown activation
        what = f"no {tower_class.__name__} can be built from this configuration"
        raise Refusal("K-CONFIG", what, file=source, found=error, fix="download it again") from error
    check_tensors(found, expected, source)
    return {name: found[name] for name in expected}


def _load(config: PreTrainedConfig, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> PreTrainedModel:
    model, info = kind_of(config).model.from_pretrained(
        None,
        config=config,
        state_dict={name: tensor.read() for name, tensor in tensors.items()},
        dtype=dtype,
        output_loading_info=True,
    )
    model.config.name_or_path = ""  # loading from no folder leaves the word "None" there
    assert not info["missing_keys"], f"compared, yet missing: {sorted(info['missing_keys'])[:3]}"
    return model.eval()
