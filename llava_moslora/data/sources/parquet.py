"""Parquet files: a record's keys as columns; ``image`` may hold the images themselves, as ``datasets`` writes them:
``{"bytes", "path"}``, or a list of those."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from llava_moslora.data.sources.container import CheckedImage, CheckImage, Container, RawRecord, open_file
from llava_moslora.errors import Refusal

ROWS = 1024  # read at once, of a file without images
LARGEST_ROW_GROUP = 256 << 20  # bytes; to read one image its row group is read


class Parquet(Container):
    """An image is found by ``(row group, row, number)``; columns of a row that are null are left out."""

    suffixes = (".parquet",)
    can_hold_images = True
    contents = "Parquet files with the images' bytes"

    def holds_images(self, file: str) -> bool:
        try:
            return _has_images(pq.read_schema(file))
        except (pa.ArrowException, OSError):
            return False

    def read(self, file: str, check: CheckImage | None) -> Iterator[RawRecord]:
        with open_file(file) as stream, _refusing_damage(file):
            parquet = pq.ParquetFile(stream)
            yield from _read_records(parquet, file) if check is None else _read_with_images(parquet, file, check)

    def read_image(self, file: str, at: tuple[int, int, int]) -> bytes:
        group, row, number = at
        try:
            images = _row_group(file, group)[row].as_py()
        except pa.ArrowException as error:
            raise OSError(str(error)) from error
        return (images if isinstance(images, list) else [images])[number]["bytes"]


def _read_records(parquet: pq.ParquetFile, file: str) -> Iterator[RawRecord]:
    size, done = os.path.getsize(file), 0
    for batch in parquet.iter_batches(ROWS):
        done += len(batch)
        bytes_read = size * done // parquet.metadata.num_rows
        for row in batch.to_pylist():
            yield RawRecord(_without_nulls(row), bytes_read=bytes_read)


def _read_with_images(parquet: pq.ParquetFile, file: str, check: CheckImage) -> Iterator[RawRecord]:
    if not _has_images(parquet.schema_arrow):
        raise Refusal(
            "D-SHARD", "a Parquet shard without the images' bytes", file=file, key="image",
            found=", ".join(parquet.schema_arrow.names), expected='a column {"bytes", "path"}',
        )  # fmt: skip
    for group in range(parquet.num_row_groups):
        if (size := parquet.metadata.row_group(group).total_byte_size) > LARGEST_ROW_GROUP:
            raise Refusal(
                "D-SHARD", "reading one image would read too much", file=file, key=f"row group {group}",
                found=f"{size / 2**20:.0f} MiB", expected=f"at most {LARGEST_ROW_GROUP >> 20} MiB per row group",
                fix="write it again with a smaller row_group_size, about 100",
            )  # fmt: skip
        for row, value in enumerate(parquet.read_row_group(group).to_pylist()):
            record = _without_nulls(value)
            found = record.get("image", [])
            images: dict[str, CheckedImage] = {}
            for number, image in enumerate(found if isinstance(found, list) else [found]):
                image = image or {}
                name = image.get("path") or str(number)
                name = f"{number}:{name}" if name in images else name
                images[name] = CheckedImage.of(image.get("bytes") or b"", file, name, (group, row, number), check)
            if "image" in record:
                record["image"] = list(images)
            yield RawRecord(record, images=images)


def _without_nulls(row: dict) -> dict:
    return {name: value for name, value in row.items() if value is not None}


def _has_images(schema: pa.Schema) -> bool:
    kind = schema.field("image").type if "image" in schema.names else None
    if kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    return kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


@contextmanager
def _refusing_damage(file: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise Refusal(
            "D-PARSE", "not a Parquet file, or a damaged one", file=file, found=str(error).splitlines()[0],
            fix="copy or download it again",
        ) from None  # fmt: skip


@lru_cache(maxsize=2)  # neighbours in a row group are often asked for together; a group may be large
def _row_group(file: str, group: int) -> pa.ChunkedArray:
    with fsspec.open(file, "rb") as stream:
        return pq.ParquetFile(stream).read_row_group(group, columns=["image"])["image"]
