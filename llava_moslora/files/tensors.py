"""Weights in files: names and shapes without reading them, then one tensor at a time.

Safetensors and torch files (``.bin``, ``.pth``, ``.pt``), single or sharded with an index. Both kinds are mapped into
memory, so a tensor that is read but not changed costs file cache, not memory of the process. Code in a torch file is
never run: ``weights_only=True``, and what a training framework stores beside its weights is read as inert stand-ins.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from llava_moslora.errors import Refusal

# In the order in which transformers looks for them; each may have an index beside it instead.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
AGAIN = "copy or download it again"

# mmengine (XTuner's trainer) stores its log beside the weights: these classes, and NumPy arrays inside them.
LOG_CLASSES = re.compile(
    r"mmengine\.logging\.history_buffer\.HistoryBuffer|numpy\.(ndarray|dtype|dtypes\.\w+)"
    r"|numpy\.(_?core)\.multiarray\.(_reconstruct|scalar)|_codecs\.encode"
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read yet: where it is, its shape, and how to get it (in the file's dtype)."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class _Inert:
    """Stands for an object of a class that is not imported: takes whatever it is given and does nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def held(tensors: Mapping[str, Tensor], source: Path) -> dict[str, LazyTensor]:
    """Tensors in memory as if they were stored in ``source``."""
    return {name: LazyTensor(source, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Refusal: K-MISSING, K-JSON.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refusal("K-MISSING", "no such file", file=file, fix="download it, or check the path") from error
    except OSError as error:
        raise Refusal("K-MISSING", "cannot be read", file=file, found=error.strerror, fix="mend its rights") from error
    except (ValueError, RecursionError) as error:
        raise Refusal("K-JSON", "not JSON", file=file, found=error, fix=AGAIN) from error
    if not isinstance(value, dict):
        raise Refusal("K-JSON", "not a JSON object", file=file, found=type(value).__name__, fix=AGAIN)
    return value


def read_tensor_file(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file by name.

    Raises:
        Refusal: K-MISSING; K-DAMAGED, truncated or not of plain tensors.
    """
    if not file.is_file():
        raise Refusal("K-MISSING", "no such file", file=file, fix=AGAIN)
    if file.suffix != ".safetensors":
        state = {name: t for name, t in _state(file).items() if isinstance(t, Tensor)}
        if not zipfile.is_zipfile(file):  # cannot be mapped: it is in memory already
            return held(state, file)
        return {
            name: LazyTensor(file, tuple(t.shape), lambda name=name: _state(file)[name]) for name, t in state.items()
        }
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Refusal("K-DAMAGED", "not a whole safetensors file", file=file, found=error, fix=AGAIN) from error
    return {name: LazyTensor(file, shape, lambda name=name: _read_one(file, name)) for name, shape in shapes.items()}


def _read_one(file: Path, name: str) -> Tensor:
    """One tensor under a mapping of its own: a mapping that is shared keeps every page that was ever touched."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _state(file: Path) -> dict[str, Any]:
    """The name → tensor part of a torch file: itself, or behind ``state_dict`` (mmengine) or ``module`` (DeepSpeed)."""
    try:
        content = _load(file)
    except Exception as error:  # torch raises five different types for a damaged or a code-carrying file
        raise Refusal(
            "K-DAMAGED",
            "cannot be read as plain tensors (a pickle that carries code is never run)",
            file=file,
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="copy it again, or re-save its tensors as safetensors",
        ) from error
    for wrapper in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            return content[wrapper]
    if not isinstance(content, dict):
        what = "not a dictionary of tensors"
        raise Refusal("K-DAMAGED", what, file=file, found=type(content).__name__, fix="give a state dictionary")
    return content


def _load(file: Path) -> Any:
    mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote another container, which cannot be mapped
    unsafe = get_unsafe_globals_in_checkpoint(file) if mapped else []
    if not unsafe or not all(LOG_CLASSES.fullmatch(name) for name in unsafe):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    with safe_globals([_Inert, *((_Inert, name) for name in unsafe)]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def read_tensor_folder(folder: Path, names: Iterable[str] = WEIGHT_FILES) -> dict[str, LazyTensor]:
    """The tensors of a folder that holds one of ``names``, or its shards with an index.

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
        what = "not an index of weight files"
        raise Refusal("K-JSON", what, file=index, key="weight_map", found=weight_map, fix=AGAIN)
    folder, files = index.parent, sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise Refusal("K-MISSING", "a shard of the index is not there", file=folder / name, fix=AGAIN)
    stem, kind = re.fullmatch(r"(.+)(\.\w+)", index.name.removesuffix(INDEX)).groups()
    siblings = {p.name for p in folder.glob(f"{stem}-*-of-*{kind}")}
    if surplus := sorted(siblings - set(files)):
        what, fix = "a shard that the index does not name", "delete it if it is left over from another download"
        raise Refusal("K-KEYS", what, file=folder / surplus[0], expected=", ".join(files), fix=fix)
    found: dict[str, LazyTensor] = {}
    for name in files:
        for key, stored in read_tensor_file(folder / name).items():
            if weight_map.get(key) != name:
                what = "the shard and the index disagree about a tensor"
                where = weight_map.get(key, "nowhere")
                raise Refusal("K-KEYS", what, file=folder / name, key=key, found=f"in the index: {where}", fix=AGAIN)
            found[key] = stored
    if missing := sorted(weight_map.keys() - found.keys()):
        file = folder / weight_map[missing[0]]
        raise Refusal("K-KEYS", "a tensor of the index is not in its shard", file=file, key=missing[0], fix=AGAIN)
    return found


def check_tensors(found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Refuse unless ``found`` has exactly the names and shapes of ``expected``.

    Raises:
        Refusal: K-KEYS, a missing or surplus tensor; K-SHAPE.
    """
    if missing := sorted(expected.keys() - found.keys()):
        what = f"{len(missing)} of the architecture's {len(expected)} tensors are missing"
        shape, fix = list(expected[missing[0]]), "config.json and weights must come from the same download"
        raise Refusal("K-KEYS", what, file=source, key=missing[0], expected=shape, fix=fix)
    if surplus := sorted(found.keys() - expected.keys()):
        what = f"{len(surplus)} tensors do not belong to this architecture"
        stored, fix = found[surplus[0]], "config.json and weights must come from the same download"
        raise Refusal("K-KEYS", what, file=stored.file, key=surplus[0], found=list(stored.shape), fix=fix)
    for name, shape in expected.items():
        if (given := found[name].shape) != tuple(shape):
            fix = "config.json and weights must come from the same download"
            where = {"file": found[name].file, "key": name}
            raise Refusal("K-SHAPE", "wrong shape", **where, found=list(given), expected=list(shape), fix=fix)
