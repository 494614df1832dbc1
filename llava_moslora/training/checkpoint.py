"""The tensors of a checkpoint: written whole and in float32, and read back only if they are what this run trains."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import ADAPTER_NAME, PROJECTOR
from llava_moslora.runs.manifest import write_json
from llava_moslora.training.state import MOMENTS, trained_parameters

ADAPTER_FILE, PROJECTOR_FILE = "adapter/adapter_model.safetensors", "projector/model.safetensors"
MOMENTS_FILE, POSITION_FILE = "optimizer.safetensors", "position.json"


def write_trained(folder: Path, model, masters: dict[str, Tensor]) -> None:
    """The trained tensors: one adapter over the whole model with the projector in it, or in stage 1 the projector."""
    if isinstance(model, PeftModel):
        model.save_pretrained((folder / ADAPTER_FILE).parent, state_dict=masters, selected_adapters=[ADAPTER_NAME])
        return
    names = {name: "multi_modal_projector." + name.removeprefix(PROJECTOR + ".") for name in masters}
    (folder / PROJECTOR_FILE).parent.mkdir()
    save_file(
        {names[name]: tensor for name, tensor in masters.items()}, folder / PROJECTOR_FILE, metadata={"format": "pt"}
    )


def write_optimizer(folder: Path, moments: dict[str, Tensor], position: dict) -> None:
    """Adam's moments, and where Adam, the schedule and the loss scale are."""
    save_file(moments, folder / MOMENTS_FILE, metadata={"format": "pt"})
    write_json(folder / POSITION_FILE, position)


def read_trained(checkpoint: Path, model) -> dict[str, Tensor]:
    """The float32 masters of a checkpoint by the names of ``model``'s parameters.

    Raises:
        Refusal: K-TENSOR: tensors missing or left over, such as an adapter of other targets; another shape or dtype;
            a number that is not finite.
    """
    adapted = isinstance(model, PeftModel)
    file = checkpoint / (ADAPTER_FILE if adapted else PROJECTOR_FILE)
    saved = {name: live_to_saved(name) for name in trained_parameters(model)}
    if not adapted:
        saved = {name: other.removeprefix("model.") for name, other in saved.items()}
    shapes = shapes_of(model)
    stored = _read(file, {other: shapes[name] for name, other in saved.items()})
    return {name: stored[other] for name, other in saved.items()}


def read_optimizer(checkpoint: Path, model) -> tuple[dict[str, Tensor], dict]:
    """``NAME.exp_avg`` and ``NAME.exp_avg_sq`` of every trained parameter, and the position.

    Raises:
        Refusal: K-TENSOR, as :func:`read_trained`.
    """
    wanted = {f"{name}.{key}": shape for name, shape in shapes_of(model).items() for key in MOMENTS}
    moments = _read(checkpoint / MOMENTS_FILE, wanted)
    return moments, json.loads((checkpoint / POSITION_FILE).read_text(encoding="utf-8"))


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """Of the trained parameters, also of those that ZeRO-3 holds as empty shards."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained_parameters(model).items()}


def live_to_saved(name: str) -> str:
    """PEFT's name of a trained tensor in a file, from its name in the live model."""
    return name.replace(f".modules_to_save.{ADAPTER_NAME}", "").replace(f".{ADAPTER_NAME}.", ".")


def _read(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if not file.is_file():
        raise _refusal(file, "no such file in the checkpoint")
    stored = load_file(file)
    if differing := sorted(set(shapes) ^ set(stored)):
        raise _refusal(file, "not the tensors that this run trains", found=", ".join(differing[:4]))
    for name, tensor in stored.items():
        if tuple(tensor.shape) != shapes[name]:
            raise _refusal(
                file, "a tensor of another shape", key=name, found=list(tensor.shape), expected=list(shapes[name])
            )
        if tensor.dtype != torch.float32:
            raise _refusal(file, "a tensor of another dtype", key=name, found=tensor.dtype, expected="torch.float32")
        if not torch.isfinite(tensor).all():
            raise _refusal(file, "numbers that are not finite", key=name, fix="resume from an older checkpoint")
    return stored


def _refusal(file: Path, what: str, fix: str = "resume with the flags of the run", **parts) -> Refusal:
    return Refusal("K-TENSOR", what, file=file, fix=fix, **parts)
