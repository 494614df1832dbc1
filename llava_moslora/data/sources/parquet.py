"""Records in a Parquet file, some at a time; to be used like :mod:`llava_moslora.data.sources.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llava_moslora.errors import Refusal

ROWS = 1024


class ParquetStream:
    """Iterates over ``(value, None)``, the columns of a row as a dictionary without those that are null.

    Attributes:
        bytes_read: how far into the file the reading is, to the row.

    Raises:
        Refusal: D-FILE (no such file), D-PARSE (not Parquet, or damaged).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[tuple[object, str | None]]:
        if not self.path.is_file():
            raise Refusal("D-FILE", "there is no such file", file=self.path, fix="check --data_path")
        size, done = self.path.stat().st_size, 0
        try:
            file = pq.ParquetFile(self.path)
            for batch in file.iter_batches(ROWS):
                done += len(batch)
                self.bytes_read = size * done // file.metadata.num_rows
                for row in batch.to_pylist():
                    yield {name: value for name, value in row.items() if value is not None}, None
        except (pa.ArrowException, OSError) as error:
            raise Refusal(
                "D-PARSE",
                "not a Parquet file, or a damaged one",
                file=self.path,
                found=str(error).splitlines()[0],
                fix="copy or download it again",
            ) from None
