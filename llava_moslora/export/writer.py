"""Weights of any size, merged and written in bounded memory: row block by row block, never a whole file at once.

A safetensors file is a header with every tensor's place, then the tensors one after the other. Shapes are known before
anything is read, so the header is written first, and memory holds one base tensor and a block of its rows. A shard gets
its final name when it is complete: what a killed export finished is found again by the next one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llava_moslora.adapters.fold import LowRank, merge
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import fsync
from llava_moslora.files.json import write_json

SHARD_BYTES = 2 * 1024**3
BLOCK = 4 * 1024**2  # numbers that are merged at a time
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors spells them


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the export: its name, its shape, how to get it, and how to get what is added to it (folded)."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    update: Callable[[], LowRank] | None = None


@dataclass(frozen=True)
class WeightFiles:
    """One model's weights in an export: ``folder`` inside it ("" is its top), one file or shards named after ``stem``.

    ``total_size`` and ``files`` are known before anything is read.
    """

    folder: str
    tensors: list[PlannedTensor]
    dtype: torch.dtype
    stem: str = "model"

    @property
    def total_size(self) -> int:
        return sum(_size(planned, self.dtype) for planned in self.tensors)

    def files(self) -> dict[str, list[PlannedTensor]]:
        """File name → its tensors, in order; a new shard begins before 2 GB would be passed."""
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


def write_weights(root: Path, all_weights: list[WeightFiles]) -> None:
    """Write all weights below ``root``, with an index beside shards; files that are already there are complete.

    Raises:
        Refusal: E-DISK, the disk is full; what was finished stays for the next call. K-NONFINITE, a tensor would hold
            NaN or Inf.
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
        header[planned.name] = {"dtype": DTYPES[dtype], "shape": list(planned.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for planned in tensors:
                for rows in merged(planned, dtype):
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
            fix="free some space and give the same command again; it goes on where this one stopped",
        ) from error  # fmt: skip
    os.rename(partial, file)


def merged(planned: PlannedTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor in blocks along its first dimension: W + s·B·W_mixer·A in float32, rounded once to ``dtype``.

    Raises:
        Refusal: K-NONFINITE, the tensor would hold NaN or Inf.
    """
    base = planned.read()
    assert tuple(base.shape) == planned.shape, f"{planned.name} was announced as {planned.shape}, is {base.shape}"
    update = None if planned.update is None else planned.update()
    step = max(1, BLOCK // max(1, math.prod(planned.shape[1:])))
    for begin in range(0, len(base), step):
        stored = rows = base[begin : begin + step]
        if update is not None:
            part = LowRank(update.a, None, update.b[begin : begin + step], update.scaling)
            rows = merge(rows.float(), part)
        rounded = rows.to(dtype).contiguous()
        check_finite(planned.name, stored, update, rows, rounded)
        yield rounded


def check_finite(name: str, stored: Tensor, update: LowRank | None, rows: Tensor, rounded: Tensor) -> None:
    """Refuse rows of the tensor ``name`` that hold NaN or Inf, and say where these come from.

    Args:
        stored: the rows as the base (or, of factors that are not merged, the adapter) has them.
        update: what is added to them.
        rows: their sum. rounded: the same in the dtype of the export.

    Raises:
        Refusal: K-NONFINITE
    """
    if rounded.isfinite().all():
        return
    if not stored.isfinite().all():
        where = "in the adapter" if ".lora_" in name else "in the base or the projector"
        found, fix = f"{_not_finite(stored)} {where}", "download the base again, or export an earlier checkpoint"
    elif update is not None and not (update.a.isfinite().all() and update.b.isfinite().all()):
        value = _not_finite(update.a if not update.a.isfinite().all() else update.b)
        found, fix = f"{value} in the adapter", "export an earlier checkpoint, and see metrics.jsonl for where it began"
    elif not rows.isfinite().all():
        found, fix = "an adapter too large to be added in float32", "export an earlier checkpoint"
    else:
        kind = str(rounded.dtype).removeprefix("torch.")
        found = f"{rows.abs().max().item():.4g}, above the {torch.finfo(rounded.dtype).max:.4g} of {kind}"
        fix = f"--dtype {'float32' if rounded.dtype == torch.bfloat16 else 'bfloat16'}"
    raise Refusal("K-NONFINITE", "a tensor is not finite", key=name, found=found, expected="finite numbers", fix=fix)


def _not_finite(tensor: Tensor) -> str:
    """The first value of ``tensor`` that is not finite, as a word."""
    value = tensor[~tensor.isfinite()][0].item()
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
