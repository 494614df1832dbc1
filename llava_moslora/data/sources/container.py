"""The protocol that a kind of data file (JSON, Parquet, tar, ...) implements to be read as training data."""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO

import fsspec

from llava_moslora.errors import Refusal

MOST_KEYS = 1000  # of a record; real ones have a few dozen

# Called with the bytes of an image and its name in refusals; raises a Refusal if it cannot be used.
CheckImage = Callable[[bytes, str], object]


@dataclass(frozen=True)
class ImageRef:
    """Where an image is in its data file, as the prepared data set stores it."""

    at: tuple[int, int, int]  # the address for Container.read_image
    checksum: int  # CRC-32: the bytes that are trained on are the ones that were checked
    name: str

    def __str__(self) -> str:
        return f"{':'.join(map(str, self.at))}:{self.checksum:08x}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> ImageRef:
        first, second, third, checksum, name = text.split(":", 4)
        return cls((int(first), int(second), int(third)), int(checksum, 16), name)


@dataclass(frozen=True)
class CheckedImage:
    """An image that was checked while its data file was read; its bytes are not kept."""

    ref: ImageRef
    refusal: Refusal | None  # why it cannot be used

    @classmethod
    def of(cls, data: bytes, file: str, name: str, at: tuple[int, int, int], check: CheckImage) -> CheckedImage:
        ref = ImageRef(at, zlib.crc32(data), name)
        try:
            check(data, f"{file}:{name}")
        except Refusal as refusal:
            return cls(ref, refusal)
        return cls(ref, None)


@dataclass(slots=True)
class RawRecord:
    """A record as in its data file, not checked yet."""

    value: object  # the JSON value or table row
    problem: str | None = None  # why it is not strict JSON, although it could be parsed
    images: dict[str, CheckedImage] = field(default_factory=dict)  # those in the data file itself, by name
    bytes_read: int = 0  # of the file so far, for a progress bar


class Container(ABC):
    """One kind of data file. A new one is a subclass in a file of its own and an entry of ``source.CONTAINERS``."""

    suffixes: tuple[str, ...]  # of the file names that it reads
    can_hold_images = False  # in the file itself; only such files can be given by pattern or URL
    contents = ""  # what it holds, for messages

    def reads(self, file: str) -> bool:
        """Whether this is the container of a file of that name."""
        return file.endswith(self.suffixes)

    def files(self, file: str) -> list[str]:
        """The files that its content lies in.

        Raises:
            Refusal: D-FILE, D-HUB; of what is not a single file.
        """
        return [file]

    def holds_images(self, file: str) -> bool:
        """Whether there are images in this local file. Never raises: ``read`` reports what is wrong with a file."""
        return self.can_hold_images

    @abstractmethod
    def read(self, file: str, check: CheckImage | None) -> Iterator[RawRecord]:
        """The records in order, in memory that does not grow with the file.

        Args:
            file: path or URL.
            check: for every image in the file; None: the images are files of their own.

        Raises:
            Refusal: D-FILE, missing; D-PARSE, damaged; D-SHARD, its images cannot be read one by one.
        """

    def read_image(self, file: str, at: tuple[int, int, int]) -> bytes:
        """The bytes of one image, unchecked.

        Raises:
            OSError, IndexError: the file is missing or has changed.
        """
        raise NotImplementedError(f"{type(self).__name__} files hold no images")


def too_many_keys(found: Sized) -> str | None:
    """Why an object or a row is not a record, such as a file with all records in one object, keyed by id."""
    return f"{len(found)} keys in one record, of at most {MOST_KEYS}" if len(found) > MOST_KEYS else None


def open_file(file: str) -> AbstractContextManager[BinaryIO]:
    """A data file, local or wherever fsspec reaches, for reading.

    Raises:
        Refusal: D-FILE, there is no such local file.
    """
    if "://" in file:
        return fsspec.open(file, "rb")
    if not os.path.isfile(file):
        raise Refusal("D-FILE", "there is no such file", file=file, fix="check --data_path")
    return open(file, "rb")
