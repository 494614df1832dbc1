"""Writes the weight files of an export, of any size in bounded memory, and ``config.json``.

A safetensors file is a header with every tensor's offsets, then the tensors. Shapes are known before anything is read,
so the header is written first, and memory holds one base tensor and a block of its rows. A shard gets its final name
when it is complete: an export that was killed continues with the first one that is missing.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from llava_moslora.adapters.fold import Update
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import fsync, read_json, write_json
from llava_moslora.files.tensors import LazyTensor, in_memory
from llava_moslora.models.llm import with_old_rope
from llava_moslora.models.names import adapter_tensor

SHARD_BYTES = 2 * 1024**3
BLOCK = 4 * 1024**2  # elements merged at a time
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in a safetensors header


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the export: its name, the base's tensor, and the adapter that is merged into it."""

    name: str
    tensor: LazyTensor
    update: Update | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one model: in ``folder`` of the export ("" is its top), as ``stem.safetensors`` or its shards.

    ``total_size`` (bytes) and ``files`` are known before anything is read.
    """

    folder: str
    tensors: list[PlannedTensor]
    dtype: torch.dtype
    stem: str = "model"

    @property
    def total_size(self) -> int:
        return sum(_size(planned, self.dtype) for planned in self.tensors)

    def files(self) -> dict[str, list[PlannedTensor]]:
        """File name → its tensors, in order; a new shard begins before one would exceed :data:`SHARD_BYTES`."""
        shards: list[list[PlannedTensor]] = [[]]
        filled = 0
        for planned in self.tensors:
            size = _size(planned, self.dtype)
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(planned)
            filled += size
        if len(shards) == 1:
            return {f"{self.stem}.safetensors": shards[0]}
        return {f"{self.stem}-{k:05d}-of-{len(shards):05d}.safetensors": s for k, s in enumerate(shards, start=1)}


def plan_tensors(tensors: Mapping[str, Tensor]) -> list[PlannedTensor]:
    """Tensors in memory, exported unchanged."""
    return [PlannedTensor(name, tensor) for name, tensor in in_memory(tensors, Path()).items()]


def renamed(tensors: Iterable[PlannedTensor], *prefixes: tuple[str, str]) -> list[PlannedTensor]:
    """The tensors with the first matching prefix (old, new) in their names replaced."""
    result = []
    for planned in tensors:
        old, new = next(pair for pair in prefixes if planned.name.startswith(pair[0]))
        result.append(replace(planned, name=new + planned.name[len(old) :]))
    return result


def write_weights(root: Path, all_weights: list[WeightFiles]) -> None:
    """Write all weights below ``root``, with an index next to shards; files that exist are complete and are skipped.

    Raises:
        Refusal: E-DISK, the disk is full; finished files stay for the next call. K-NONFINITE, a tensor would hold NaN
            or Inf.
    """
    total = sum(weights.total_size for weights in all_weights)
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", dynamic_ncols=True) as bar:
        for weights in all_weights:
            folder = root / weights.folder
            folder.mkdir(parents=True, exist_ok=True)
            files = weights.files()
            for name, tensors in files.items():
                if (folder / name).is_file():
                    bar.update(sum(_size(planned, weights.dtype) for planned in tensors))
                else:
                    _write_file(folder / name, tensors, weights.dtype, bar)
            if len(files) > 1:
                index = {
                    "metadata": {"total_size": weights.total_size},
                    "weight_map": {planned.name: name for name, tensors in files.items() for planned in tensors},
                }
                write_json(folder / f"{weights.stem}.safetensors.index.json", index)


def _size(planned: PlannedTensor, dtype: torch.dtype) -> int:
    return math.prod(planned.shape) * dtype.itemsize


def _write_file(file: Path, tensors: list[PlannedTensor], dtype: torch.dtype, bar: tqdm) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for planned in tensors:
        begin, end = end, end + _size(planned, dtype)
        header[planned.name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(planned.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for planned in tensors:
                for rows in merged_blocks(planned, dtype):
                    out.write(rows.reshape(-1).view(torch.uint8).numpy())
                    bar.update(rows.nbytes)
            out.flush()
        fsync(partial)
    except Refusal:
        partial.unlink(missing_ok=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        partial.unlink(missing_ok=True)
        raise Refusal(
            "E-DISK", "the disk is full", file=file, found=error.strerror,
            fix="free space and start the same command again; it continues where this one stopped",
        ) from error  # fmt: skip
    os.rename(partial, file)


def merged_blocks(planned: PlannedTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor in blocks of its first dimension: with its adapter, in float32, rounded once to ``dtype``.

    Raises:
        Refusal: K-NONFINITE, the tensor would hold NaN or Inf.
    """
    base, update = planned.tensor.read(), planned.update
    assert tuple(base.shape) == planned.shape, f"{planned.name} was planned as {planned.shape}, is {base.shape}"
    step = max(1, BLOCK // max(1, math.prod(planned.shape[1:])))
    for begin in range(0, len(base), step):
        stored = rows = base[begin : begin + step]
        if update is not None:
            rows = update.merged_rows(rows, begin).float()
        rounded = rows.to(dtype).contiguous()
        check_finite(planned.name, stored, update, rows, rounded)
        yield rounded


def check_finite(name: str, stored: Tensor, update: Update | None, rows: Tensor, rounded: Tensor) -> None:
    """Refuse (K-NONFINITE) rows of the tensor ``name`` with NaN or Inf, and name their origin.

    Args:
        stored: the rows of the base, or of an adapter that is not merged. update: the adapter merged into them.
        rows: merged, in float32. rounded: the same in the dtype of the export.
    """
    if rounded.isfinite().all():
        return
    if not stored.isfinite().all():
        where = "in the adapter" if adapter_tensor(f"{name}.") else "in the base or the projector"
        found, fix = f"{_not_finite(stored)} {where}", "download the base again, or export an earlier checkpoint"
    elif factors := [value for t in (update.tensors if update else {}).values() if (value := _not_finite(t.read()))]:
        found = f"{factors[0]} in the adapter"
        fix = "export an earlier checkpoint, and see metrics.jsonl for the first such step"
    elif not rows.isfinite().all():
        found, fix = "an adapter that overflows float32 when added", "export an earlier checkpoint"
    else:
        kind = str(rounded.dtype).removeprefix("torch.")
        found = f"{rows.abs().max().item():.4g}, above the {torch.finfo(rounded.dtype).max:.4g} of {kind}"
        fix = f"--dtype {'float32' if rounded.dtype == torch.bfloat16 else 'bfloat16'}"
    raise Refusal("K-NONFINITE", "a tensor is not finite", key=name, found=found, expected="finite numbers", fix=fix)


def _not_finite(tensor: Tensor) -> str:
    """The first value of ``tensor`` that is not finite: NaN, Inf or -Inf; "" if all are."""
    values = tensor[~tensor.isfinite()]
    if not len(values):
        return ""
    return "NaN" if values[0].isnan() else "Inf" if values[0] > 0 else "-Inf"


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """``config.json``, with the rotary settings also where older readers look for them."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    file = folder / "config.json"
    stored = read_json(file)
    if "text_config" in stored:
        stored["text_config"] = with_old_rope(stored["text_config"])
    write_json(file, with_old_rope(stored))


def known_to_transformers_4(folder: Path) -> None:
    """Set the tokenizer's class name for transformers 4 and 5, and its model inputs.

    Without the input names transformers 4 also returns ``token_type_ids``, which ``generate`` refuses.
    """
    file = folder / "tokenizer_config.json"
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(file, read_json(file) | known)
