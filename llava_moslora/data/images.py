"""Opens images for training, evaluation and chat.

Image names come from data files and their bytes from the internet, so both are untrusted: names must stay inside the
image folder, sizes are checked in the header, only a few formats are read, and every exception of Pillow becomes a
:class:`Refusal` that names the record.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from llava_moslora.errors import Refusal

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# How a file of FORMATS begins
SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|GIF8[79]a|BM|II\*\0|MM\0\*", re.DOTALL)
SMALLER = "make it smaller, or remove the record"
MAX_PIXELS = 50_000_000
MAX_ASPECT = 200  # with more, the short side is less than two of a tower's 336 pixels
BACKGROUND = (255, 255, 255)  # background of transparent pixels
# The start of a URL, or an image inside a data: URL; any other name with a colon, such as vg:1.png, is a file's.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:[^,]*[/;][^,]*,", re.IGNORECASE)

log = logging.getLogger(__name__)
_animated_seen = False


def is_url(name: str) -> bool:
    """Whether ``name`` is not a file name: a URL, or an image inside a ``data:`` URL."""
    return _URL.match(name) is not None or name.startswith("//")


def load_image(
    name: str, root: str | Path, *, record: int | None = None, record_id: str | None = None, follow_links: bool = False
) -> Image.Image:
    """The image ``name`` in the folder ``root``, upright, in RGB.

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
    with _open(path, path, where) as image:
        return _decode(image, path, where)


def load_bytes(data: bytes, name: str, *, record: int | None = None, record_id: str | None = None) -> Image.Image:
    """As :func:`load_image`, from an image's bytes; ``name`` identifies them in refusals."""
    where = {"record": record, "record_id": record_id or None, "key": "image"}
    with _open(io.BytesIO(data), name, where) as image:
        return _decode(image, name, where)


def check_image(
    name: str, root: str | Path, *, record: int | None = None, record_id: str | None = None, follow_links: bool = False
) -> tuple[int, int]:
    """All checks of :func:`load_image` that need no decoding; returns (width, height) as stored."""
    where = {"record": record, "record_id": record_id or None, "key": "image"}
    path = _resolve(name, root, where, follow_links)
    with _open(path, path, where) as image:
        return _size(image, path, where)


def check_bytes(data: bytes, name: str, *, record: int | None = None, record_id: str | None = None) -> tuple[int, int]:
    """As :func:`check_image`, from an image's bytes; ``name`` identifies them in refusals."""
    where = {"record": record, "record_id": record_id or None, "key": "image"}
    with _open(io.BytesIO(data), name, where) as image:
        return _size(image, name, where)


def _size(image: Image.Image, path: str | Path, where: dict) -> tuple[int, int]:
    if image.mode in ("F", "I"):
        raise _mode_refusal(image, path, where)
    return image.size


def _decode(image: Image.Image, path: str | Path, where: dict) -> Image.Image:
    try:
        _note_animation(image, path)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), path, where)
    except Refusal:
        raise
    except Exception as error:  # invalid bytes make Pillow raise nearly anything: OSError, SyntaxError, struct.error
        found, fix = str(error) or None, "copy or download it again"
        raise Refusal("I-DECODE", "the image is damaged", file=path, found=found, fix=fix, **where) from None


