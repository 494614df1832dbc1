"""The projector: ``linear_2(gelu(linear_1(features)))`` from vision width to LLM width, read from any published layout.

The same two linears are published under several names; :data:`LAYOUTS` lists the prefixes under which ``0``/``2`` or
``linear_1``/``linear_2`` are found. A file in which nothing matches is refused: loading it "successfully" as nothing is
how users end up with a model that ignores pictures.

Shapes: E vision width, D LLM width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_moslora.errors import Refusal

# prefix in the file -> the names of the two linears behind it
_SEQUENTIAL = ("0", "2")
_NAMED = ("linear_1", "linear_2")
LAYOUTS: dict[str, tuple[str, str]] = {
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
FILE_NAMES = ("model.safetensors", "projector.safetensors", "mm_projector.bin", "pytorch_model.bin")


def read_projector(path: str | Path, vision_width: int, llm_width: int) -> dict[str, Tensor]:
    """The projector's four tensors under transformers' names (:data:`KEYS`), in the file's dtype.

    Args:
        path: a ``.safetensors`` / ``.bin`` / ``.pth`` / ``.pt`` file, or a folder that holds one of :data:`FILE_NAMES`.
        vision_width: E, the vision tower's hidden size.
        llm_width: D, the LLM's hidden size.

    Returns:
        ``linear_1.weight`` [D, E], ``linear_1.bias`` [D], ``linear_2.weight`` [D, D], ``linear_2.bias`` [D].

    Raises:
        Refusal: no such file, not readable without running code, no known layout, or other shapes.
    """
    file = _projector_file(Path(path))
    tensors = _read_tensors(file)
    for prefix, linears in LAYOUTS.items():
        names = {
            f"{prefix}{there}.{part}": f"{here}.{part}"
            for there, here in zip(linears, _NAMED, strict=True)
            for part in ("weight", "bias")
        }
        if f"{prefix}{linears[0]}.weight" not in tensors:
            continue
        missing = sorted(set(names) - set(tensors))
        extra = (
            sorted(k for k in tensors if k.startswith(prefix + linears[0][:-1]) and k not in names) if prefix else []
        )
        if missing or extra:
            raise Refusal(
                "K-PROJECTOR",
                "not a two-layer projector with biases",
                file=file,
                key=(missing or extra)[0],
                found="missing " + ", ".join(missing) if missing else "unexpected " + ", ".join(extra),
                expected=", ".join(names),
                fix="give a two-layer MLP projector (mlp2x_gelu)",
            )
        found = {here: tensors[there] for there, here in names.items()}
        _check_shapes(file, found, {here: there for there, here in names.items()}, vision_width, llm_width)
        return found
    raise Refusal(
        "K-PROJECTOR",
        "no projector in this file",
        file=file,
        found=", ".join(sorted(tensors)[:4]) + (" …" if len(tensors) > 4 else "") if tensors else "an empty file",
        expected="linears under one of the prefixes " + ", ".join(repr(p) for p in LAYOUTS),
        fix="give the pretrained projector: LLaVA's mm_projector.bin, an XTuner projector folder or .pth, an export",
    )


def _check_shapes(
    file: Path, found: dict[str, Tensor], names: dict[str, str], vision_width: int, llm_width: int
) -> None:
    expected = dict(
        zip(KEYS, [(llm_width, vision_width), (llm_width,), (llm_width, llm_width), (llm_width,)], strict=True)
    )
    for key, shape in expected.items():
        if tuple(found[key].shape) != shape:
            raise Refusal(
                "K-SHAPE",
                "the projector was made for other towers",
                file=file,
                key=names[key],
                found=list(found[key].shape),
                expected=f"{list(shape)} (vision width {vision_width}, LLM width {llm_width})",
                fix="give the projector that was pretrained with this vision tower and this LLM",
            )
        if not torch.isfinite(found[key]).all():
            raise Refusal(
                "K-FINITE", "NaN or Inf in the projector", file=file, key=names[key], fix="use another checkpoint"
            )


def _projector_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise Refusal(
            "C-PATH",
            "no projector file in this folder",
            file=path,
            key="--pretrain_mm_mlp_adapter",
            found=", ".join(sorted(p.name for p in path.iterdir())[:6]) or "an empty folder",
            expected="one of " + ", ".join(FILE_NAMES),
        )
    raise Refusal("C-PATH", "no such file or folder", file=path, key="--pretrain_mm_mlp_adapter", fix="check the path")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (safe_open is no dict)
        except SafetensorError as error:
            raise Refusal(
                "K-FILE", "not a whole safetensors file", file=file, found=error, fix="copy or download it again"
            ) from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises five different types for a damaged or a code-carrying file
        raise Refusal(
            "K-FILE",
            "cannot be read as plain tensors (a pickle that carries code is never run)",
            file=file,
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="copy it again, or re-save its tensors as safetensors",
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}
