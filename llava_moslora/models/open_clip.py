"""open_clip checkpoints → a ``CLIPVisionModel``'s configuration, tensors under its names, image processor settings.

A plain CLIP ViT is converted exactly: tensors are renamed and the fused attention projection is split. Models that a
``CLIPVisionModel`` cannot represent are refused with the reason.

Shapes: E vision width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig

from llava_moslora.config import OPEN_CLIP as PREFIX
from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import read_tensor_file
from llava_moslora.models.config_file import make_config, read_model_config
from llava_moslora.models.preprocessing import BICUBIC, BILINEAR, check_settings, processor_settings

SUPPORTED = f"{PREFIX}ARCH@FILE of a plain CLIP ViT, or {PREFIX}FOLDER"
FIX = "choose one of these; give a SigLIP as its transformers folder"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "open_clip_config.json"  # next to them

# Fields of open_clip's vision_cfg that may have any value; the others must have open_clip's default. patch_dropout acts
# only while open_clip trains; final_ln_after_pool changes nothing in a tower that pools its class token; the sine table
# of pos_embed_type is stored with the weights.
FREE_FIELDS = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs", "act_kwargs"),
    *("output_tokens", "patch_dropout", "final_ln_after_pool", "pos_embed_type"),
}
TOWER_NAMES = {
    "visual.class_embedding": "embeddings.class_embedding",
    "visual.positional_embedding": "embeddings.position_embedding.weight",
    "visual.conv1.weight": "embeddings.patch_embedding.weight",
    "visual.ln_pre": "pre_layrnorm",  # transformers' own spelling
    "visual.ln_post": "post_layernorm",
}
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def plain_architectures() -> list[str]:
    """The names of the open_clip architectures that a ``CLIPVisionModel`` computes exactly."""
    open_clip = _import_open_clip()
    return [name for name in open_clip.list_models() if not _objection(open_clip.get_model_config(name)["vision_cfg"])]


def _objection(vision_cfg: Mapping[str, Any]) -> str | None:
    """The reason why this is not a plain CLIP ViT, or ``None``."""
    cfg_class = _import_open_clip().CLIPVisionCfg
    if vision_cfg.get("timm_model_name"):
        return f"its tower is the timm model {vision_cfg['timm_model_name']}"
    if isinstance(vision_cfg.get("layers"), list | tuple):
        return "its tower is a ResNet"
    defaults = asdict(cfg_class())
    for field, value in vision_cfg.items():
        if field not in defaults or (field not in FREE_FIELDS and value != defaults[field]):
            return f"its vision_cfg has {field} = {value}"
    if set(vision_cfg.get("norm_kwargs") or {}) - {"eps"}:
        return f"its vision_cfg has norm_kwargs = {vision_cfg['norm_kwargs']}"
    if vision_cfg.get("act_kwargs") not in (None, {}, {"approximate": "none"}, {"approximate": "tanh"}):
        return f"its vision_cfg has act_kwargs = {vision_cfg['act_kwargs']}"
    for field in ("image_size", "patch_size"):
        if not isinstance(vision_cfg.get(field, defaults[field]), int):
            return f"its vision_cfg has {field} = {vision_cfg[field]}, not one number"
    return None


def tower_config(model_cfg: Mapping[str, Any], source: Path) -> CLIPVisionConfig:
    """The configuration of the same tower as a ``CLIPVisionModel``.

    Raises:
        Refusal: K-TOWER, not a plain CLIP ViT.
    """
    try:
        objection = _objection(model_cfg["vision_cfg"])
        values = None if objection else _config_values(model_cfg)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        fix = "download it again"
        raise Refusal("K-CONFIG", "not a usable vision_cfg", file=source, found=error, fix=fix) from error
    if values is None:
        raise Refusal("K-TOWER", f"not a plain CLIP ViT: {objection}", file=source, expected=_plain_list(), fix=FIX)
    return make_config(CLIPVisionConfig, values, source)


def _config_values(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    cfg = _import_open_clip().CLIPVisionCfg(**model_cfg["vision_cfg"])
    activation = "gelu"  # open_clip's nn.GELU is the exact, erf one
    if model_cfg.get("quick_gelu"):
        activation = "quick_gelu"
    elif (cfg.act_kwargs or {}).get("approximate") == "tanh":
        activation = "gelu_pytorch_tanh"
    return {
        "hidden_size": cfg.width,
        "intermediate_size": int(cfg.width * cfg.mlp_ratio),
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.width // cfg.head_width,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "hidden_act": activation,
        "layer_norm_eps": (cfg.norm_kwargs or {}).get("eps", 1e-5),
        "projection_dim": model_cfg["embed_dim"],
    }


def clip_tensors(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """open_clip's ``visual.*`` tensors under transformers' names, without ``visual.proj``, which is CLIP's output.

    Raises:
        Refusal: K-KEYS, no such tensors.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("visual.") and name != "visual.proj":
            state |= _renamed(name, tensor)
    if not state:
        fix = "give a checkpoint that open_clip wrote"
        raise Refusal("K-KEYS", "no visual.* tensors: not an open_clip checkpoint", file=source, fix=fix)
    return state


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One open_clip tensor under transformers' name or names. An unknown name is kept, and refused later."""
    if block := re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.(.+)", name):
        layer, inner = f"encoder.layers.{block[1]}.", block[2]
        if fused := re.fullmatch(r"attn\.in_proj_(weight|bias)", inner):  # (3E, E) or (3E): query, key, value
            thirds = tensor.chunk(3)
            if len(thirds) != 3:
                return {name: tensor}
            # Copies: views would keep the fused tensor alive and share storage when saved.
            return {f"{layer}self_attn.{p}_proj.{fused[1]}": t.clone() for p, t in zip("qkv", thirds, strict=True)}
        module, _, parameter = inner.rpartition(".")
        return {f"{layer}{BLOCK_NAMES[module]}.{parameter}" if module in BLOCK_NAMES else name: tensor}
    module, _, parameter = name.rpartition(".")
    return {TOWER_NAMES.get(name) or (f"{TOWER_NAMES[module]}.{parameter}" if module in TOWER_NAMES else name): tensor}