def _resolve(name: str, root: str | Path, where: dict, follow_links: bool) -> Path:
    """The path of a regular file inside ``root``; nothing is opened."""
    root = Path(root)
    if is_url(name):
        what = "images are read from the image folder, never from a URL"
        raise Refusal("I-PATH", what, found=name, fix="download them first", **where)
    lexical = os.path.normpath(name)
    if "\0" in name or "\\" in name or lexical.split(os.sep)[0] == "..":
        expected = f"a relative name with forward slashes, below {root}"
        what, fix = "the name leads out of the image folder", "use such a name, or another --image_folder"
        raise Refusal("I-PATH", what, found=name, expected=expected, fix=fix, **where)
    if os.path.isabs(name) and not _lies_below(lexical, root):
        what, fix = "an absolute path outside --image_folder", "name the folder that it lies in, or relative names"
        raise Refusal("I-PATH", what, found=name, expected=f"a file below {root}", fix=fix, **where)
    path = root / lexical  # an absolute name stays as it is
    try:
        real_root, real = Path(os.path.realpath(root)), Path(os.path.realpath(path, strict=True))
        if not follow_links and not real.is_relative_to(real_root):
            raise Refusal(
                "I-PATH", "a symbolic link leads out of the image folder", found=f"{name} -> {real}",
                expected=f"a file below {real_root}", fix="allow it with --follow_image_links", **where,
            )  # fmt: skip
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Refusal(
            "I-MISSING", "there is no such image", file=path, found=name, expected=f"a file below {root}",
            fix="check --image_folder" + ("" if root.is_dir() else f": {root} does not exist"), **where,
        ) from None  # fmt: skip
    except OSError as error:  # a name too long for the file system, a loop of links
        what, found = "not a valid file name", f"{name}: {error.strerror}"
        raise Refusal("I-PATH", what, found=found, fix="rename the file", **where) from None
    if not stat.S_ISREG(mode):
        found, fix = stat.filemode(mode), "put the image file there"
        raise Refusal("I-FILE", "not a regular file", file=path, found=found, fix=fix, **where)
    return path


def _lies_below(path: str, root: Path) -> bool:
    """Whether an absolute path lies in ``root`` as it is written, or where links lead."""
    return Path(path).is_relative_to(root.absolute()) or Path(os.path.realpath(path)).is_relative_to(root.resolve())


def _open(source: Path | io.BytesIO, path: str | Path, where: dict) -> Image.Image:
    """The image with its header read; ``path`` names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS below is stricter
            image = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refusal("I-SIZE", "the image is too large", file=path, found=error, fix=SMALLER, **where) from None
    except PermissionError as error:
        found, fix = error.strerror, "give this user permission to read it"
        raise Refusal("I-FILE", "the image cannot be read", file=path, found=found, fix=fix, **where) from None
    except Exception:  # see load_image
        start = _first_bytes(source)
        if SIGNATURE.match(start):
            what, fix = "the image is truncated or damaged", "copy or download it again"
            raise Refusal("I-DECODE", what, file=path, fix=fix, **where) from None
        raise Refusal(
            "I-FORMAT", "not an image in a known format" if start else "the file is empty", file=path,
            expected=" | ".join(FORMATS), fix=f"{'convert it, or copy' if start else 'copy or download'} it again",
            **where,
        ) from None  # fmt: skip
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        found, expected = f"{width}×{height} = {width * height / 1e6:.0f} MP", f"at most {MAX_PIXELS // 10**6} MP"
        what, fix = "the image is too large", SMALLER
        raise Refusal("I-SIZE", what, file=path, found=found, expected=expected, fix=fix, **where)
    if max(width, height) > MAX_ASPECT * min(width, height):
        image.close()
        found, expected = f"{width}×{height}", f"sides no more than 1:{MAX_ASPECT}"
        what, fix = "the image is too narrow", "crop it, or remove the record"
        raise Refusal("I-SHAPE", what, file=path, found=found, expected=expected, fix=fix, **where)
    return image


def _first_bytes(source: Path | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:16]
    with source.open("rb") as file:
        return file.read(16)


def _to_rgb(image: Image.Image, path: str | Path, where: dict) -> Image.Image:
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


def _mode_refusal(image: Image.Image, path: str | Path, where: dict) -> Refusal:
    what = f"{'floating-point' if image.mode == 'F' else '32-bit integer'} pixels have no defined brightness"
    expected, fix = "8 or 16 bits per channel", "convert the image"
    return Refusal("I-MODE", what, file=path, expected=expected, fix=fix, **where)


def _note_animation(image: Image.Image, path: str | Path) -> None:
    global _animated_seen
    if getattr(image, "is_animated", False) and not _animated_seen:
        _animated_seen = True
        log.warning("%s is an animation; the first frame of animations is used (logged once)", path)
