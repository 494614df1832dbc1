"""Vision towers: whatever CLIP ViT the user holds becomes a ``CLIPVisionModel`` with its own picture preprocessing.

Three spellings are understood::

    FOLDER                  a transformers folder of CLIPVisionModel or CLIPModel, transformers-4 or -5 key names
    open_clip:ARCH@FILE     weights of the open_clip architecture ARCH; or @TAG, one of open_clip's pretrained tags
    open_clip:FOLDER        open_clip_config.json with open_clip_model.safetensors or open_clip_pytorch_model.bin

An open_clip tower is converted exactly: tensors are renamed and the fused attention projection is split, nothing is
resampled or rounded. What a ``CLIPVisionModel`` cannot compute is refused. Names and shapes are compared with the
architecture before any weight is read; the weights then go through ``from_pretrained``, where ZeRO-3 partitions them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_moslora.errors import Refusal

PREFIX = "open_clip:"
SUPPORTED = "a CLIPVisionModel or CLIPModel folder, open_clip:ARCH@FILE of a plain CLIP ViT, or open_clip:FOLDER"
BICUBIC, BILINEAR = 3, 2  # Pillow's numbers, as preprocessor_config.json writes them

FOLDER_WEIGHTS = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Of a whole CLIPModel, what the vision tower does not use; position_ids was a saved buffer in early transformers 4.
NOT_VISION = re.compile(r"text_model\.|logit_scale$|(text|visual)_projection\.weight$|.*embeddings\.position_ids$")

# open_clip's vision_cfg fields that a CLIPVisionModel can follow; any other field must have open_clip's default.
# patch_dropout acts only while open_clip trains; final_ln_after_pool is the same thing for a tower that pools its
# class token; the sine table of pos_embed_type is stored with the weights.
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


def load_vision_tower(spec: str | Path, dtype: torch.dtype = torch.float32) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """The vision tower that ``spec`` names, in ``dtype``, and its preprocessing as ``preprocessor_config.json`` has it.

    The tower is complete (last layer and post-layernorm included) and in eval mode.
    """
    spec = str(spec)
    if not spec.startswith(PREFIX):
        return _load_folder(Path(spec), dtype)
    model_cfg, preprocess_cfg, weights = _open_clip_source(spec)
    return from_open_clip(model_cfg, read_visual_tensors(weights), preprocess_cfg, dtype, source=weights)


def read_vision_config(spec: str | Path) -> CLIPVisionConfig:
    """The configuration of the tower that ``spec`` names; no weight is read.

    Raises:
        Refusal: not a tower of one of the three spellings, or not a plain CLIP ViT.
    """
    spec = str(spec)
    if not spec.startswith(PREFIX):
        return _folder_config(Path(spec))
    model_cfg, _, weights = _open_clip_source(spec)
    return _open_clip_config(model_cfg, weights)


# --- transformers folders ---


def _folder_config(folder: Path) -> CLIPVisionConfig:
    if not folder.is_dir():
        raise Refusal("K-MISSING", "no such folder", file=folder, expected=SUPPORTED)
    raw = _read_json(folder / "config.json")
    if "auto_map" in raw:
        raise Refusal("K-CODE", "the folder asks for code of its own", file=folder / "config.json", key="auto_map")
    if "quantization_config" in raw:
        fix = "give the tower in 16 or 32 bits"
        raise Refusal("K-QUANT", "a quantised tower", file=folder / "config.json", key="quantization_config", fix=fix)
    if (kind := raw.get("model_type")) not in ("clip", "clip_vision_model"):
        where = {"file": folder / "config.json", "key": "model_type"}
        raise Refusal("K-TOWER", "not a CLIP vision tower", **where, found=kind, expected=SUPPORTED)
    try:
        return CLIPVisionConfig.from_pretrained(folder)
    except Exception as error:  # transformers validates fields with several kinds of errors of its own
        what = "not a usable CLIP configuration"
        raise Refusal("K-CONFIG", what, file=folder / "config.json", found=error) from error


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[CLIPVisionModel, dict[str, Any]]:
    config = _folder_config(folder)
    processor = _folder_processor(folder, config.image_size)

    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in _weight_files(folder):
        found |= {
            name.removeprefix("vision_model."): (file, shape)
            for name, shape in _shapes(file).items()
            if not NOT_VISION.match(name)
        }
    _compare(found, config, folder)
    model, info = CLIPVisionModel.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], f"compared, yet missing: {sorted(info['missing_keys'])[:3]}"
    return model.eval(), processor


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights; every one of them exists."""
    entry = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if entry is None:
        raise Refusal("K-MISSING", "no weights in the folder", file=folder, expected=" or ".join(FOLDER_WEIGHTS))
    if entry.suffix != ".json":
        return [entry]
    weight_map = _read_json(entry).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise Refusal("K-JSON", "not an index of weight files", file=entry, key="weight_map", found=weight_map)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise Refusal("K-MISSING", "a file of the index is not there", file=folder / name, fix="download it again")
    return [folder / name for name in names]


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes in a safetensors or torch file; the tensors themselves are not kept."""
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in _torch_load(file, "meta").items()}
    with _open_safetensors(file) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _compare(found: Mapping[str, tuple[Path, tuple[int, ...]]], config: CLIPVisionConfig, source: Path) -> None:
    """Refuse unless ``found``, {name: (file, shape)}, is exactly what a ``CLIPVisionModel`` of ``config`` holds."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in CLIPVisionModel(config).state_dict().items()}
    if missing := sorted(expected.keys() - found.keys()):
        what = f"{len(missing)} of the tower's {len(expected)} tensors are missing"
        raise Refusal("K-KEYS", what, file=source, key=missing[0], expected=list(expected[missing[0]]))
    if surplus := sorted(found.keys() - expected.keys()):
        what = f"{len(surplus)} tensors do not belong to this architecture"
        raise Refusal("K-KEYS", what, file=found[surplus[0]][0], key=surplus[0], found=list(found[surplus[0]][1]))
    for name, shape in expected.items():
        file, given = found[name]
        if given != shape:
            raise Refusal("K-SHAPE", "wrong shape", file=file, key=name, found=list(given), expected=list(shape))


