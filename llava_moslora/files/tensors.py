"""Tensors in files: their names and shapes without reading them, then one tensor at a time.

Safetensors and torch files (``.bin``, ``.pth``, ``.pt``), single or sharded with an index. Both kinds are
memory-mapped: a tensor that is read but not changed takes page cache, not process memory. Code in a torch file is
never run: ``weights_only=True``, and objects that a training framework stores next to its weights are replaced by
stand-ins that do nothing.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from llava_moslora.errors import Refusal, few
from llava_moslora.files.disk import DOWNLOAD_AGAIN, read_json

# In the order in which transformers looks for them; each may be sharded, with an index.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"

# mmengine (XTuner's trainer) stores its log in the same file: objects of these classes, with NumPy arrays in them.
LOG_CLASSES = re.compile(
    r"mmengine\.logging\.history_buffer\.HistoryBuffer|numpy\.(ndarray|dtype|dtypes\.\w+)"
    r"|numpy\.(_?core)\.multiarray\.(_reconstruct|scalar)|_codecs\.encode"
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read yet: the file it is in, its shape, and how to read it (in the file's dtype)."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor, source: Path) -> LazyTensor:
        """Of a tensor in memory; ``source`` is the file that error messages name."""
        return cls(source, tuple(tensor.shape), lambda: tensor)

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> LazyTensor:
        """``change`` applied to this tensor when the result is read; ``shape`` is the result's, if it differs."""
        return LazyTensor(self.file, self.shape if shape is None else shape, lambda: change(self.read()))


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file, in place: for folders that are published when they are complete.

    Raises:
        OSError: of the system, with the file's name.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        raise


def in_memory(tensors: Mapping[str, Tensor], source: Path) -> dict[str, LazyTensor]:
    """:meth:`LazyTensor.of` each of ``tensors``."""
    return {name: LazyTensor.of(tensor, source) for name, tensor in tensors.items()}


def read_tensor_file(file: Path, *, only_tensors: bool = False) -> dict[str, LazyTensor]:
    """The tensors of one file by name. In a torch file, what is not a tensor is ignored.

    Raises:
        Refusal: K-MISSING; K-DAMAGED, truncated or not of plain tensors, or with ``only_tensors`` something else in it.
    """
    if not file.is_file():
        raise Refusal("K-MISSING", "no such file", file=file, fix=DOWNLOAD_AGAIN)
    if file.suffix != ".safetensors":
        content = _read_torch(file)
        tensors = {name: value for name, value in content.items() if isinstance(name, str) and _is_plain(value)}
        if only_tensors and (others := content.keys() - tensors.keys()):
            raise Refusal("K-DAMAGED", "not a file of named tensors", file=file, found=few(sorted(map(str, others))))
        return in_memory(tensors, file)
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        fix = DOWNLOAD_AGAIN
        raise Refusal("K-DAMAGED", "not a complete safetensors file", file=file, found=error, fix=fix) from error
    return {name: LazyTensor(file, shape, partial(_read_one, file, name)) for name, shape in shapes.items()}


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _read_one(file: Path, name: str) -> Tensor:
    """One tensor through its own memory mapping: a shared mapping keeps every page that was ever touched."""
    with safe_open(file, framework="pt") as opened:
        try:
            return opened.get_tensor(name)
        except Exception as error:  # a dtype that this torch does not have: several kinds of errors
            what, fix = "a tensor that cannot be read", DOWNLOAD_AGAIN
            raise Refusal("K-DAMAGED", what, file=file, key=name, found=error, fix=fix) from error


def _read_torch(file: Path) -> dict[str, Any]:
    """The name → tensor part of a torch file: itself, or under ``state_dict`` (mmengine) or ``module`` (DeepSpeed)."""
    try:
        content = _load(file)
    except Exception as error:  # torch raises five different exception types for a damaged file or one with code
        raise Refusal(
            "K-DAMAGED", "cannot be read as plain tensors (a pickle that carries code is never run)", file=file,
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="copy it again, or re-save its tensors as safetensors",
        ) from error  # fmt: skip
    for wrapper in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            return content[wrapper]
    if not isinstance(content, dict):
        what = "not a dictionary of tensors"
        raise Refusal("K-DAMAGED", what, file=file, found=type(content).__name__, fix="give a state dictionary")
    return content