def preprocessing(preprocess_cfg: Mapping[str, Any], image_size: int, source: Path) -> dict[str, Any]:
    """open_clip's ``mean``, ``std``, ``interpolation``, ``resize_mode`` (its defaults where absent) as CLIP's settings.

    Raises:
        Refusal: K-PROCESSOR, a resize mode that CLIP's preprocessing does not support, or invalid numbers.
    """
    constants = _import_open_clip().constants
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    interpolation = preprocess_cfg.get("interpolation") or "bicubic"
    resample = BILINEAR if interpolation == "bilinear" else BICUBIC  # open_clip's "random" means bicubic at inference
    mean = preprocess_cfg.get("mean") or constants.OPENAI_DATASET_MEAN
    std = preprocess_cfg.get("std") or constants.OPENAI_DATASET_STD
    mean, std = (list(v) if isinstance(v, list | tuple) else [v] * 3 for v in (mean, std))
    square = {"height": image_size, "width": image_size}
    if mode not in ("shortest", "squash"):
        what = "CLIP's preprocessing does not support this resize mode"
        raise Refusal("K-PROCESSOR", what, file=source, key="resize_mode", found=mode, expected="shortest or squash")
    size, crop = (square, None) if mode == "squash" else ({"shortest_edge": image_size}, square)
    settings = processor_settings(size=size, crop=crop, mean=mean, std=std, resample=resample)
    check_settings(settings, source)
    return settings


def find_source(spec: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """(model configuration, preprocessing configuration, weights file) for ``open_clip:…``.

    Raises:
        Refusal: no such architecture, tag, file or folder; not a plain CLIP ViT; open_clip is not installed.
    """
    open_clip = _import_open_clip()
    arch, at, where = spec.removeprefix(PREFIX).partition("@")
    if not at:
        return _open_clip_folder(Path(arch))
    if arch not in open_clip.list_models():
        what = "no open_clip architecture has this name"
        raise Refusal("C-TOWER", what, key=spec, found=arch, expected=_plain_list())
    model_cfg = open_clip.get_model_config(arch)
    if (objection := _objection(model_cfg["vision_cfg"])) is not None:
        what = f"{arch} is not a plain CLIP ViT: {objection}"
        raise Refusal("C-TOWER", what, key=spec, expected=_plain_list(), fix=FIX)
    if (weights := Path(where)).is_file():
        # A file from the model hub has its published configuration next to it, with the mean and std
        # of its training, which differ between checkpoints of one architecture.
        published = weights.with_name(CONFIG)
        return (
            model_cfg,
            (read_model_config(published).get("preprocess_cfg") or {}) if published.is_file() else {},
            weights,
        )
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if where not in tags:
        what = "not a file and not one of the architecture's pretrained tags"
        raise Refusal("K-MISSING", what, file=weights, expected=f"a file, or {', '.join(tags) or 'no tag'}")
    tag_cfg = open_clip.get_pretrained_cfg(arch, where)
    if tag_cfg.get("quick_gelu") and not model_cfg.get("quick_gelu"):
        what, fix = "these weights were trained with quick GELU", f"--vision_tower {PREFIX}{arch}-quickgelu@{where}"
        raise Refusal("C-TOWER", what, key=spec, found=arch, expected=f"{arch}-quickgelu", fix=fix)
    return model_cfg, tag_cfg, Path(open_clip.download_pretrained(tag_cfg))


def described_in(weights: Path) -> Path:
    """The file that an error in the configuration of ``weights`` names: the one published with them, if it is there."""
    published = weights.with_name(CONFIG)
    return published if published.is_file() else weights


def _open_clip_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    if not folder.is_dir():
        what = "neither ARCH@FILE nor a folder"
        raise Refusal("K-MISSING", what, file=f"{PREFIX}{folder}", expected=SUPPORTED)
    file = folder / CONFIG
    config = read_model_config(file)
    model_cfg = config.get("model_cfg")
    if not (isinstance(model_cfg, dict) and isinstance(model_cfg.get("vision_cfg"), dict) and "embed_dim" in model_cfg):
        raise Refusal("K-CONFIG", "not an open_clip configuration", file=file, key="model_cfg", found=model_cfg)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise Refusal("K-MISSING", "no weights in the folder", file=folder, expected=" or ".join(WEIGHTS))
    return model_cfg, config.get("preprocess_cfg") or {}, weights


def read_visual_tensors(file: Path) -> dict[str, Tensor]:
    """The ``visual.*`` tensors of an open_clip checkpoint: safetensors, or torch without pickled code."""
    tensors = {name.removeprefix("module."): stored for name, stored in read_tensor_file(file).items()}
    return {name: stored.read() for name, stored in tensors.items() if name.startswith("visual.")}


def _plain_list() -> str:
    return f"one of {', '.join(plain_architectures())}"


def _import_open_clip():
    try:
        import open_clip
    except ImportError as error:
        raise Refusal("E-PACKAGE", "open_clip is not installed", fix="pip install 'llava_moslora[clip]'") from error
    return open_clip
