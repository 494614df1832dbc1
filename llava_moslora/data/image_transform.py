"""Turns an image into a vision tower's input: pads or crops, scales and normalises it.

Shapes: H, W the tower's input size; h, w an image's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from llava_moslora.config import ASPECT_RATIOS, DataSettings
from llava_moslora.errors import Refusal

STRIP = 16_000_000  # pixels of a tall image's padded square that exist at once
TORCH_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's number, torch's name


@dataclass(frozen=True)
class ImageTransform:
    """Gives the same pixels as transformers' image processors.

    ``aspect_ratio="pad"`` puts the image on a square of the tower's mean colour first (LLaVA's
    ``image_aspect_ratio pad``, ``LlavaImageProcessorPil(do_pad=True)``); ``"crop"`` scales the short side and crops the
    centre (``CLIPImageProcessorPil``).

    ``engine="pil"`` equals transformers' PIL processors and is what published towers were trained with;
    ``engine="torch"`` equals its torchvision processors: pixels differ by at most one step of 256, in half the time.
    """

    resize_to: int | tuple[int, int]  # length of the short side after scaling, or (height, width)
    size: tuple[int, int]  # (H, W) of the result
    mean: tuple[float, float, float]  # per channel, of values in 0..1
    std: tuple[float, float, float]
    resample: int = 3  # Pillow's number of the filter
    rescale: float = 1 / 255
    aspect_ratio: str = "pad"
    engine: str = "pil"

    @classmethod
    def from_settings(cls, processor: dict, settings: DataSettings) -> ImageTransform:
        """As :meth:`from_processor`, with the data settings' ``image_aspect_ratio`` and ``image_engine``."""
        return cls.from_processor(processor, settings.image_aspect_ratio, settings.image_engine)

    @classmethod
    def from_processor(cls, processor: dict, aspect_ratio: str = "pad", engine: str = "pil") -> ImageTransform:
        """From the settings of a tower's image processor, as ``models/preprocessing.py`` completes and checks them.

        Raises:
            Refusal: C-MODE, unknown ``aspect_ratio``, or a filter that the engine lacks.
        """
        if aspect_ratio not in ASPECT_RATIOS:
            key, expected = "--image_aspect_ratio", " | ".join(ASPECT_RATIOS)
            raise Refusal("C-MODE", "unknown aspect ratio", key=key, found=aspect_ratio, expected=expected)
        resample = processor["resample"]
        if engine == "torch" and resample not in TORCH_FILTERS:
            raise Refusal(
                "C-MODE", "the torch engine does not have this tower's filter", key="--image_engine",
                found=f"resample {resample}", expected=" or ".join(f"{k} ({v})" for k, v in TORCH_FILTERS.items()),
                fix="--image_engine pil",
            )  # fmt: skip
        resize_to = _side(processor["size"])
        size = _side(processor["crop_size"]) if processor["do_center_crop"] else resize_to
        return cls(
            resize_to=resize_to,
            size=(size, size) if isinstance(size, int) else size,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            resample=resample,
            rescale=processor["rescale_factor"],
            aspect_ratio=aspect_ratio,
            engine=engine,
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """``image`` in RGB to float32[3, H, W]."""
        if self.engine == "torch":
            return self._by_torch(image)
        pixels = np.asarray(self._pad(image) if self.aspect_ratio == "pad" else self._scale(image))
        pixels = np.ascontiguousarray(self._cut_centre(pixels).transpose(2, 0, 1))  # uint8 (3, H, W)
        # Bit-identical to transformers: rescaled in float64, normalised in float32.
        values = torch.from_numpy(pixels).double().mul_(self.rescale).float()
        return values.sub_(torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.std)[:, None, None])

    def blank(self) -> torch.Tensor:
        """An empty image: the tower's mean colour, float32[3, H, W] (close to zero)."""
        return self(Image.new("RGB", (self.size[1], self.size[0]), self.background))

    @property
    def background(self) -> tuple[int, ...]:
        return tuple(int(value * 255) for value in self.mean)

    def _pad(self, image: Image.Image) -> Image.Image:
        """``image`` on a square of the mean colour, scaled.

        Pillow resizes rows first, then columns, with 8 bits in between. The two passes here give the same pixels,
        but background rows above and below a wide image are never resized, and a tall image is padded to the square's
        width only strip by strip (20,000 × 100 pixels would make a square of 1.2 GB).
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
        """What transformers' torchvision processor computes, with the same kernels but without torchvision."""
        pixels = np.array(image)  # uint8 (h, w, 3)
        height, width = pixels.shape[:2]
        if self.aspect_ratio == "pad" and height != width:
            side = max(height, width)
            top, left = (side - height) // 2, (side - width) // 2
            row = np.full((side, 3), self.background, dtype=np.uint8)
            square = np.empty((side, side, 3), dtype=np.uint8)
            # copying whole rows is far faster than assigning a colour per pixel
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


def _side(size: dict) -> int | tuple[int, int]:
    return size["shortest_edge"] if size.get("shortest_edge") else (size["height"], size["width"])
