"""The tensors of a checkpoint: written unpartitioned, and loaded only if they match exactly what this run trains."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json, write_json
from llava_moslora.files.tensors import save_tensors
from llava_moslora.models.names import ADAPTER_NAME, standalone_name
from llava_moslora.training.optimizer_state import SCALAR_DTYPE, frozen_factors, trained_parameters

ADAPTER_FILE, PROJECTOR_FILE = "adapter/adapter_model.safetensors", "projector/model.safetensors"
OPTIMIZER_FILE, POSITION_FILE = "optimizer.safetensors", "position.json"

FIRST_FORMAT = "adam_steps"  # a key of position.json in checkpoints of the first versions


def write_trained(folder: Path, model, masters: dict[str, Tensor]) -> None:
    """The trained tensors and the frozen factors: one adapter over the whole model, the projector included; in stage 1
    the projector alone."""
    if isinstance(model, PeftModel):
        place, what = (folder / ADAPTER_FILE).parent, [ADAPTER_NAME]
        model.save_pretrained(place, state_dict=masters, selected_adapters=what, save_embedding_layers=False)
        return
    names = {name: f"multi_modal_projector.{standalone_name(name)}" for name in masters}
    (folder / PROJECTOR_FILE).parent.mkdir()
    save_tensors({names[name]: tensor for name, tensor in masters.items()}, folder / PROJECTOR_FILE)


def write_optimizer(folder: Path, model, state: dict[str, Tensor], position: dict) -> None:
    """The optimizer's state, and the position of the learning rate schedule and the loss scale.

    Args:
        state: :meth:`llava_moslora.training.optimizer_state.TrainState.optimizer_state`.
    """
    not_stepped = [name for name in trained_parameters(model) if not any(k.startswith(name + ".") for k in state)]
    save_tensors(state, folder / OPTIMIZER_FILE)
    write_json(folder / POSITION_FILE, position | {"not_stepped": not_stepped})


def read_trained(checkpoint: Path, model) -> dict[str, Tensor]:
    """The float32 master weights of a checkpoint by the names of ``model``'s parameters.

    The first versions saved no frozen mixers: from their checkpoints none are read, and those of ``model``, which are
    drawn from the run's seed, are the same.

    Raises:
        Refusal: K-TENSOR: tensors are missing or unexpected, such as those of an adapter with other targets; another
            shape or dtype; a number that is not finite.
    """
    adapted = isinstance(model, PeftModel)
    file = checkpoint / (ADAPTER_FILE if adapted else PROJECTOR_FILE)
    expected = trained_parameters(model) | ({} if FIRST_FORMAT in _position(checkpoint) else frozen_factors(model))
    saved = saved_names(model, expected) if adapted else {name: name.removeprefix("model.") for name in expected}
    shapes = shapes_of(model)
    stored = _read(file, {other: (shapes[name], torch.float32) for name, other in saved.items()})
    return {name: stored[other] for name, other in saved.items()}


def read_optimizer(checkpoint: Path, created: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """The optimizer's state in a checkpoint, and the position.

    Args:
        created: the state as this run's optimizer creates it: ``NAME.KEY``, of which shapes and dtypes are compared.

    Raises:
        Refusal: K-TENSOR, as :func:`read_trained`.
    """
    position = _position(checkpoint)
    not_stepped = tuple(name + "." for name in position.get("not_stepped", []))
    wanted = {k: (tuple(t.shape), t.dtype) for k, t in created.items() if not k.startswith(not_stepped)}
    if FIRST_FORMAT not in position:
        return _read(checkpoint / OPTIMIZER_FILE, wanted), position
    # there was only Adam, with one step count for all parameters
    counts = [key for key in wanted if key.endswith(".step")]
    moments = _read(checkpoint / OPTIMIZER_FILE, {k: v for k, v in wanted.items() if k not in counts})
    return moments | dict.fromkeys(counts, torch.tensor(float(position[FIRST_FORMAT]), dtype=SCALAR_DTYPE)), position


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """Of the trained parameters and the frozen factors, also of those that ZeRO-3 holds as empty shards."""
    parameters = trained_parameters(model) | frozen_factors(model)
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}


def saved_names(model: PeftModel, names: Iterable[str]) -> dict[str, str]:
    """Names of tensors in the model → PEFT's names in a file; PEFT's rules differ between methods.

    PEFT's own function is called with a number in place of each tensor.
    """
    asked = {name: torch.tensor(number) for number, name in enumerate(names)}
    saved = get_peft_model_state_dict(model, asked, ADAPTER_NAME, save_embedding_layers=False)
    names_by_number = list(asked)
    result = {names_by_number[int(number)]: other for other, number in saved.items()}
    assert result.keys() == asked.keys(), "PEFT leaves a tensor of this run out of its file"
    return result


def _position(checkpoint: Path) -> dict:
    return read_json(checkpoint / POSITION_FILE)


def _read(file: Path, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    if not file.is_file():
        raise _refusal(file, "no such file in the checkpoint")
    stored = load_file(file)
    if differing := sorted(set(wanted) ^ set(stored)):
        raise _refusal(file, "not the tensors that this run trains", found=", ".join(differing[:4]))
    for name, tensor in stored.items():
        shape, dtype = wanted[name]
        if tuple(tensor.shape) != shape:
            raise _refusal(file, "a tensor of another shape", key=name, found=list(tensor.shape), expected=list(shape))
        if tensor.dtype != dtype:
            raise _refusal(file, "a tensor of another dtype", key=name, found=tensor.dtype, expected=str(dtype))
        if not torch.isfinite(tensor).all():
            raise _refusal(file, "values that are not finite", key=name, fix="resume from an older checkpoint")
    return stored


def _refusal(file: Path, what: str, fix: str = "resume with the flags of the run", **parts) -> Refusal:
    return Refusal("K-TENSOR", what, file=file, fix=fix, **parts)


def set_scheduler_step(scheduler, steps: int) -> None:
    """Set a LambdaLR, or accelerate's wrapper of one, to its state after ``steps`` steps."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
