"""Reads the projector, ``linear_2(gelu(linear_1(features)))`` from vision width to LLM width.

Its two linear layers are published under several names: ``0``/``2`` or ``linear_1``/``linear_2`` after one of
:data:`PREFIXES`. A file without them is refused: a model with a random projector would ignore images.

Shapes: E vision width, D LLM width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import LazyTensor, read_tensor_file
from llava_moslora.models import llava_folder
from llava_moslora.models.config_file import read_model_config

_SEQUENTIAL = ("0", "2")
_NAMED = ("linear_1", "linear_2")
PREFIXES: dict[str, tuple[str, str]] = {  # prefix in the file → the names of the two linear layers after it
    "projector.model.": _SEQUENTIAL,  # XTuner, pretraining checkpoint
    "model.mm_projector.": _SEQUENTIAL,  # LLaVA, mm_projector.bin
    "base_model.model.model.mm_projector.": _SEQUENTIAL,  # LLaVA, non_lora_trainables.bin
    "mm_projector.": _SEQUENTIAL,
    "model.multi_modal_projector.": _NAMED,
    "multi_modal_projector.": _NAMED,  # transformers
    "model.": _SEQUENTIAL,  # XTuner, projector folder
    "": _SEQUENTIAL,
}
KEYS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"  # under DeepSpeed, XTuner's iter_N.pth is a folder that holds this
FILE_NAMES = (
    *("model.safetensors", "projector.safetensors", "mm_projector.bin", "pytorch_model.bin"),
    *("non_lora_trainables.bin", DEEPSPEED_FILE),
)
# Allowed values of these fields in the config.json next to a projector: XTuner's and LLaVA's.
XTUNER_FIELDS = {"depth": (2,), "hidden_act": ("gelu",), "bias": (True,)}
LLAVA_FIELDS = {"mm_projector_type": ("mlp2x_gelu",)}


def read_projector(path: str | Path, vision_width: int, llm_width: int) -> dict[str, Tensor]:
    """The projector's four tensors under transformers' names (:data:`KEYS`), in the file's dtype.

    Args:
        path: a ``.safetensors`` / ``.bin`` / ``.pth`` / ``.pt`` file, a folder that holds one of :data:`FILE_NAMES`, or
            a complete LLaVA (:mod:`llava_moslora.models.llava_folder`).
        vision_width: E, the vision tower's hidden size.
        llm_width: D, the LLM's hidden size.

    Returns:
        ``linear_1.weight`` [D, E], ``linear_1.bias`` [D], ``linear_2.weight`` [D, D], ``linear_2.bias`` [D].

    Raises:
        Refusal: C-PATH, no such file; K-DAMAGED; K-PROJECTOR, unknown layout or function; K-SHAPE; K-FINITE.
    """
    file, stored, names = _open_projector(path, vision_width, llm_width)
    found = {here: stored[there].read() for here, there in names.items()}
    for key, tensor in found.items():
        if not torch.isfinite(tensor).all():
            fix = "use another checkpoint"
            raise Refusal("K-FINITE", "NaN or Inf in the projector", file=file, key=names[key], fix=fix)
    return found


def check_projector(path: str | Path, vision_width: int, llm_width: int) -> None:
    """Refuse what :func:`read_projector` would, but for K-FINITE, from names and shapes alone."""
    _open_projector(path, vision_width, llm_width)


def _open_projector(
    path: str | Path, vision_width: int, llm_width: int
) -> tuple[Path, dict[str, LazyTensor], dict[str, str]]:
    """The file, its tensors, and its name of each of :data:`KEYS`."""
    path = Path(path)
    # LLaVA's training also writes its configuration next to a projector, without the rest of the model.
    alone = any((path / name).is_file() for name in ("mm_projector.bin", "non_lora_trainables.bin"))
    if llava_folder.is_llava_folder(path) and not alone:
        llava_folder.check_format(path)
        file, stored = path, llava_folder.read_tensors(path).projector
    else:
        file = _projector_file(path)
        _check_config(file.parent / "config.json", vision_width, llm_width)
        stored = read_tensor_file(file)
    names = _find_names(file, stored)
    _check_shapes(file, stored, names, vision_width, llm_width)
    return file, stored, names


def _find_names(file: Path, stored: dict[str, LazyTensor]) -> dict[str, str]:
    """The name in the file of each of :data:`KEYS`."""
    for prefix, linears in PREFIXES.items():
        names = {
            f"{here}.{part}": f"{prefix}{there}.{part}"
            for there, here in zip(linears, _NAMED, strict=True)
            for part in ("weight", "bias")
        }
        if names["linear_1.weight"] not in stored:
            continue
        own = prefix + linears[0][:-1] if prefix else None
        missing = sorted(set(names.values()) - set(stored))
        extra = sorted(key for key in stored if own and key.startswith(own) and key not in names.values())
        if missing or extra:
            raise Refusal(
                "K-PROJECTOR", "not a two-layer projector with biases", file=file, key=(missing or extra)[0],
                found="missing " + ", ".join(missing) if missing else "unexpected " + ", ".join(extra),
                expected=", ".join(names.values()), fix="give a two-layer MLP projector (mlp2x_gelu)",
            )  # fmt: skip
        return names
    raise Refusal(
        "K-PROJECTOR", "no projector in this file", file=file,
        found=", ".join(sorted(stored)[:4]) + (" …" if len(stored) > 4 else "") if stored else "an empty file",
        expected="linear layers under one of the prefixes " + ", ".join(repr(p) for p in PREFIXES),
        fix="give the pretrained projector: LLaVA's mm_projector.bin, an XTuner projector folder or .pth, an export",
    )  # fmt: skip


def _check_config(file: Path, vision_width: int, llm_width: int) -> None:
    """Refuse a projector whose ``config.json`` describes a different function, vision tower or LLM."""
    if not file.is_file() or file.stat().st_size == 0:  # XTuner publishes some that are empty
        return
    raw = read_model_config(file)
    fields: dict[str, tuple] = dict(LLAVA_FIELDS)
    if raw.get("model_type") == "projector":
        fields |= XTUNER_FIELDS | {"visual_hidden_size": (vision_width,), "llm_hidden_size": (llm_width,)}
    for key, allowed in fields.items():
        if key in raw and raw[key] not in allowed:
            raise Refusal(
                "K-PROJECTOR", "not a projector for this vision tower and this LLM", file=file, key=key, found=raw[key],
                expected=allowed[0], fix="give a two-layer GELU projector with biases that was pretrained for them",
            )  # fmt: skip


def _check_shapes(
    file: Path, stored: dict[str, LazyTensor], names: dict[str, str], vision_width: int, llm_width: int
) -> None:
    shapes = [(llm_width, vision_width), (llm_width,), (llm_width, llm_width), (llm_width,)]
    for key, shape in zip(KEYS, shapes, strict=True):
        if (found := stored[names[key]].shape) != shape:
            raise Refusal(
                "K-SHAPE", "the projector belongs to another vision tower or LLM", file=file, key=names[key],
                found=list(found), expected=f"{list(shape)} (vision width {vision_width}, LLM width {llm_width})",
                fix="give the projector that was pretrained with this vision tower and this LLM",
            )  # fmt: skip


def _projector_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        if next(path.glob("zero_pp_rank_*_model_states.pt"), None):
            raise Refusal(
                "K-PROJECTOR", "DeepSpeed's ZeRO-3 folder contains partitioned tensors", file=path,
                fix="merge them with the zero_to_fp32.py next to it, and give the result",
            )  # fmt: skip
        raise Refusal(
            "C-PATH", "no projector file in this folder", file=path, key="--pretrain_mm_mlp_adapter",
            found=", ".join(sorted(p.name for p in path.iterdir())[:6]) or "an empty folder",
            expected="one of " + ", ".join(FILE_NAMES), fix="give the file itself",
        )  # fmt: skip
    raise Refusal("C-PATH", "no such file or folder", file=path, key="--pretrain_mm_mlp_adapter", fix="check the path")
