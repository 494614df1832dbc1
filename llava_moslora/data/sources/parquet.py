"""Parquet files: a record's keys are columns, some of which may contain the images themselves (:mod:`.table`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from llava_moslora.data.sources.container import CheckImage, Container, RawRecord, open_file
from llava_moslora.data.sources.table import ROWS, ROWS_WITH_IMAGES, image_columns, image_in_row, record_of_row
from llava_moslora.errors import Refusal

LARGEST_ROW_GROUP = 256 << 20  # bytes; to read one image its row group is read


class Parquet(Container):
    """An image is found by ``(row group, row, number)``; columns of a row that are null are left out."""

    suffixes = (".parquet",)
    can_hold_images = True
    contents = "Parquet files with the images' bytes"

    def holds_images(self, file: str) -> bool:
        try:
            return bool(image_columns(pq.read_schema(file)))
        except (pa.ArrowException, OSError):
            return False

    def read(self, file: str, check: CheckImage | None) -> Iterator[RawRecord]:
        try:
            with open_file(file) as stream:
                parquet = pq.ParquetFile(stream)
                yield from _read_records(parquet, file) if check is None else _read_with_images(parquet, file, check)
        except (pa.ArrowException, OSError) as error:
            found, fix = str(error).splitlines()[0], "copy or download it again"
            raise Refusal("D-PARSE", "not a Parquet file, or a damaged one", file=file, found=found, fix=fix) from None

    def read_image(self, file: str, at: tuple[int, int, int]) -> bytes:
        group, row, number = at
        try:
            table = _images_of_group(file, group)
            return image_in_row(table.slice(row, 1).to_pylist()[0], table.column_names, number)
        except pa.ArrowException as error:
            raise OSError(str(error)) from error


def _read_records(parquet: pq.ParquetFile, file: str) -> Iterator[RawRecord]:
    size, done = os.path.getsize(file), 0
    for batch in parquet.iter_batches(ROWS):
        done += len(batch)
        for row in batch.to_pylist():
            record = record_of_row(row, (), file, (0, 0), None)
            record.bytes_read = size * done // parquet.metadata.num_rows
            yield record


def _read_with_images(parquet: pq.ParquetFile, file: str, check: CheckImage) -> Iterator[RawRecord]:
    if not (columns := image_columns(parquet.schema_arrow)):
        raise Refusal(
            "D-SHARD", "a Parquet shard without the images' bytes", file=file, key="image",
            found=", ".join(parquet.schema_arrow.names), expected='a column {"bytes", "path"}',
            fix="write the shard with the images in it: datasets' to_parquet does",
        )  # fmt: skip
    for group in range(parquet.num_row_groups):
        if (size := parquet.metadata.row_group(group).total_byte_size) > LARGEST_ROW_GROUP:
            raise Refusal(
                "D-SHARD", "reading one image would read too much", file=file, key=f"row group {group}",
                found=f"{size / 2**20:.0f} MiB", expected=f"at most {LARGEST_ROW_GROUP >> 20} MiB per row group",
                fix="write it again with a smaller row_group_size, about 100",
            )  # fmt: skip
        row = 0
        for batch in parquet.iter_batches(ROWS_WITH_IMAGES, row_groups=[group]):
            for value in batch.to_pylist():
                yield record_of_row(value, columns, file, (group, row), check)
                row += 1


@lru_cache(maxsize=2)  # images of a row group are often read together; a group may be large
def _images_of_group(file: str, group: int) -> pa.Table:
    with fsspec.open(file, "rb") as stream:
        parquet = pq.ParquetFile(stream)
        columns = image_columns(parquet.schema_arrow)
        return parquet.read_row_group(group, columns=columns).select(columns)