class _LogObject:
    """Replaces an object of :data:`LOG_CLASSES`, which are not imported: accepts its state and does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def _load(file: Path) -> Any:
    mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote another container, which cannot be mapped
    unsafe = get_unsafe_globals_in_checkpoint(file) if mapped else []
    if not unsafe or not all(LOG_CLASSES.fullmatch(name) for name in unsafe):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    with safe_globals([_LogObject, *((_LogObject, name) for name in unsafe)]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def read_tensor_folder(folder: Path, names: Iterable[str] = WEIGHT_FILES) -> dict[str, LazyTensor]:
    """The tensors of a folder that holds one of the files ``names``, or its shards with an index.

    Raises:
        Refusal: K-MISSING, no weights or a missing shard; K-DAMAGED; K-KEYS, the index and the shards disagree.
    """
    for name in names:
        if (folder / name).is_file():
            return read_tensor_file(folder / name)
        if (index := folder / (name + INDEX)).is_file():
            return _read_shards(index)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else None
    raise Refusal(
        "K-MISSING", "no weights in the folder", file=folder, found=found or "an empty folder",
        expected=" or ".join(names) + ", or shards with " + INDEX, fix="download the weights too",
    )  # fmt: skip


def _read_shards(index: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        what, fix = "not an index of weight files", DOWNLOAD_AGAIN
        raise Refusal("K-JSON", what, file=index, key="weight_map", found=weight_map, fix=fix)
    folder, files = index.parent, sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise Refusal("K-MISSING", "a shard of the index is missing", file=folder / name, fix=DOWNLOAD_AGAIN)
    single = Path(index.name.removesuffix(INDEX))  # the file name of unsharded weights
    siblings = {p.name for p in folder.glob(f"{single.stem}-*-of-*{single.suffix}")}
    if surplus := sorted(siblings - set(files)):
        what, fix = "a shard that the index does not name", "delete it if it belongs to another download"
        raise Refusal("K-KEYS", what, file=folder / surplus[0], expected=", ".join(files), fix=fix)
    found: dict[str, LazyTensor] = {}
    for name in files:
        for key, tensor in read_tensor_file(folder / name).items():
            if weight_map.get(key) != name:
                raise Refusal(
                    "K-KEYS", "the shard and the index disagree about a tensor", file=folder / name, key=key,
                    found=f"in the index: {weight_map.get(key, 'nowhere')}", fix=DOWNLOAD_AGAIN,
                )  # fmt: skip
            found[key] = tensor
    if missing := sorted(weight_map.keys() - found.keys()):
        what, file = "a tensor of the index is not in its shard", folder / weight_map[missing[0]]
        raise Refusal("K-KEYS", what, file=file, key=missing[0], fix=DOWNLOAD_AGAIN)
    return found


def check_tensors(found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Refuse unless ``found`` has exactly the names and shapes of ``expected``.

    Raises:
        Refusal: K-KEYS, a missing or surplus tensor; K-SHAPE.
    """
    fix = "config.json and weights must come from the same download"
    if missing := sorted(expected.keys() - found.keys()):
        what = f"{len(missing)} of the architecture's {len(expected)} tensors are missing"
        raise Refusal("K-KEYS", what, file=source, key=missing[0], expected=list(expected[missing[0]]), fix=fix)
    if surplus := sorted(found.keys() - expected.keys()):
        what, first = f"{len(surplus)} tensors do not belong to this architecture", found[surplus[0]]
        raise Refusal("K-KEYS", what, file=first.file, key=surplus[0], found=list(first.shape), fix=fix)
    for name, shape in expected.items():
        if (given := found[name].shape) != tuple(shape):
            file, right = found[name].file, list(shape)
            raise Refusal("K-SHAPE", "wrong shape", file=file, key=name, found=list(given), expected=right, fix=fix)