def _folder_processor(folder: Path, image_size: int) -> dict[str, Any]:
    """The folder's preprocessing in full and in today's spelling; it must yield pictures of the tower's size."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        raw = _read_json(file)
    elif (folder / "processor_config.json").is_file():  # where transformers 5 puts it for a CLIPModel
        file = folder / "processor_config.json"
        raw = _read_json(file).get("image_processor") or {}
    else:
        fix = "copy the file from where the tower came from; mean, std and size are not guessed"
        raise Refusal("K-MISSING", "the tower's preprocessing is not there", file=file, fix=fix)
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type", "CLIPImageProcessor"))
    if kind not in ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"):
        where = {"file": file, "key": "image_processor_type"}
        raise Refusal("K-PROCESSOR", "not CLIP's preprocessing", **where, found=kind, expected="CLIPImageProcessor")
    for key in ("image_mean", "image_std"):
        values = raw.get(key)
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
            raise Refusal("K-PROCESSOR", "not usable", file=file, key=key, found=values, expected="three numbers")
    size, crop = raw.get("size", 224), raw.get("crop_size", 224)
    processor = _processor(
        size={"shortest_edge": size} if isinstance(size, int) else size,
        crop={"height": crop, "width": crop} if isinstance(crop, int) else crop,
        mean=raw["image_mean"],
        std=raw["image_std"],
        resample=raw.get("resample", BICUBIC),
    )
    processor |= {key: raw[key] for key in processor if key.startswith(("do_", "rescale")) and raw.get(key) is not None}
    result = processor["crop_size"] if processor["do_center_crop"] else processor["size"]
    if (result.get("height"), result.get("width")) != (image_size, image_size):
        key = "crop_size" if processor["do_center_crop"] else "size"
        what = "the pictures would not have the tower's size"
        raise Refusal("K-PROCESSOR", what, file=file, key=key, found=result, expected=f"{image_size}×{image_size}")
    return processor


def _processor(size: dict, crop: dict | None, mean: list, std: list, resample: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": resample,
        "do_center_crop": crop is not None,
        **({} if crop is None else {"crop_size": crop}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


# --- open_clip ---


def from_open_clip(
    model_cfg: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    preprocess_cfg: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    source: Path = Path("open_clip"),
) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """An open_clip vision tower as a ``CLIPVisionModel`` in eval mode and its preprocessing.

    Args:
        model_cfg: an open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu``, …).
        tensors: open_clip's state; only ``visual.*`` is read. ``visual.proj`` is CLIP's output projection and unused.
        preprocess_cfg: open_clip's ``mean``, ``std``, ``interpolation``, ``resize_mode``; its defaults where absent.
        source: named in refusals.
    """
    config = _open_clip_config(model_cfg, source)
    processor = _open_clip_processor(preprocess_cfg, config.image_size, source)
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("visual.") and name != "visual.proj":
            state |= _renamed(name, tensor)
    if not state:
        raise Refusal("K-KEYS", "no visual.* tensors: not an open_clip checkpoint", file=source)
    _compare({name: (source, tuple(tensor.shape)) for name, tensor in state.items()}, config, source)
    model, info = CLIPVisionModel.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    model.config.name_or_path = ""  # loading from no folder leaves the word "None" there
    assert not info["missing_keys"], f"compared, yet missing: {sorted(info['missing_keys'])[:3]}"
    return model.eval(), processor


def plain_architectures() -> list[str]:
    """The names of the open_clip architectures that a ``CLIPVisionModel`` computes exactly."""
    open_clip = _import_open_clip()
    return [name for name in open_clip.list_models() if not _objection(open_clip.get_model_config(name)["vision_cfg"])]


def _objection(vision_cfg: Mapping[str, Any]) -> str | None:
    """Why this is not a plain CLIP ViT, or ``None``."""
    from dataclasses import asdict

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


def _open_clip_config(model_cfg: Mapping[str, Any], source: Path) -> CLIPVisionConfig:
    if (objection := _objection(model_cfg["vision_cfg"])) is not None:
        raise Refusal("K-TOWER", f"not a plain CLIP ViT: {objection}", file=source, expected=_plain_list())
    cfg = _import_open_clip().CLIPVisionCfg(**model_cfg["vision_cfg"])
    activation = "gelu"  # open_clip's nn.GELU is the exact, erf one
    if model_cfg.get("quick_gelu"):
        activation = "quick_gelu"
    elif (cfg.act_kwargs or {}).get("approximate") == "tanh":
        activation = "gelu_pytorch_tanh"
    return CLIPVisionConfig(
        hidden_size=cfg.width,
        intermediate_size=int(cfg.width * cfg.mlp_ratio),
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.width // cfg.head_width,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_act=activation,
        layer_norm_eps=(cfg.norm_kwargs or {}).get("eps", 1e-5),
        projection_dim=model_cfg["embed_dim"],
    )


def _renamed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """transformers' name or names for one open_clip tensor. An unknown name is kept, and then refused by its name."""
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


