"""Rows of Arrow tables as records.

A column may hold images as ``datasets`` writes them: ``{"bytes", "path"}``, or a list of those.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from llava_moslora.data.sources.container import CheckedImage, CheckImage, ImageRef, RawRecord, too_many_keys
from llava_moslora.errors import Refusal

ROWS, ROWS_WITH_IMAGES = 1024, 32  # read at once


def image_columns(schema: pa.Schema) -> list[str]:
    """The image columns, in the order in which the images of a row are numbered: ``image`` first."""
    return sorted((column.name for column in schema if _holds_images(column.type)), key=lambda name: name != "image")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def record_of_row(
    row: dict, columns: Sequence[str], file: str, at: tuple[int, int], check: CheckImage | None
) -> RawRecord:
    """A row without its null columns, with image names in place of the images.

    Args:
        columns: image columns. at: address of the row in ``file``; an image's address adds its number in the row.
        check: for every image; None if there are no such columns.
    """
    record = {name: value for name, value in row.items() if value is not None}
    images: dict[str, CheckedImage] = {}
    for column in columns:
        names = []
        for image in _listed(record.get(column)):
            number = len(images)
            name = image.get("path") or str(number)
            name = f"{number}:{name}" if name in images else name
            images[name] = _checked(image, name, file, (*at, number), check)
            names.append(name)
        if column in record:
            record[column] = names
    return RawRecord(record, too_many_keys(row), images)


def image_in_row(row: dict, columns: Sequence[str], number: int) -> bytes:
    """The bytes of an image by its number.

    Raises:
        IndexError: there are not so many.
    """
    return [image for column in columns for image in _listed(row[column])][number].get("bytes") or b""


def _listed(images: dict | list | None) -> list[dict]:
    return [] if images is None else [image or {} for image in (images if isinstance(images, list) else [images])]


def _checked(image: dict, name: str, file: str, at: tuple[int, int, int], check: CheckImage | None) -> CheckedImage:
    assert check is not None, "there are columns of images"
    if image.get("bytes") is None and image.get("path"):
        missing = Refusal(
            "I-MISSING", "an image name without the bytes", file=file, key="image", found=name,
            fix="write the data with the images in it: datasets' to_parquet and save_to_disk do",
        )  # fmt: skip
        return CheckedImage(ImageRef(at, 0, name), missing)
    return CheckedImage.of(image.get("bytes") or b"", file, name, at, check)
