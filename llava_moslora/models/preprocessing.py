"""How pictures become a vision tower's input, in full and in today's spelling, as ``preprocessor_config.json`` has it.

Mean, standard deviation, size and interpolation come from where the tower came from; nothing is guessed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal
from llava_moslora.models.tensors import read_json

BICUBIC, BILINEAR = 3, 2  # Pillow's numbers, as preprocessor_config.json writes them
# CLIP's processor scales the short side and crops, unless it is told otherwise; SigLIP's scales straight to a square.
CLIP_PROCESSOR, SIGLIP_PROCESSOR = "CLIPImageProcessor", "SiglipImageProcessor"
PROCESSOR_NAMES = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
# Both under all their names; LLaVA's is CLIP's with padding to a square, which is a flag of the run here.
KINDS = {
    **{f"CLIP{name}": CLIP_PROCESSOR for name in (*PROCESSOR_NAMES, "FeatureExtractor")},
    **{f"Llava{name}": CLIP_PROCESSOR for name in PROCESSOR_NAMES},
    **{f"Siglip{name}": SIGLIP_PROCESSOR for name in PROCESSOR_NAMES},
}


def processor_settings(
    size: dict, crop: dict | None, mean: list, std: list, resample: int, kind: str = CLIP_PROCESSOR
) -> dict[str, Any]:
    """The settings of an image processor of ``kind``; without ``crop`` nothing is cut off."""
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
        "image_mean": list(mean),
        "image_std": list(std),
    }


def read_preprocessing(folder: Path, image_size: int) -> dict[str, Any]:
    """The preprocessing that ``folder`` holds; it must yield pictures of ``image_size`` × ``image_size``.

    Raises:
        Refusal: K-MISSING, K-JSON; K-PROCESSOR, neither CLIP's nor SigLIP's preprocessing, incomplete, or of another
            size.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        raw = read_json(file)
    elif (folder / "processor_config.json").is_file():  # where transformers 5 puts it for a CLIPModel
        file = folder / "processor_config.json"
        raw = read_json(file).get("image_processor") or {}
    else:
        fix = "copy the file from where the tower came from; mean, std and size are not guessed"
        raise Refusal("K-MISSING", "the tower's preprocessing is not there", file=file, fix=fix)
    named = raw.get("image_processor_type", raw.get("feature_extractor_type", CLIP_PROCESSOR))
    own = "copy the file from where the tower came from"
    if (kind := KINDS.get(named)) is None:
        where = {"file": file, "key": "image_processor_type", "fix": own}
        what = "neither CLIP's nor SigLIP's preprocessing"
        raise Refusal("K-PROCESSOR", what, **where, found=named, expected=f"{CLIP_PROCESSOR} or {SIGLIP_PROCESSOR}")
    for key in ("image_mean", "image_std"):
        values = raw.get(key)
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
            where = {"file": file, "key": key, "fix": own}
            raise Refusal("K-PROCESSOR", "not usable", **where, found=values, expected="three numbers")
    crops = kind == CLIP_PROCESSOR if raw.get("do_center_crop") is None else raw["do_center_crop"]
    size, crop = raw.get("size", 224), (raw.get("crop_size") or 224) if crops else None
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind == CLIP_PROCESSOR else {"height": size, "width": size}
    processor = processor_settings(
        kind=kind,
        size=size,
        crop={"height": crop, "width": crop} if isinstance(crop, int) else crop,
        mean=raw["image_mean"],
        std=raw["image_std"],
        resample=raw.get("resample", BICUBIC),
    )
    processor |= {key: raw[key] for key in processor if key.startswith(("do_", "rescale")) and raw.get(key) is not None}
    result = processor["crop_size"] if processor["do_center_crop"] else processor["size"]
    if (result.get("height"), result.get("width")) != (image_size, image_size):
        where = {"file": file, "key": "crop_size" if processor["do_center_crop"] else "size", "fix": own}
        what = "the pictures would not have the tower's size"
        raise Refusal("K-PROCESSOR", what, **where, found=result, expected=f"{image_size}×{image_size}")
    return processor
