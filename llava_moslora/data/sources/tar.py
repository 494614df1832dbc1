"""Tar files: records as members ``*.json`` or ``*.jsonl``, and the images that they name as members next to them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast

from fsspec.core import url_to_fs

from llava_moslora.data.sources.container import CheckedImage, CheckImage, Container, ImageRef, RawRecord, open_file
from llava_moslora.data.sources.json import JsonStream
from llava_moslora.errors import Refusal

RECORD_SUFFIXES = (".json", ".jsonl")
LARGEST_IMAGE = 100 << 20  # bytes as stored


class Tar(Container):
    """An image is found by ``(offset, bytes, 0)``, which a compressed tar does not allow."""

    suffixes = (".tar",)
    can_hold_images = True
    contents = "tar files of records and images"

    def read(self, file: str, check: CheckImage | None) -> Iterator[RawRecord]:
        assert check is not None, "the images of a tar are inside it"
        records: list[tuple[object, str | None]] = []
        images: dict[str, CheckedImage] = {}
        try:
            with open_file(file) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                length = os.path.getsize(file) if "://" not in file else getattr(stream, "size", None)
                for member in archive:
                    if not member.size >= 0 or (length is not None and member.offset_data + member.size > length):
                        raise tarfile.ReadError(f"{member.size} bytes are declared for {member.name}")
                    if not member.isreg() or member.issparse() or (content := archive.extractfile(member)) is None:
                        continue
                    if member.name.endswith(RECORD_SUFFIXES):
                        records += JsonStream(cast(BinaryIO, content), f"{file}:{member.name}")
                        continue
                    if member.name in images:
                        what, fix = "two members have the same name", "write the shard again with unique names"
                        raise Refusal("D-SHARD", what, file=file, found=member.name, fix=fix)
                    at = (member.offset_data, member.size, 0)
                    if member.size > LARGEST_IMAGE:
                        too_large = _too_large(file, member.name, member.size)
                        images[member.name] = CheckedImage(ImageRef(at, 0, member.name), too_large)
                    else:
                        images[member.name] = CheckedImage.of(content.read(), file, member.name, at, check)
        except Refusal:  # which is a ValueError
            raise
        # ValueError: a header's field that is no number, from Python's tarfile
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise Refusal(
                "D-PARSE", "not a complete uncompressed tar file", file=file, found=error,
                fix="copy it again; unpack a compressed one (gunzip): an image is read by its position",
            ) from None  # fmt: skip
        for value, problem in records:
            yield RawRecord(value, problem, images)

    def read_image(self, file: str, at: tuple[int, int, int]) -> bytes:
        system, path = url_to_fs(file)
        offset, size, _ = at
        return system.cat_file(path, offset, offset + size)


def _too_large(file: str, name: str, size: int) -> Refusal:
    return Refusal("I-SIZE", "the image's file is too large", file=f"{file}:{name}", key="image",
                   found=f"{size / 2**20:.0f} MiB", expected=f"at most {LARGEST_IMAGE >> 20} MiB",
                   fix="make it smaller, or remove the record")  # fmt: skip
