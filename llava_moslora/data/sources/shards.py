"""A sharded source: records together with their images in tar or Parquet files, on disk or wherever fsspec reaches.

A **tar** shard holds records as members ``*.json`` or ``*.jsonl`` (LLaVA's format) and the images that they name as
members beside them. A **Parquet** shard has the columns of a record, its ``image`` being what ``datasets`` writes for
images: ``{"bytes", "path"}``, or a list of those.

Each shard is read once, front to back, as a stream; every record and every image in it is checked then. What stays is
the record's tokens and where its images lie (:class:`ImageRef`), so from then on the order of training, and the
position in it after an interruption, are those of any other prepared data set: exact on any number of ranks. Only what
cannot be found again by its position is refused: a compressed tar, a Parquet file of huge row groups.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from llava_moslora.data.sources.json import JsonStream
from llava_moslora.errors import Refusal

RECORD_SUFFIXES = (".json", ".jsonl")
LARGEST_IMAGE = 100 << 20  # bytes as stored
LARGEST_ROW_GROUP = 256 << 20  # bytes; to read one image its row group is read
SHARD_SUFFIXES = (".tar", ".parquet")
SIGNS = "*?["  # of a pattern
EXPECTED = "tar files of records and images, or Parquet files with the images' bytes"


@dataclass(frozen=True)
class ImageRef:
    """Where an image lies in its shard: ``(offset, bytes, 0)`` of a tar, ``(row group, row, number)`` of Parquet."""

    at: tuple[int, int, int]
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
    """An image met while a shard streams by: its bytes are gone, what was found out about it is kept."""

    place: ImageRef
    refusal: Refusal | None


def is_sharded(source: str) -> bool:
    """Whether ``--data_path`` names a sharded source: a URL, a pattern, a tar, or Parquet with images in it."""
    if "://" in source or _is_pattern(source) or source.endswith(".tar"):
        return True
    if not source.endswith(".parquet"):
        return False
    try:
        return _has_images(pq.read_schema(source))
    except (pa.ArrowException, OSError):
        return False  # the plain reader says what is wrong with it


def _is_pattern(source: str) -> bool:
    """Whether ``source`` stands for several files; a file of that very name is itself, also below ``data [v2]/``."""
    return any(sign in source for sign in SIGNS) and not os.path.isfile(source)


def _escape_folders(path: str) -> str:
    """A local pattern in which the folders that are there under their own name stand for themselves."""
    if not _is_pattern(path):
        return path
    *folders, name = path.split("/")
    there, escaped = "", []
    for folder in folders:
        there += f"{folder}/"
        escaped.append(glob.escape(folder) if os.path.isdir(there) else folder)
    return "/".join([*escaped, name])


def find_shards(source: str) -> list[str]:
    """The shards that ``source`` (a path or URL, perhaps with ``*``) names, sorted; an existing file is that file.

    Raises:
        Refusal: D-FILE, there are none, or their storage cannot be reached; D-SHARD, files of another kind.
    """
    try:
        system, path = url_to_fs(source)
        if "://" not in source:
            path = _escape_folders(path)
        found = system.glob(path) if _is_pattern(path) else [path] * system.exists(path)
    except (ImportError, ValueError, OSError) as error:
        raise Refusal("D-FILE", "the storage cannot be reached", file=source, found=error) from None
    if not found:
        raise Refusal("D-FILE", "there is no such file", file=source, fix="check --data_path")
    for name in found:
        if not name.endswith(SHARD_SUFFIXES):
            raise Refusal(
                "D-SHARD", "not a shard", file=name, expected=EXPECTED, fix="name plain data files one by one"
            )
    return [system.unstrip_protocol(name) if "://" in source else name for name in sorted(found)]


def version_of(shard: str) -> list:
    """What tells one state of a shard from another without reading it: size, and its storage's mark of the version."""
    system, path = url_to_fs(shard)
    info = system.info(path)
    return [shard, info["size"], info["mtime"] if "mtime" in info else system.ukey(path)]


def read_shard(shard: str, look) -> Iterator[tuple[object, str | None, dict[str, CheckedImage]]]:
    """The records of a shard, in order, as ``(value, problem, images by name)``; see :class:`JsonStream`.

    Args:
        look: called with every image's bytes and name; what it refuses is kept for the record that uses it.

    Raises:
        Refusal: D-PARSE (damaged, compressed), D-SHARD (it cannot be read by position), whatever JsonStream refuses.
    """
    with fsspec.open(shard, "rb") as file:
        yield from (_read_tar if shard.endswith(".tar") else _read_parquet)(shard, file, look)


