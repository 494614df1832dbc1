"""An image to a vision tower's input: padded or cropped, scaled, normalised, as transformers' image processors do it.

Shapes: H, W the tower's input size; h, w an image's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from llava_moslora.errors import Refusal

STRIP = 16_000_000  # pixels of background that are laid around a tall image at once
LARGEST_SIDE = 4096  # pixels: far above any tower's
SMALLEST = 1e-6  # a factor or a deviation below it leaves nothing but black, or infinity
ENGINES = ("pil", "torch")
TORCH_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's number, torch's name


@dataclass(frozen=True)
class ImageTransform:
    """An image to a vision tower's input, pixel for pixel as an image processor of transformers does it.

    ``mode="pad"`` puts the image on a square of the tower's mean colour first (LLaVA's ``image_aspect_ratio pad``,
    ``LlavaImageProcessorPil(do_pad=True)``); ``mode="crop"`` scales the short side and cuts the centre
    (``CLIPImageProcessorPil``).

    ``engine="pil"`` equals transformers' PIL processors and is what published towers were trained with;
    ``engine="torch"`` equals its torchvision processors: pixels differ by at most one step of 256, in half the time.

    Attributes:
        resize_to: length of the short side after scaling, or (height, width).
        size: (H, W) of the result.
        mean, std: per channel, of values in 0..1.
        resample: Pillow's number of the filter.
    """

    resize_to: int | tuple[int, int]
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    rescale: float = 1 / 255
    mode: Literal["pad", "crop"] = "pad"
    engine: Literal["pil", "torch"] = "pil"

    @classmethod
    def from_tower(cls, vision_folder: str | Path, mode: Literal["pad", "crop"] = "pad") -> ImageTransform:
        """Read ``preprocessor_config.json`` (or the ``image_processor`` part of ``processor_config.json``).

        Raises:
            Refusal: K-VISION, the file is missing; whatever :meth:`from_settings` refuses.
        """
        folder = Path(vision_folder)
        path = folder / "preprocessor_config.json"
        config = None
        if not path.is_file():
            both = folder / "processor_config.json"  # what transformers 5 writes for a whole processor
            config = json.loads(both.read_bytes()).get("image_processor") if both.is_file() else None
            if config is None:
                raise Refusal(
                    "K-VISION",
                    "the vision tower does not say how images are prepared for it",
                    file=path,
                    found="no such file",
                    fix="download preprocessor_config.json of the tower too",
                )
        return cls.from_settings(config or json.loads(path.read_bytes()), mode, source=path)

    @classmethod
    def from_settings(
        cls,
        config: dict,
        mode: Literal["pad", "crop"] = "pad",
        engine: Literal["pil", "torch"] = "pil",
        source: str | Path | None = None,
    ) -> ImageTransform:
        """From the content of a tower's ``preprocessor_config.json``; ``source`` is named in refusals.

        Raises:
            Refusal: K-VISION, a needed key is not there, or asks for something that is not done here; C-MODE, unknown
                ``mode``, or a filter the engine lacks.
        """
        if mode not in ("pad", "crop"):
            raise Refusal("C-MODE", "unknown image mode", key="--image_aspect_ratio", found=mode, expected="pad | crop")
        resample = config.get("resample", 3)
        if engine == "torch" and resample not in TORCH_FILTERS:
            raise Refusal(
                "C-MODE", "the torch engine does not have this tower's filter", key="--image_engine",
                found=f"resample {resample}", expected=" or ".join(f"{k} ({v})" for k, v in TORCH_FILTERS.items()),
                fix="--image_engine pil",
            )  # fmt: skip
        lacking = [key for key in ("size", "image_mean", "image_std") if config.get(key) is None]
        if lacking:
            raise Refusal("K-VISION", "the image settings lack a key", file=source, key=", ".join(lacking))
        _check(config, source)
        resize_to = _side(config["size"])
        size = (
            _side(config["crop_size"]) if config.get("do_center_crop", True) and config.get("crop_size") else resize_to
        )
        return cls(
            resize_to=resize_to,
            size=(size, size) if isinstance(size, int) else size,
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            resample=resample,
            rescale=config.get("rescale_factor", 1 / 255),
            mode=mode,
            engine=engine,
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """``image`` in RGB to float32[3, H, W]."""
        if self.engine == "torch":
            return self._by_torch(image)
        pixels = np.asarray(self._pad(image) if self.mode == "pad" else self._scale(image))
        pixels = np.ascontiguousarray(self._cut_centre(pixels).transpose(2, 0, 1))  # uint8 (3, H, W)
        # As transformers does it, to the last bit: scaled in float64, normalised in float32.
        values = torch.from_numpy(pixels).double().mul_(self.rescale).float()
        return values.sub_(torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.std)[:, None, None])

    def blank(self) -> torch.Tensor:
        """An image of nothing: the tower's mean colour, float32[3, H, W] (close to zero)."""
        return self(Image.new("RGB", (self.size[1], self.size[0]), self.background))

    @property
    def background(self) -> tuple[int, ...]:
        return tuple(int(value * 255) for value in self.mean)

    def _pad(self, image: Image.Image) -> Image.Image:
        """On a square of the mean colour, scaled.

        Pillow scales rows first, then columns, with 8 bits in between. Doing the two passes ourselves gives the same
        pixels, but the rows of pure background above and below a wide image are never scaled, and of a tall image
        only a strip is ever as wide as the square (20,000 × 100 pixels would make a square of 1.2 GB).
        """
        width, height = image.size
        side = max(width, height)
        to_height, to_width = (self.resize_to,) * 2 if isinstance(self.resize_to, int) else self.resize_to
        narrow = Image.new("RGB", (to_width, side), self.background)  # rows scaled, columns not yet
        if width >= height:
            narrow.paste(image.resize((to_width, height), self.resample), (0, (side - height) // 2))
        else:
            for top in range(0, height, rows := max(1, STRIP // side)):
                strip = Image.new("RGB", (side, min(rows, height - top)), self.background)
                strip.paste(image.crop((0, top, width, top + strip.height)), ((side - width) // 2, 0))
                narrow.paste(strip.resize((to_width, strip.height), self.resample), (0, top))
        return narrow.resize((to_width, to_height), self.resample)

    def _by_torch(self, image: Image.Image) -> torch.Tensor:
        """What torchvision's processor computes, with its kernels but without torchvision."""
        pixels = np.array(image)  # uint8 (h, w, 3)
        height, width = pixels.shape[:2]
        if self.mode == "pad" and height != width:
            side = max(height, width)
            top, left = (side - height) // 2, (side - width) // 2
            row = np.full((side, 3), self.background, dtype=np.uint8)
            square = np.empty((side, side, 3), dtype=np.uint8)
            # whole rows are copied far faster than the three numbers of a colour
            square[:top] = square[top + height :] = row
            square[top : top + height, :left] = row[:left]
            square[top : top + height, left + width :] = row[left + width :]
            square[top : top + height, left : left + width] = pixels
            pixels = square
        target = self._target(pixels.shape[1], pixels.shape[0])[::-1]
        values = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, h, w), channels last in memory
        if target != pixels.shape[:2]:
            values = interpolate(values, target, mode=TORCH_FILTERS[self.resample], antialias=True)
        values = torch.from_numpy(self._cut_centre(values[0].permute(1, 2, 0).numpy())).permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(part)[:, None, None] * (1 / self.rescale) for part in (self.mean, self.std))
        return values.float().sub_(mean).div_(std)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after scaling."""
        if not isinstance(self.resize_to, int):
            return self.resize_to[1], self.resize_to[0]
        long = int(self.resize_to * max(width, height) / min(width, height))
        return (self.resize_to, long) if width <= height else (long, self.resize_to)

    def _scale(self, image: Image.Image) -> Image.Image:
        target = self._target(*image.size)
        return image if image.size == target else image.resize(target, self.resample)

    def _cut_centre(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3) to (H, W, 3); a side that is too short is filled with zeros, as transformers does."""
        height, width = self.size
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        if top < 0 or left < 0:
            grown = np.zeros((max(height, pixels.shape[0]), max(width, pixels.shape[1]), 3), dtype=np.uint8)
            y, x = -((pixels.shape[0] - grown.shape[0]) // 2), -((pixels.shape[1] - grown.shape[1]) // 2)
            grown[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            return self._cut_centre(grown)
        return pixels[top : top + height, left : left + width]


def _check(config: dict, source: str | Path | None) -> None:
    """Refuse what would be ignored here, or would give no images; all keys are there."""

    def numbers(value: object, count: int, lowest: float, highest: float) -> bool:
        value = value if isinstance(value, list | tuple) else [value]
        kinds = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        return kinds and len(value) == count and all(lowest <= v <= highest for v in value)

    def sides(value: object) -> bool:
        named = {key: side for key, side in value.items() if side is not None} if isinstance(value, dict) else {}
        known = isinstance(value, int) or set(named) in ({"shortest_edge"}, {"height", "width"})
        given = list(named.values()) if named else [value]
        return known and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in given)

    rules = {
        **{key: (config.get(key) in (None, True), "true") for key in ("do_resize", "do_rescale", "do_normalize")},
        "do_center_crop": (config.get("do_center_crop") in (None, True, False), "true or false"),
        "size": (sides(config["size"]), f"side lengths up to {LARGEST_SIDE}"),
        "crop_size": (not config.get("crop_size") or sides(config["crop_size"]), f"side lengths up to {LARGEST_SIDE}"),
        "image_mean": (numbers(config["image_mean"], 3, 0, 1), "three numbers from 0 to 1"),
        "image_std": (numbers(config["image_std"], 3, SMALLEST, 1e6), "three numbers above 0"),
        "rescale_factor": (numbers(config.get("rescale_factor", 1), 1, SMALLEST, 1e6), "a number above 0"),
        "resample": (type(config.get("resample", 3)) is int and 0 <= config.get("resample", 3) <= 5, "0 to 5"),
    }
    for key, (is_good, expected) in rules.items():
        if not is_good:
            what = "the image settings ask for something that is not done here"
            raise Refusal("K-VISION", what, file=source, key=key, found=config.get(key), expected=expected)


def _side(size: int | dict) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    return size["shortest_edge"] if size.get("shortest_edge") else (size["height"], size["width"])
