"""The folder of a complete LLaVA, which can be given in place of an LLM, a vision tower or a projector.

Two formats are a single folder: transformers' ``LlavaForConditionalGeneration`` (llava-hf, XTuner's ``-transformers``
releases, this package's own export, with the tensor names of any transformers version) and the original LLaVA's
``LlavaLlamaForCausalLM`` (also XTuner's ``-hf`` releases). XTuner's own format has a folder for each part, which
:func:`name_parts` finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, LlavaConfig, PreTrainedConfig

from llava_moslora.config import ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import LazyTensor, read_tensor_folder
from llava_moslora.models.config_file import make_config, read_model_config
from llava_moslora.models.towers import CLIP, KINDS, kind_name

TRANSFORMERS, ORIGINAL = "LlavaForConditionalGeneration", "LlavaLlamaForCausalLM"
# LLaVA settings that change what it computes: key → (value if the key is missing, supported values).
SUPPORTED: dict[str, dict[str, tuple[Any, tuple]]] = {
    TRANSFORMERS: {
        "vision_feature_layer": (-2, (-2,)),
        "projector_hidden_act": ("gelu", ("gelu",)),
        "multimodal_projector_bias": (True, (True,)),
    },
    ORIGINAL: {
        "mm_vision_select_layer": (-2, (-2,)),
        "mm_vision_select_feature": ("patch", ("patch",)),
        "mm_projector_type": ("linear", ("mlp2x_gelu",)),
        "mm_use_im_start_end": (False, (False,)),
        "mm_use_im_patch_token": (False, (False,)),
        "tune_mm_vision_resampler": (False, (False,)),
    },
}
# (prefix on disk, part, prefix in the part's own model); the first match counts. The projector keeps its names.
PREFIXES = (
    ("model.language_model.", "llm", "model."),  # transformers from 4.52 on, as in memory
    ("model.vision_tower.vision_tower.vision_model.", "vision", ""),  # the original
    ("model.vision_tower.vision_model.", "vision", ""),
    ("model.vision_tower.", "vision", ""),
    ("model.multi_modal_projector.", "projector", "model.multi_modal_projector."),
    ("model.mm_projector.", "projector", "model.mm_projector."),  # the original
    ("language_model.model.", "llm", "model."),  # transformers, as published
    ("language_model.lm_head.", "llm", "lm_head."),
    ("vision_tower.vision_model.", "vision", ""),
    ("vision_tower.", "vision", ""),
    ("multi_modal_projector.", "projector", "multi_modal_projector."),
    ("", "llm", ""),  # the original: an LLM with additional modules
)


class LlavaTensors(NamedTuple):
    """The tensors of a LLaVA by part, lazily."""

    llm: dict[str, LazyTensor]
    vision: dict[str, LazyTensor]
    projector: dict[str, LazyTensor]


def is_llava(raw: Mapping[str, Any]) -> bool:
    """Whether this is the ``config.json`` of a complete LLaVA."""
    architecture = (raw.get("architectures") or [None])[0]
    return architecture in SUPPORTED or raw.get("model_type") in ("llava", "llava_llama")


def is_llava_folder(folder: str | Path) -> bool:
    file = Path(folder) / "config.json"
    return file.is_file() and file.stat().st_size > 0 and is_llava(read_model_config(file))


def check_format(folder: Path) -> str:
    """The architecture, :data:`TRANSFORMERS` or :data:`ORIGINAL`.

    Raises:
        Refusal: C-MODEL, neither of them, or a setting that this package does not support.
    """
    raw = read_model_config(file := folder / "config.json")
    architecture = (raw.get("architectures") or [TRANSFORMERS if "text_config" in raw else ORIGINAL])[0]
    if architecture not in SUPPORTED:
        raise Refusal(
            "C-MODEL", "not a supported LLaVA", file=file, key="architectures", found=architecture,
            expected=" or ".join(SUPPORTED), fix="give LLM, vision tower and projector as separate folders",
        )  # fmt: skip
    settings = SUPPORTED[architecture]
    if architecture == TRANSFORMERS:  # without the class token, if this kind of tower has one
        kind = kind_name((raw.get("vision_config") or {}).get("model_type", CLIP.name))
        settings = settings | {"vision_feature_select_strategy": ("default", (KINDS.get(kind, CLIP).strategy,))}
    for key, (default, allowed) in settings.items():
        if (found := raw.get(key, default)) not in allowed:
            raise Refusal(
                "C-MODEL", "a setting that this package does not support", file=file, key=key, found=found,
                expected=allowed[0], fix="start from a LLaVA-1.5-like model",
            )  # fmt: skip
    return architecture


def llm_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the LLM inside.

    Raises:
        Refusal: C-MODEL, another kind of LLaVA, or one whose own trained tower cannot be read.
    """
    if check_format(folder) == ORIGINAL:
        if has_own_tower(folder):
            tower_description(folder)  # refuses a folder without it
        raw = read_model_config(folder / "config.json")
        own = {key: value for key, value in raw.items() if not key.startswith(("mm_", "tune_", "image_", "auto_map"))}
        own |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        return make_config(LlamaConfig, own, folder / "config.json")
    config = _transformers_config(folder).text_config
    config.tie_word_embeddings = not any(name.startswith("lm_head.") for name in read_tensors(folder).llm)
    return config