def _read_tar(shard: str, file: BinaryIO, look) -> Iterator[tuple[object, str | None, dict[str, CheckedImage]]]:
    records: list[tuple[object, str | None]] = []
    images: dict[str, CheckedImage] = {}
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                content = archive.extractfile(member)
                if member.name.endswith(RECORD_SUFFIXES):
                    records += JsonStream(f"{shard}:{member.name}", io.BytesIO(content.read()))
                    continue
                if member.name in images:
                    raise Refusal("D-SHARD", "two members have the same name", file=shard, found=member.name)
                at = (member.offset_data, member.size, 0)
                if member.size > LARGEST_IMAGE:
                    images[member.name] = CheckedImage(
                        ImageRef(at, 0, member.name), _too_large(shard, member.name, member.size)
                    )
                else:
                    images[member.name] = _held(shard, member.name, at, content.read(), look)
    except (tarfile.TarError, EOFError) as error:
        raise Refusal(
            "D-PARSE", "not a whole tar file without compression", file=shard, found=error,
            fix="copy it again; unpack a compressed one (gunzip): an image is read by its position",
        ) from None  # fmt: skip
    for value, problem in records:
        yield value, problem, images


def _read_parquet(shard: str, file: BinaryIO, look) -> Iterator[tuple[object, str | None, dict[str, CheckedImage]]]:
    try:
        parquet = pq.ParquetFile(file)
        if not _has_images(parquet.schema_arrow):
            raise Refusal(
                "D-SHARD", "a Parquet shard without the images' bytes", file=shard, key="image",
                found=", ".join(parquet.schema_arrow.names), expected='a column {"bytes", "path"}',
            )  # fmt: skip
        for group in range(parquet.num_row_groups):
            if (size := parquet.metadata.row_group(group).total_byte_size) > LARGEST_ROW_GROUP:
                raise Refusal(
                    "D-SHARD", "reading one image would read too much", file=shard, key=f"row group {group}",
                    found=f"{size / 2**20:.0f} MiB", expected=f"at most {LARGEST_ROW_GROUP >> 20} MiB per row group",
                    fix="write it again with a smaller row_group_size, about 100",
                )  # fmt: skip
            for row, value in enumerate(parquet.read_row_group(group).to_pylist()):
                record = {name: part for name, part in value.items() if part is not None}
                images = record.get("image", [])
                held = {}
                for number, image in enumerate(images if isinstance(images, list) else [images]):
                    image = image or {}
                    name = image.get("path") or str(number)
                    name = f"{number}:{name}" if name in held else name
                    held[name] = _held(shard, name, (group, row, number), image.get("bytes") or b"", look)
                if "image" in record:
                    record["image"] = list(held)
                yield record, None, held
    except (pa.ArrowException, OSError) as error:
        raise Refusal(
            "D-PARSE", "not a Parquet file, or a damaged one", file=shard, found=str(error).splitlines()[0],
            fix="copy or download it again",
        ) from None  # fmt: skip


def _held(shard: str, name: str, at: tuple[int, int, int], data: bytes, look) -> CheckedImage:
    place = ImageRef(at, zlib.crc32(data), name)
    try:
        look(data, f"{shard}:{name}")
    except Refusal as refusal:
        return CheckedImage(place, refusal)
    return CheckedImage(place, None)


def read_image(shard: str, place: ImageRef, *, record: int, record_id: str | None) -> bytes:
    """The bytes at a place; ``record`` and ``record_id`` are named in refusals.

    Raises:
        Refusal: I-MISSING, the shard is gone or too short; I-CHANGED, these are not the bytes that were checked.
    """
    where = {"file": f"{shard}:{place.name}", "record": record, "record_id": record_id or None, "key": "image"}
    try:
        data = (_read_tar_bytes if shard.endswith(".tar") else _read_parquet_bytes)(shard, place)
    except (OSError, IndexError, pa.ArrowException) as error:
        fix = "is the shard still where it was when it was prepared?"
        raise Refusal("I-MISSING", "the image cannot be read from its shard", found=error, fix=fix, **where) from None
    if zlib.crc32(data) != place.checksum:
        raise Refusal("I-CHANGED", "the shard changed after it was prepared", fix="prepare the data again", **where)
    return data


def _read_tar_bytes(shard: str, place: ImageRef) -> bytes:
    system, path = url_to_fs(shard)
    offset, size, _ = place.at
    return system.cat_file(path, offset, offset + size)


def _read_parquet_bytes(shard: str, place: ImageRef) -> bytes:
    group, row, number = place.at
    images = _row_group(shard, group)[row].as_py()
    return (images if isinstance(images, list) else [images])[number]["bytes"]


@lru_cache(maxsize=2)  # neighbours in a row group are often asked for together; a group may be large
def _row_group(shard: str, group: int) -> pa.ChunkedArray:
    with fsspec.open(shard, "rb") as file:
        return pq.ParquetFile(file).read_row_group(group, columns=["image"])["image"]


def _has_images(schema: pa.Schema) -> bool:
    kind = schema.field("image").type if "image" in schema.names else None
    if kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    return kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _too_large(shard: str, name: str, size: int) -> Refusal:
    return Refusal("I-SIZE", "the image's file is too large", file=f"{shard}:{name}", key="image",
                   found=f"{size / 2**20:.0f} MiB", expected=f"at most {LARGEST_IMAGE >> 20} MiB")  # fmt: skip
