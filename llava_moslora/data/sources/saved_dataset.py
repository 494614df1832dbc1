"""Data sets of the ``datasets`` library: a folder that ``save_to_disk`` wrote, or one of the Hugging Face Hub.

``hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]`` names one on the Hub (split ``train`` by default). Only with that prefix
is anything downloaded, into the library's own cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llava_moslora.config import HUB
from llava_moslora.data.sources.container import CheckImage, Container, RawRecord
from llava_moslora.data.sources.table import ROWS, ROWS_WITH_IMAGES, image_columns, image_in_row, record_of_row
from llava_moslora.errors import Refusal

if TYPE_CHECKING:
    from datasets import Dataset

STATE, SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes of a data set, and of one with splits
_HUB_NAME = re.compile(
    r"(?P<path>[\w.-]+/[\w.-]+)(/(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?"
)


def is_hub(name: str) -> bool:
    return name.startswith(HUB)


class SavedDataset(Container):
    """An image is found by ``(row, 0, number)``; columns of a row that are null are left out."""

    suffixes = ()
    can_hold_images = True
    contents = "data sets with images that save_to_disk wrote"

    def reads(self, file: str) -> bool:
        return is_hub(file) or os.path.isdir(file)

    def files(self, file: str) -> list[str]:
        return [part["filename"] for part in _open(file).cache_files]

    def holds_images(self, file: str) -> bool:
        try:
            return bool(_image_columns(_open(file)))
        except Refusal:
            return False

    def read(self, file: str, check: CheckImage | None) -> Iterator[RawRecord]:
        dataset = _open(file)
        columns = _image_columns(dataset) if check is not None else []
        size, row = sum(map(os.path.getsize, self.files(file))), 0
        for table in dataset.with_format("arrow").iter(ROWS_WITH_IMAGES if columns else ROWS):
            for value in table.to_pylist():
                record = record_of_row(value, columns, file, (row, 0), check)
                row += 1
                record.bytes_read = size * row // len(dataset)
                yield record

    def read_image(self, file: str, at: tuple[int, int, int]) -> bytes:
        row, _, number = at
        try:
            dataset = _open(file)
            columns = _image_columns(dataset)
            (value,) = dataset.select_columns(columns).with_format("arrow")[row : row + 1].to_pylist()
        except (Refusal, ValueError) as error:
            raise OSError(str(error)) from error
        return image_in_row(value, columns, number)


def _image_columns(dataset: Dataset) -> list[str]:
    return image_columns(dataset.features.arrow_schema)


def _open(file: str) -> Dataset:
    """
    Raises:
        Refusal: D-FILE, not a folder of one data set; D-PARSE, a damaged one; D-HUB, it cannot be loaded from the Hub.
    """
    if is_hub(file):
        return _load_from_hub(file)
    folder = Path(file)
    if (folder / SPLITS).is_file():
        splits = " or ".join(str(path.parent) for path in sorted(folder.glob(f"*/{STATE}")))
        what, fix = "the folder contains several splits of a data set", f"name one of them: {splits}"
        raise Refusal("D-FILE", what, file=file, key="--data_path", fix=fix)
    if not (folder / STATE).is_file():
        what, expected = "a folder that is not a saved data set", f"{STATE} in it, as datasets' save_to_disk writes it"
        raise Refusal("D-FILE", what, file=file, key="--data_path", expected=expected, fix="name the files in it")
    return _load_from_disk(file, (folder / STATE).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _load_from_disk(file: str, written: int) -> Dataset:
    """``written``: when; a folder that was written again is opened again."""
    from datasets import load_from_disk  # imported here: it takes seconds, and reading other files does not need it

    try:
        return load_from_disk(file, keep_in_memory=False)
    except Exception as error:  # of pyarrow, json and datasets, for what is missing or damaged
        found = f"{type(error).__name__}: {error}"
        raise Refusal("D-PARSE", "a damaged data set", file=file, found=found, fix="save it again") from None


@lru_cache(maxsize=8)
def _load_from_hub(file: str) -> Dataset:
    from datasets import load_dataset

    if (match := _HUB_NAME.fullmatch(file.removeprefix(HUB))) is None:
        expected = f"{HUB}OWNER/NAME[/CONFIG][@REVISION][:SPLIT]"
        what, fix = "not the name of a data set on the Hub", "copy the name from its page"
        raise Refusal("D-HUB", what, file=file, key="--data_path", expected=expected, fix=fix)
    asked = match.groupdict()
    try:
        split = asked["split"] or "train"
        return load_dataset(asked["path"], asked["name"], revision=asked["revision"], split=split, keep_in_memory=False)
    except Exception as error:  # of datasets, huggingface_hub, httpx and fsspec, for a wrong name and for no network
        found = f"{type(error).__name__}: {error}"
        fix = (
            "check name, revision, split and network; or save_to_disk on a machine with a network, and name the folder"
        )
        raise Refusal("D-HUB", "the Hub's data set cannot be read", file=file, found=found, fix=fix) from None
