"""The settings of a vision tower's image processor, completed, in the current ``preprocessor_config.json`` format.

Mean, standard deviation, size and interpolation come with the tower; nothing is guessed. Settings that the image
transform (``data/image_transform.py``) would not follow are refused here by name, for training and export.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json
from llava_moslora.files.json import LARGEST_CONFIG

BICUBIC, BILINEAR = 3, 2  # Pillow's numbers, as preprocessor_config.json writes them
# By default CLIP's processor scales the short side and crops; SigLIP's scales to a square.
CLIP_PROCESSOR, SIGLIP_PROCESSOR = "CLIPImageProcessor", "SiglipImageProcessor"
PROCESSOR_NAMES = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
# Both under all their names; LLaVA's is CLIP's with padding to a square, which is a flag of the run here.
KNOWN_PROCESSORS = {
    **{f"CLIP{name}": CLIP_PROCESSOR for name in (*PROCESSOR_NAMES, "FeatureExtractor")},
    **{f"Llava{name}": CLIP_PROCESSOR for name in PROCESSOR_NAMES},
    **{f"Siglip{name}": SIGLIP_PROCESSOR for name in PROCESSOR_NAMES},
}
LARGEST_SIDE = 4096  # pixels: far above any tower's; an image scaled to it takes 50 MB, and to 10**6 the whole machine
FIX = "copy the file from the tower's source"


def _is_number(value: object, lowest: float, highest: float = 1e6) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def _are_three(value: object, lowest: float, highest: float = 1e6) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(v, lowest, highest) for v in value)


def _is_side(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIDE


def _is_size(value: object) -> bool:
    sides = {key: side for key, side in value.items() if side is not None} if isinstance(value, dict) else {}
    return set(sides) in ({"shortest_edge"}, {"height", "width"}) and all(map(_is_side, sides.values()))


ALWAYS_ON = "true, as in training"
SIZES = f"side lengths in whole pixels up to {LARGEST_SIDE}"
RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "do_resize": (lambda v: v is True, ALWAYS_ON),
    "do_rescale": (lambda v: v is True, ALWAYS_ON),
    "do_normalize": (lambda v: v is True, ALWAYS_ON),
    "do_center_crop": (lambda v: isinstance(v, bool), "true or false"),
    "do_convert_rgb": (lambda v: isinstance(v, bool), "true or false"),
    "size": (_is_size, f"shortest_edge, or height and width: {SIZES}"),
    "crop_size": (_is_size, f"height and width: {SIZES}"),
    "resample": (lambda v: type(v) is int and 0 <= v <= 5, "Pillow's number of a filter, 0 to 5"),
    "rescale_factor": (lambda v: _is_number(v, 1e-6), "a number above 0, usually 1/255"),
    "image_mean": (lambda v: _are_three(v, 0, 1), "three numbers from 0 to 1"),
    "image_std": (lambda v: _are_three(v, 1e-6), "three numbers above 0"),
}


def processor_settings(
    size: dict, crop: dict | None, mean: list | None, std: list | None, resample: int, kind: str = CLIP_PROCESSOR
) -> dict[str, Any]:
    """The settings of an image processor of ``kind``; without ``crop`` nothing is cropped."""
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": resample,
        "do_center_crop": crop is not None,
        **({} if crop is None else {"crop_size": crop}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def read_preprocessing(folder: Path, image_size: int) -> dict[str, Any]:
    """The processor settings in ``folder``; they must yield images of ``image_size`` × ``image_size`` pixels.

    Raises:
        Refusal: K-MISSING, K-JSON; K-PROCESSOR, neither CLIP's nor SigLIP's processor, incomplete, of another size, or
            a setting that training does not support.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        raw = read_json(file, finite=False, largest=LARGEST_CONFIG)  # RULES name the key
    elif (folder / "processor_config.json").is_file():  # where transformers 5 puts it for a CLIPModel
        file = folder / "processor_config.json"
        raw = read_json(file, finite=False, largest=LARGEST_CONFIG).get("image_processor") or {}
        if not isinstance(raw, dict):
            raise Refusal("K-PROCESSOR", "not an object", file=file, key="image_processor", found=raw, fix=FIX)
    else:
        fix = "copy the file from the tower's source; mean, std and size are not guessed"
        raise Refusal("K-MISSING", "the tower's image processor settings are missing", file=file, fix=fix)
    named = raw.get("image_processor_type", raw.get("feature_extractor_type", CLIP_PROCESSOR))
    if (kind := KNOWN_PROCESSORS.get(named) if isinstance(named, str) else None) is None:
        raise Refusal(
            "K-PROCESSOR", "neither CLIP's nor SigLIP's image processor", file=file, key="image_processor_type",
            found=named, expected=f"{CLIP_PROCESSOR} or {SIGLIP_PROCESSOR}", fix=FIX,
        )  # fmt: skip
    processor = _complete(raw, kind)
    check_settings(processor, file)
    result = processor["crop_size"] if processor["do_center_crop"] else processor["size"]
    if (result.get("height"), result.get("width")) != (image_size, image_size):
        key, expected = "crop_size" if processor["do_center_crop"] else "size", f"{image_size}×{image_size}"
        what = "the images would not have the tower's size"
        raise Refusal("K-PROCESSOR", what, file=file, key=key, found=result, expected=expected, fix=FIX)
    return processor


def _complete(raw: dict[str, Any], kind: str) -> dict[str, Any]:
    """``raw`` with current key names and CLIP's and SigLIP's defaults; its values are not yet checked."""
    crops = kind == CLIP_PROCESSOR if raw.get("do_center_crop") is None else raw["do_center_crop"]
    size, crop = (raw.get("size") or 224), (raw.get("crop_size") or 224) if crops else None
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind == CLIP_PROCESSOR else {"height": size, "width": size}
    processor = processor_settings(
        kind=kind,
        size=size,
        crop={"height": crop, "width": crop} if isinstance(crop, int) else crop,
        mean=raw.get("image_mean"),
        std=raw.get("image_std"),
        resample=BICUBIC if raw.get("resample") is None else raw["resample"],
    )
    return processor | {
        key: raw[key] for key in processor if key.startswith(("do_", "rescale")) and raw.get(key) is not None
    }


def check_settings(processor: dict[str, Any], source: Path) -> None:
    """Refuse complete settings that training does not support.

    Raises:
        Refusal: K-PROCESSOR, with the key.
    """
    for key, (is_good, expected) in RULES.items():
        if key in processor and not is_good(processor[key]):
            raise Refusal(
                "K-PROCESSOR", "not usable", file=source, key=key, found=processor[key], expected=expected, fix=FIX
            )
