"""Pictures: one loader for training, evaluation and chat, and the transform of a vision tower.

A picture's name comes out of a data file and its bytes from the internet, so both are treated as hostile: names stay
inside the image folder, sizes are judged by the header, formats come from a short list, and whatever Pillow raises
becomes a :class:`Refusal` that names the record.

Shapes: H, W the tower's input size.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from llava_moslora.errors import Refusal

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_ASPECT = 200  # beyond it the short side is less than two of a tower's 336 pixels
STRIP = 16_000_000  # pixels of background that are laid around a tall picture at once
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

log = logging.getLogger(__name__)
_animated_seen = False


def load_image(
    name: str,
    root: str | Path,
    *,
    record: int | None = None,
    record_id: str | None = None,
    follow_links: bool = False,
) -> Image.Image:
    """The picture ``name`` in the folder ``root``, upright, in RGB.

    EXIF orientation is applied; transparency shows white; 16-bit grey is scaled to 8 bits (Pillow would clip it to
    white); of an animation the first frame is taken.

    Args:
        record, record_id: where the name was found, for the message.
        follow_links: allow symbolic links that lead out of ``root``.

    Raises:
        Refusal: I-PATH, I-MISSING, I-FILE, I-FORMAT, I-SIZE, I-SHAPE, I-MODE, I-DECODE.
    """
    where = {"record": record, "record_id": record_id or None, "key": "image"}
    path = _resolve(name, root, where, follow_links)
    with _open(path, where) as image:
        try:
            _note_animation(image, path)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), path, where)
        except Refusal:
            raise
        except (
            Exception
        ) as error:  # hostile bytes make Pillow raise nearly anything: OSError, SyntaxError, struct.error
            raise Refusal(
                "I-DECODE",
                "the picture is damaged",
                file=path,
                found=f"{type(error).__name__}: {error}",
                fix="copy or download it again",
                **where,
            ) from None


def check_image(
    name: str,
    root: str | Path,
    *,
    record: int | None = None,
    record_id: str | None = None,
    follow_links: bool = False,
) -> tuple[int, int]:
    """Everything :func:`load_image` can refuse without decoding; returns (width, height) as stored."""
    where = {"record": record, "record_id": record_id or None, "key": "image"}
    path = _resolve(name, root, where, follow_links)
    with _open(path, where) as image:
        if image.mode in ("F", "I"):
            raise _mode_refusal(image, path, where)
        return image.size


def _resolve(name: str, root: str | Path, where: dict, follow_links: bool) -> Path:
    """The path of a regular file inside ``root``; nothing is opened."""
    root = Path(root)
    if _URL.match(name) or name.startswith("//"):
        raise Refusal(
            "I-PATH",
            "pictures are read from the image folder, never from a URL",
            found=name,
            fix="download them first",
            **where,
        )
    lexical = os.path.normpath(name)
    if "\0" in name or "\\" in name or os.path.isabs(name) or lexical.split(os.sep)[0] == "..":
        raise Refusal(
            "I-PATH",
            "the name leads out of the image folder",
            found=name,
            expected=f"a relative name with forward slashes, below {root}",
            **where,
        )
    path = root / lexical
    try:
        real_root, real = Path(os.path.realpath(root)), Path(os.path.realpath(path, strict=True))
        if not follow_links and not real.is_relative_to(real_root):
            raise Refusal(
                "I-PATH",
                "a symbolic link leads out of the image folder",
                found=f"{name} -> {real}",
                expected=f"a file below {real_root}",
                fix="allow it with --follow_image_links",
                **where,
            )
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Refusal(
            "I-MISSING",
            "there is no such picture",
            file=path,
            found=name,
            expected=f"a file below {root}",
            fix="check --image_folder" if root.is_dir() else f"check --image_folder: {root} does not exist",
            **where,
        ) from None
    except OSError as error:  # a name too long for the file system, a loop of links
        raise Refusal("I-PATH", "the name cannot be a file's", found=f"{name}: {error.strerror}", **where) from None
    if not stat.S_ISREG(mode):
        raise Refusal("I-FILE", "not a regular file", file=path, found=stat.filemode(mode), **where)
    return path


def _open(path: Path, where: dict) -> Image.Image:
    """The picture with its header read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS below is stricter
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refusal("I-SIZE", "the picture is too large", file=path, found=error, **where) from None
    except PermissionError as error:
        raise Refusal("I-FILE", "the picture cannot be read", file=path, found=error.strerror, **where) from None
    except Exception as error:  # see load_image
        empty = path.stat().st_size == 0
        raise Refusal(
            "I-FORMAT",
            "the file is empty" if empty else "not a picture in a known format",
            file=path,
            found=None if empty else type(error).__name__,
            expected=" | ".join(FORMATS),
            **where,
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise Refusal(
            "I-SIZE",
            "the picture is too large",
            file=path,
            found=f"{width}×{height} = {width * height / 1e6:.0f} MP",
            expected=f"at most {MAX_PIXELS // 10**6} MP",
            **where,
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        image.close()
        raise Refusal(
            "I-SHAPE",
            "the picture is a line",
            file=path,
            found=f"{width}×{height}",
            expected=f"sides no more than 1:{MAX_ASPECT}",
            **where,
        )
    return image


def _to_rgb(image: Image.Image, path: Path, where: dict) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.float32) / 257.0
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise _mode_refusal(image, path, where)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _mode_refusal(image: Image.Image, path: Path, where: dict) -> Refusal:
    kind = "floating-point" if image.mode == "F" else "32-bit integer"
    return Refusal(
        "I-MODE",
        f"{kind} pixels have no defined brightness",
        file=path,
        expected="8 or 16 bits per channel",
        fix="convert the picture",
        **where,
    )


def _note_animation(image: Image.Image, path: Path) -> None:
    global _animated_seen
    if getattr(image, "is_animated", False) and not _animated_seen:
        _animated_seen = True
        log.warning("%s is an animation; of animations the first frame is used (said once)", path)


@dataclass(frozen=True)
class ImageTransform:
    """A picture to a vision tower's input, pixel for pixel as transformers' PIL image processors do it.

    ``mode="pad"`` puts the picture on a square of the tower's mean colour first (LLaVA's ``image_aspect_ratio pad``,
    ``LlavaImageProcessorPil(do_pad=True)``); ``mode="crop"`` scales the short side and cuts the centre
    (``CLIPImageProcessorPil``).

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
                    "the vision tower does not say how pictures are prepared for it",
                    file=path,
                    found="no such file",
                    fix="download preprocessor_config.json of the tower too",
                )
        return cls.from_settings(config or json.loads(path.read_bytes()), mode, source=path)

    @classmethod
    def from_settings(
        cls, config: dict, mode: Literal["pad", "crop"] = "pad", source: str | Path | None = None
    ) -> ImageTransform:
        """From the content of a tower's ``preprocessor_config.json``; ``source`` is named in refusals.

        Raises:
            Refusal: K-VISION, a needed key is not there; C-MODE, unknown ``mode``.
        """
        if mode not in ("pad", "crop"):
            raise Refusal(
                "C-MODE", "unknown picture mode", key="--image_aspect_ratio", found=mode, expected="pad | crop"
            )
        lacking = [key for key in ("size", "image_mean", "image_std") if config.get(key) is None]
        if lacking:
            raise Refusal("K-VISION", "the picture settings lack a key", file=source, key=", ".join(lacking))
        resize_to = _side(config["size"])
        size = (
            _side(config["crop_size"]) if config.get("do_center_crop", True) and config.get("crop_size") else resize_to
        )
        return cls(
            resize_to=resize_to,
            size=(size, size) if isinstance(size, int) else size,
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            resample=config.get("resample", 3),
            rescale=config.get("rescale_factor", 1 / 255),
            mode=mode,
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """``image`` in RGB to float32[3, H, W]."""
        pixels = np.asarray(self._pad(image) if self.mode == "pad" else self._scale(image))
        pixels = self._cut_centre(pixels).transpose(2, 0, 1)  # uint8 (3, H, W)
        # 256 values per channel, so the arithmetic of transformers (float64 scale, float32 rest) is done on a table.
        grey = (np.arange(256, dtype=np.float64) * self.rescale).astype(np.float32)
        table = (grey[None] - np.float32(self.mean)[:, None]) / np.float32(self.std)[:, None]  # float32 (3, 256)
        return torch.from_numpy(np.stack([table[c][pixels[c]] for c in range(3)]))

    def blank(self) -> torch.Tensor:
        """A picture of nothing: the tower's mean colour, float32[3, H, W] (close to zero)."""
        return self(Image.new("RGB", (self.size[1], self.size[0]), self.background))

    @property
    def background(self) -> tuple[int, ...]:
        return tuple(int(value * 255) for value in self.mean)

    def _pad(self, image: Image.Image) -> Image.Image:
        """On a square of the mean colour, scaled.

        Pillow scales rows first, then columns, with 8 bits in between. Doing the two passes ourselves gives the same
        pixels, but the rows of pure background above and below a wide picture are never scaled, and of a tall picture
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

    def _scale(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if isinstance(self.resize_to, int):
            short, long = min(width, height), max(width, height)
            target_long = int(self.resize_to * long / short)
            target = (self.resize_to, target_long) if width <= height else (target_long, self.resize_to)
        else:
            target = (self.resize_to[1], self.resize_to[0])
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


def _side(size: int | dict) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    return size["shortest_edge"] if size.get("shortest_edge") else (size["height"], size["width"])
