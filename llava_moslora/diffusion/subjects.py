"""The pictures of a subject: found, opened safely, resized and cropped deterministically.

The crop is a function of the seed and the picture's content, independent of its name and of other pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_moslora.data.images import load_image
from llava_moslora.errors import Refusal, few
from llava_moslora.files.manifest import sha256
from llava_moslora.sdxl_settings import SubjectSettings

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Picture:
    """A picture in a folder.

    Attributes:
        content: the file's SHA-256.
    """

    folder: Path
    name: str
    content: str


@dataclass(frozen=True)
class Square:
    """A picture as used in training.

    Attributes:
        pixels: float32[3, S, S] in -1..1, S the resolution.
        time_ids: float32[6], SDXL's: original height and width, top and left of the crop in the resized picture,
            S and S.
    """

    pixels: Tensor
    time_ids: Tensor


def find_pictures(folder: str | None, flag: str) -> tuple[list[Picture], list[str]]:
    """The pictures directly in ``folder``, by name, and the names of other files there; hidden files do not count.

    Raises:
        Refusal: C-PATH, no such folder; D-EMPTY, no picture in it.
    """
    place = Path(str(folder))
    if not place.is_dir():
        what = "no such folder" if not place.exists() else "not a folder"
        raise Refusal("C-PATH", what, file=place, key=flag, fix="give the folder with the pictures")
    paths = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    pictures = [path for path in paths if path.suffix.lower() in SUFFIXES]
    others = [path.name for path in paths if path.suffix.lower() not in SUFFIXES]
    if not pictures:
        raise Refusal(
            "D-EMPTY", "no pictures in the folder", file=place, key=flag, found=few(others) or "nothing",
            expected="files that end in " + ", ".join(SUFFIXES),
        )  # fmt: skip
    return [Picture(place, p.name, sha256(p) if p.is_file() else "") for p in pictures], others


def load_square(picture: Picture, settings: SubjectSettings, seed: int) -> Square:
    """The picture, its shorter side resized to the resolution, cropped to a square.

    Raises:
        Refusal: I-..., as :func:`llava_moslora.data.images.load_image`.
    """
    image = load_image(picture.name, picture.folder, follow_links=settings.follow_image_links)
    size, (width, height) = settings.resolution, image.size
    resized = (
        max(size, int(width * size / min(width, height))), max(size, int(height * size / min(width, height)))
    )  # fmt: skip
    image = image.resize(resized, FILTERS[settings.resampling])
    spare_x, spare_y = image.width - size, image.height - size
    left, top = spare_x // 2, spare_y // 2
    if not settings.center_crop:
        generator = generator_of(seed, picture.content)
        top = int(torch.randint(spare_y + 1, (), generator=generator))
        left = int(torch.randint(spare_x + 1, (), generator=generator))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)  # (S, S, 3)
    return Square(
        torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1,
        torch.tensor([height, width, top, left, size, size], dtype=torch.float32),
    )


def generator_of(*names: object) -> torch.Generator:
    """Random numbers on the CPU that depend only on ``names``, the same on every device."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