def _open_clip_processor(preprocess_cfg: Mapping[str, Any], image_size: int, source: Path) -> dict[str, Any]:
    constants = _import_open_clip().constants
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    interpolation = preprocess_cfg.get("interpolation") or "bicubic"
    resample = BILINEAR if interpolation == "bilinear" else BICUBIC  # open_clip's "random" means bicubic at inference
    mean = preprocess_cfg.get("mean") or constants.OPENAI_DATASET_MEAN
    std = preprocess_cfg.get("std") or constants.OPENAI_DATASET_STD
    mean, std = (list(v) if isinstance(v, list | tuple) else [v] * 3 for v in (mean, std))
    square = {"height": image_size, "width": image_size}
    if mode == "squash":
        return _processor(size=square, crop=None, mean=mean, std=std, resample=resample)
    if mode != "shortest":
        what = "this way of resizing pictures cannot be written as CLIP's preprocessing"
        raise Refusal("K-PROCESSOR", what, file=source, key="resize_mode", found=mode, expected="shortest or squash")
    return _processor(size={"shortest_edge": image_size}, crop=square, mean=mean, std=std, resample=resample)


def _open_clip_source(spec: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """(model configuration, preprocessing configuration, weights file) for ``open_clip:…``."""
    open_clip = _import_open_clip()
    arch, at, where = spec.removeprefix(PREFIX).partition("@")
    if not at:
        return _open_clip_folder(Path(arch))
    if arch not in open_clip.list_models():
        what = "no open_clip architecture has this name"
        raise Refusal("C-TOWER", what, key=spec, found=arch, expected=_plain_list())
    model_cfg = open_clip.get_model_config(arch)
    if (objection := _objection(model_cfg["vision_cfg"])) is not None:
        raise Refusal("C-TOWER", f"{arch} is not a plain CLIP ViT: {objection}", key=spec, expected=_plain_list())
    if (weights := Path(where)).is_file():
        # A file from the model hub lies beside the configuration that it was published with; it knows the mean and
        # std of the training, which differ between checkpoints of one architecture.
        beside = weights.with_name("open_clip_config.json")
        return model_cfg, _read_json(beside).get("preprocess_cfg", {}) if beside.is_file() else {}, weights
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if where not in tags:
        what = "neither a file nor one of the architecture's pretrained tags"
        raise Refusal("K-MISSING", what, file=weights, expected=f"a file, or {', '.join(tags) or 'no tag'}")
    tag_cfg = open_clip.get_pretrained_cfg(arch, where)
    if tag_cfg.get("quick_gelu") and not model_cfg.get("quick_gelu"):
        what, fix = "these weights were trained with quick GELU", f"--vision_tower {PREFIX}{arch}-quickgelu@{where}"
        raise Refusal("C-TOWER", what, key=spec, found=arch, expected=f"{arch}-quickgelu", fix=fix)
    return model_cfg, tag_cfg, Path(open_clip.download_pretrained(tag_cfg))


def _open_clip_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    if not folder.is_dir():
        what = "neither ARCH@FILE nor a folder"
        raise Refusal("K-MISSING", what, file=f"{PREFIX}{folder}", expected=SUPPORTED)
    file = folder / "open_clip_config.json"
    config = _read_json(file)
    model_cfg = config.get("model_cfg")
    if not (isinstance(model_cfg, dict) and isinstance(model_cfg.get("vision_cfg"), dict) and "embed_dim" in model_cfg):
        raise Refusal("K-CONFIG", "not an open_clip configuration", file=file, key="model_cfg", found=model_cfg)
    weights = next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise Refusal("K-MISSING", "no weights in the folder", file=folder, expected=" or ".join(OPEN_CLIP_WEIGHTS))
    return model_cfg, config.get("preprocess_cfg") or {}, weights


def read_visual_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The ``visual.*`` tensors of an open_clip checkpoint: safetensors, or torch without pickled code."""
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name.startswith("visual.")}  # noqa: SIM118
    tensors = {name.removeprefix("module."): tensor for name, tensor in _torch_load(file, "cpu").items()}
    return {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}


def _plain_list() -> str:
    return f"one of {', '.join(plain_architectures())}"


def _import_open_clip():
    try:
        import open_clip
    except ImportError as error:
        raise Refusal("E-PACKAGE", "open_clip is not installed", fix="pip install 'llava_moslora[clip]'") from error
    return open_clip


# --- files ---


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refusal("K-MISSING", "no such file", file=file, expected=SUPPORTED) from error
    except (ValueError, RecursionError) as error:
        raise Refusal("K-JSON", "not JSON", file=file, found=error) from error
    if not isinstance(value, dict):
        raise Refusal("K-JSON", "not a JSON object", file=file, found=type(value).__name__)
    return value


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        what = "not a complete safetensors file"
        raise Refusal("K-DAMAGED", what, file=file, found=error, fix="download it again") from error


def _torch_load(file: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a torch file by name, on ``device``. Pickled code never runs: ``weights_only=True``."""
    try:
        value = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file fails in the zip reader, in pickle or in the tensor reader
        what = "not a complete torch file of plain tensors"
        raise Refusal("K-DAMAGED", what, file=file, found=error, fix="give the weights as safetensors") from error
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):  # a training checkpoint of open_clip
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise Refusal("K-DAMAGED", "not a dictionary of tensors", file=file, found=type(value).__name__)
    return value
