"""A complete LLaVA as the start of a new run: its three parts, found in one folder.

Two single-folder layouts are read: transformers' ``LlavaForConditionalGeneration`` (llava-hf, XTuner's
``-transformers`` releases, this package's own export, in the key names of any transformers version) and the original
LLaVA's ``LlavaLlamaForCausalLM`` (also XTuner's ``-hf`` releases). XTuner's own layout is a folder of folders, and
:func:`starting_parts` only tells which is which.

Wherever this package asks for an LLM, a vision tower or a projector, a LLaVA folder may stand in for each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, LlavaConfig, PreTrainedConfig

from llava_moslora.config import ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.files.json import read_json
from llava_moslora.files.tensors import LazyTensor, read_tensor_folder
from llava_moslora.models.towers import CLIP, KINDS, kind_name

TRANSFORMERS, ORIGINAL = "LlavaForConditionalGeneration", "LlavaLlamaForCausalLM"
# What of a LLaVA's configuration this package computes; the value that stands for "absent" is the layout's default.
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
# Prefix on disk → part, prefix within the part; the first that fits. The projector keeps its own names.
PREFIXES = (
    ("model.language_model.", "llm", "model."),  # transformers from 4.52 on, as in memory
    ("model.vision_tower.vision_tower.vision_model.", "vision", ""),  # the original
    ("model.vision_tower.vision_model.", "vision", ""),
    ("model.vision_tower.", "vision", ""),
    ("model.multi_modal_projector.", "projector", "model.multi_modal_projector."),
    ("model.mm_projector.", "projector", "model.mm_projector."),  # the original
    ("language_model.model.", "llm", "model."),  # transformers, the published layout
    ("language_model.lm_head.", "llm", "lm_head."),
    ("vision_tower.vision_model.", "vision", ""),
    ("vision_tower.", "vision", ""),
    ("multi_modal_projector.", "projector", "multi_modal_projector."),
    ("", "llm", ""),  # the original: an LLM with more in it
)


class Parts(NamedTuple):
    """The tensors of a LLaVA by part, not read yet."""

    llm: dict[str, LazyTensor]
    vision: dict[str, LazyTensor]
    projector: dict[str, LazyTensor]


def is_llava(raw: Mapping[str, Any]) -> bool:
    """Whether this is the ``config.json`` of a complete LLaVA."""
    architecture = (raw.get("architectures") or [None])[0]
    return architecture in SUPPORTED or raw.get("model_type") in ("llava", "llava_llama")


def is_llava_folder(folder: str | Path) -> bool:
    file = Path(folder) / "config.json"
    return file.is_file() and file.stat().st_size > 0 and is_llava(read_json(file))


def check_layout(folder: Path) -> str:
    """Which of the two layouts; what would make it compute something else than this package does is refused.

    Raises:
        Refusal: C-MODEL.
    """
    raw = read_json(folder / "config.json")
    architecture = (raw.get("architectures") or [TRANSFORMERS if "text_config" in raw else ORIGINAL])[0]
    file = folder / "config.json"
    if architecture not in SUPPORTED:
        raise Refusal(
            "C-MODEL", "not a LLaVA this package knows", file=file, key="architectures", found=architecture,
            expected=" or ".join(SUPPORTED), fix="give LLM, vision tower and projector each by its own folder",
        )  # fmt: skip
    settings = SUPPORTED[architecture]
    if architecture == TRANSFORMERS:  # without the class token, whichever way that is said for this kind of tower
        kind = kind_name((raw.get("vision_config") or {}).get("model_type", CLIP.name))
        settings = settings | {"vision_feature_select_strategy": ("default", (KINDS.get(kind, CLIP).strategy,))}
    for key, (default, allowed) in settings.items():
        if (found := raw.get(key, default)) not in allowed:
            raise Refusal(
                "C-MODEL", "this LLaVA computes something else than is trained here", file=file, key=key, found=found,
                expected=allowed[0], fix="start from a LLaVA-1.5-like model",
            )  # fmt: skip
    return architecture


def llm_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the LLM inside.

    Raises:
        Refusal: C-MODEL, another kind of LLaVA, or one whose own trained tower would be left behind.
    """
    if check_layout(folder) == ORIGINAL:
        if has_own_tower(folder):
            tower_description(folder)  # without it the tower could not be taken along
        raw = read_json(folder / "config.json")
        own = {key: value for key, value in raw.items() if not key.startswith(("mm_", "tune_", "image_", "auto_map"))}
        return LlamaConfig.from_dict(own | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    config = _transformers_config(folder).text_config
    config.tie_word_embeddings = not any(name.startswith("lm_head.") for name in read_parts(folder).llm)
    return config


def vision_config(folder: Path) -> dict[str, Any]:
    """The vision tower's configuration as a dictionary.

    Raises:
        Refusal: C-MODEL, another kind of LLaVA, or one whose tower is only named and not inside.
    """
    if check_layout(folder) == TRANSFORMERS:
        return _transformers_config(folder).vision_config.to_dict()
    if has_own_tower(folder):
        return read_json(tower_description(folder) / "config.json")
    file = folder / "config.json"
    raise Refusal(
        "C-MODEL", "the original LLaVA's folder does not describe its vision tower", file=file, key="mm_vision_tower",
        found=read_json(file).get("mm_vision_tower"), fix="give that tower's folder as --vision_tower",
    )  # fmt: skip


def has_own_tower(folder: Path) -> bool:
    """Whether an original LLaVA holds a vision tower that was trained with it."""
    return check_layout(folder) == ORIGINAL and bool(read_parts(folder).vision)


def tower_description(folder: Path) -> Path:
    """The folder that says how the vision tower inside is built and how images are prepared for it: ``folder``
    itself, or for the original layout, which only names the tower, the one that ``mm_vision_tower`` names, there or
    beside ``folder``. Of it ``config.json`` and ``preprocessor_config.json`` are needed, no weights.

    Raises:
        Refusal: C-MODEL, it is not there.
    """
    if check_layout(folder) == TRANSFORMERS:
        return folder
    named = str(read_json(folder / "config.json").get("mm_vision_tower") or "")
    places = [Path(named), folder.resolve().parent / Path(named).name] if named else []
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise Refusal(
        "C-MODEL", "a vision tower was trained with this LLM, and nothing here describes it", file=folder,
        key="mm_vision_tower", found=named or "nothing", expected=" or ".join(map(str, places)) or "a folder",
        fix="put config.json and preprocessor_config.json of that tower there, or give the same model in the layout of "
        "transformers (…-hf, …-transformers)",
    )  # fmt: skip


def check_tower_is_taken(llm_folder: Path, vision_tower: str) -> None:
    """Refuse to leave behind a vision tower that was trained together with the LLM.

    Raises:
        Refusal: C-MODEL
    """
    if not is_llava_folder(llm_folder) or not has_own_tower(llm_folder):
        return
    if Path(vision_tower).resolve() != llm_folder.resolve():
        raise Refusal(
            "C-MODEL", "another vision tower than the one that was trained with this LLM", file=llm_folder,
            key="--vision_tower", found=vision_tower, expected=str(llm_folder), fix="leave --vision_tower out",
        )  # fmt: skip


def _transformers_config(folder: Path) -> LlavaConfig:
    try:
        return LlavaConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers checks fields with several kinds of errors of its own
        file = folder / "config.json"
        raise Refusal("C-MODEL", "not a usable LLaVA configuration", file=file, found=error) from error


def read_parts(folder: Path) -> Parts:
    """The folder's tensors, sorted by part and renamed to what each part is called alone.

    Raises:
        Refusal: a file is missing or damaged.
    """
    parts = Parts({}, {}, {})
    for name, stored in read_tensor_folder(folder).items():
        prefix, part, new = next(row for row in PREFIXES if name.startswith(row[0]))
        getattr(parts, part)[new + name[len(prefix) :]] = stored
    return parts


def starting_parts(folder: str | Path) -> tuple[Path, Path, Path]:
    """What to give as LLM, vision tower and projector when only ``folder``, a complete LLaVA, was named.

    Raises:
        Refusal: C-FLAG, not a complete LLaVA; C-MODEL, parts of it are adapters that are not merged yet.
    """
    folder = Path(folder)
    adapters = [name for name in ("llm_adapter", "visual_encoder_adapter") if (folder / name).is_dir()]
    if (folder / "projector").is_dir() and adapters:
        raise Refusal(
            "C-MODEL", "XTuner's folder holds adapters that are not merged", file=folder / adapters[0],
            fix="merge them with XTuner first, or give the three parts by their own flags",
        )  # fmt: skip
    if (folder / "projector").is_dir() and (folder / "visual_encoder").is_dir():
        llm = folder / "llm" if (folder / "llm").is_dir() else folder
        return llm, folder / "visual_encoder", folder / "projector"
    if is_llava_folder(folder):
        return folder, folder, folder
    raise Refusal(
        "C-FLAG", "missing flag", key="--vision_tower", found=f"{folder} is not a complete LLaVA",
        fix="give the vision tower's folder, or a complete LLaVA as --model_name_or_path",
    )  # fmt: skip


def name_parts(settings: ModelSettings) -> ModelSettings:
    """``settings`` with LLM, vision tower and projector each by itself, where only a complete LLaVA was named.

    Raises:
        Refusal: as :func:`starting_parts`.
    """
    if settings.vision_tower is not None:
        return settings
    llm, tower, projector = map(str, starting_parts(settings.model_name_or_path))
    own = settings.pretrain_mm_mlp_adapter or projector
    return dataclasses.replace(settings, model_name_or_path=llm, vision_tower=tower, pretrain_mm_mlp_adapter=own)