def vision_config(folder: Path) -> dict[str, Any]:
    """The vision tower's configuration as a dictionary.

    Raises:
        Refusal: C-MODEL, another kind of LLaVA, or the folder only names its tower.
    """
    if check_format(folder) == TRANSFORMERS:
        return _transformers_config(folder).vision_config.to_dict()
    if has_own_tower(folder):
        return read_model_config(tower_description(folder) / "config.json")
    file = folder / "config.json"
    raise Refusal(
        "C-MODEL", "the original LLaVA's folder does not describe its vision tower", file=file, key="mm_vision_tower",
        found=read_model_config(file).get("mm_vision_tower"), fix="give that tower's folder as --vision_tower",
    )  # fmt: skip


def has_own_tower(folder: Path) -> bool:
    """Whether an original LLaVA contains a vision tower that was trained with it."""
    return check_format(folder) == ORIGINAL and bool(read_tensors(folder).vision)


def tower_description(folder: Path) -> Path:
    """The folder with the ``config.json`` and ``preprocessor_config.json`` of the vision tower inside ``folder``:
    ``folder`` itself, or in the original format the one that ``mm_vision_tower`` names, there or next to ``folder``.

    Raises:
        Refusal: C-MODEL, it is missing.
    """
    if check_format(folder) == TRANSFORMERS:
        return folder
    named = str(read_model_config(folder / "config.json").get("mm_vision_tower") or "")
    places = [Path(named), folder.resolve().parent / Path(named).name] if named else []
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise Refusal(
        "C-MODEL", "a vision tower was trained with this LLM, but its configuration is missing", file=folder,
        key="mm_vision_tower", found=named or "nothing", expected=" or ".join(map(str, places)) or "a folder",
        fix="put config.json and preprocessor_config.json of that tower there, or give the same model in the format of "
        "transformers (…-hf, …-transformers)",
    )  # fmt: skip


def check_tower_is_taken(llm_folder: Path, vision_tower: str) -> None:
    """Refuse (C-MODEL) a vision tower other than the one that was trained together with the LLM."""
    own_tower = is_llava_folder(llm_folder) and has_own_tower(llm_folder)
    if own_tower and Path(vision_tower).resolve() != llm_folder.resolve():
        raise Refusal(
            "C-MODEL", "not the vision tower that was trained with this LLM", file=llm_folder,
            key="--vision_tower", found=vision_tower, expected=str(llm_folder), fix="omit --vision_tower",
        )  # fmt: skip


def _transformers_config(folder: Path) -> LlavaConfig:
    try:
        return LlavaConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises several exception types for invalid fields
        file = folder / "config.json"
        raise Refusal("C-MODEL", "not a usable LLaVA configuration", file=file, found=error) from error


def read_tensors(folder: Path) -> LlavaTensors:
    """The folder's tensors by part, under their names in the part's own model.

    Raises:
        Refusal: a file is missing or damaged.
    """
    parts = LlavaTensors({}, {}, {})
    for name, stored in read_tensor_folder(folder).items():
        prefix, part, new = next(row for row in PREFIXES if name.startswith(row[0]))
        getattr(parts, part)[new + name[len(prefix) :]] = stored
    return parts


def name_parts(settings: ModelSettings) -> ModelSettings:
    """``settings`` with all three parts named, if only a complete LLaVA was given; an LLM stays text-only.

    Raises:
        Refusal: C-MODEL, parts of it are adapters that are not merged yet.
    """
    if settings.vision_tower is not None:
        return settings
    folder = Path(settings.model_name_or_path)
    adapters = [name for name in ("llm_adapter", "visual_encoder_adapter") if (folder / name).is_dir()]
    if (folder / "projector").is_dir() and adapters:
        raise Refusal(
            "C-MODEL", "XTuner's folder contains adapters that are not merged", file=folder / adapters[0],
            fix="merge them with XTuner first, or give the three parts by their own flags",
        )  # fmt: skip
    if (folder / "projector").is_dir() and (folder / "visual_encoder").is_dir():
        llm = folder / "llm" if (folder / "llm").is_dir() else folder
        tower, projector = folder / "visual_encoder", folder / "projector"
    elif is_llava_folder(folder):
        llm = tower = projector = folder
    else:
        return settings
    own = settings.pretrain_mm_mlp_adapter or str(projector)
    return dataclasses.replace(
        settings, model_name_or_path=str(llm), vision_tower=str(tower), pretrain_mm_mlp_adapter=own
    )
