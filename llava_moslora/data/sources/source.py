"""A source: what one entry of ``--data_path`` names, as data files of one container or several.

It is either one local data file, or a folder saved by ``datasets``, whose images are separate files in the image
folder; or *shards*: files that contain records together with their images, on disk or at any fsspec URL. Each shard is
read once, front to back, and its records and images are checked then. The data cache stores the records' tokens and
the addresses of their images (``ImageRef``), so training on shards is shuffled and resumed exactly as on plain files,
on any number of ranks. Only files without random access are refused: a compressed tar, a Parquet file with huge row
groups.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from fsspec.core import url_to_fs

from llava_moslora.config import WILDCARDS
from llava_moslora.data.sources.container import Container, ImageRef, open_file
from llava_moslora.data.sources.json import Json
from llava_moslora.data.sources.parquet import Parquet
from llava_moslora.data.sources.saved_dataset import SavedDataset, is_hub
from llava_moslora.data.sources.tar import Tar
from llava_moslora.errors import Refusal

CONTAINERS: tuple[Container, ...] = (SavedDataset(), Tar(), Parquet(), Json())  # the first that can reads a file
BLOCK = 1 << 22  # bytes of a file that are hashed at once


def container_of(file: str) -> Container:
    return next(container for container in CONTAINERS if container.reads(file))


class Source:
    """One entry of ``--data_path``: a path, a URL, a pattern of those, or ``hub:`` and a data set of the Hub."""

    def __init__(self, name: str):
        self.name = name

    @cached_property
    def is_sharded(self) -> bool:
        """Whether its images are in its data files: a URL, a pattern, a tar, Parquet or a data set with images."""
        return "://" in self.name or _is_pattern(self.name) or container_of(self.name).holds_images(self.name)

    @cached_property
    def shards(self) -> list[str]:
        """The files of a sharded source, sorted.

        Raises:
            Refusal: D-FILE, there are none, or their storage cannot be reached; D-SHARD, files that hold no images.
        """
        if is_hub(self.name):
            return [self.name]
        try:
            system, path = url_to_fs(self.name)
            if "://" not in self.name:
                path = _escape_folders(path)
            found = system.glob(path) if _is_pattern(path) else [path] * system.exists(path)
        except (ImportError, ValueError, OSError) as error:
            fix = "check the address, the network, and that the storage's package is installed"
            raise Refusal("D-FILE", "the storage cannot be reached", file=self.name, found=error, fix=fix) from None
        if not found:
            raise Refusal("D-FILE", "there is no such file", file=self.name, fix="check --data_path")
        for file in found:
            if not container_of(file).can_hold_images:
                kinds = ", or ".join(container.contents for container in CONTAINERS if container.can_hold_images)
                fix = "name plain data files one by one"
                raise Refusal("D-SHARD", "not a shard", file=file, expected=kinds, fix=fix)
        return [system.unstrip_protocol(file) if "://" in self.name else file for file in sorted(found)]

    def version(self) -> Iterator[bytes]:
        """Bytes that change with the source's records: a hash of the file; for shards their sizes and versions.

        Raises:
            Refusal: D-FILE.
        """
        try:
            if self.is_sharded:
                parts = [part for shard in self.shards for part in container_of(shard).files(shard)]
                yield json.dumps([_version_of(part) for part in parts], default=str).encode()
                return
            for part in container_of(self.name).files(self.name):
                with open_file(part) as file:
                    while block := file.read(BLOCK):
                        yield block
        except OSError as error:
            what, found = "the file cannot be read", error.strerror or error
            fix = "correct its permissions, or copy it again"
            raise Refusal("D-FILE", what, file=self.name, found=found, fix=fix) from None


def read_image(shard: str, ref: ImageRef, *, record: int, record_id: str | None) -> bytes:
    """An image of a shard; ``record`` and ``record_id`` are named in refusals.

    Raises:
        Refusal: I-MISSING, the shard is missing or too short; I-CHANGED, these are not the bytes that were checked.
    """
    where: dict[str, Any] = {
        "file": f"{shard}:{ref.name}",
        "record": record,
        "record_id": record_id or None,
        "key": "image",
    }
    try:
        data = container_of(shard).read_image(shard, ref.at)
    except (OSError, IndexError, NotImplementedError) as error:  # the last: a folder that is gone is no data set
        fix = "check that the shard is still where it was when it was prepared"
        raise Refusal("I-MISSING", "the image cannot be read from its shard", found=error, fix=fix, **where) from None
    if zlib.crc32(data) != ref.checksum:
        raise Refusal("I-CHANGED", "the shard changed after it was prepared", fix="prepare the data again", **where)
    return data


def _version_of(shard: str) -> list:
    """Size, and the storage's version identifier; the shard is not read."""
    system, path = url_to_fs(shard)
    info = system.info(path)
    return [shard, info["size"], info["mtime"] if "mtime" in info else system.ukey(path)]


def _is_pattern(name: str) -> bool:
    """Whether ``name`` is a pattern of names, and not itself there, such as ``data [v2]/a.json``."""
    return any(sign in name for sign in WILDCARDS) and not os.path.exists(name)


def _escape_folders(path: str) -> str:
    """A local pattern in which the wildcards of folders that exist under their own name are escaped."""
    if not _is_pattern(path):
        return path
    *folders, name = path.split("/")
    there, escaped = "", []
    for folder in folders:
        there += f"{folder}/"
        escaped.append(glob.escape(folder) if os.path.isdir(there) else folder)
    return "/".join([*escaped, name])
