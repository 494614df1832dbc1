"""The parts of transformers, accelerate, PEFT and DeepSpeed that this package overrides, calls or replaces although
they are not public API: :func:`check_private_api` refuses to go on with a version in which one of them has changed.

An override of a method that the library has renamed, or no longer calls, is not an error in Python: the check for NaN
would just never run again. So a method must exist with the parameters listed here, and the class that is named as its
caller must still call it; an attribute must still be used by the code of its owner.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from importlib import metadata
from types import CodeType
from typing import Any, NamedTuple

from llava_moslora.errors import Refusal

SUPPORTED = {"transformers": ">=5.17,<6", "accelerate": ">=1.15", "peft": ">=0.21,<0.23", "deepspeed": ">=0.19.8,<0.20"}
TESTED = {"transformers": "5.23.0", "accelerate": "1.15.0", "peft": "0.21.2", "deepspeed": "0.19.8"}


class Part(NamedTuple):
    """A method or an attribute inside a library.

    Args:
        owner: ``module:Class``, or a module.
        name: of the method or attribute.
        parameters: the names of the method's parameters without ``self``, in order. The method may have others with a
            default; after ``*`` any others; a wrapper that takes anything passes. None for an attribute, which code of
            the owner or its bases must use.
        caller: ``module:Class`` whose methods must call it; None where this package does, and would fail without it.
    """

    owner: str
    name: str
    parameters: str | None = None
    caller: str | None = None


TRAINER = "transformers.trainer:Trainer"
CHECKPOINTED_LAYER = "transformers.modeling_layers:GradientCheckpointingLayer"
VARIANT, LORA, LORA_LINEAR = (f"peft.tuners.lora.layer:{name}" for name in ("LoraVariant", "LoraLayer", "Linear"))
TUNER_LAYER = "peft.tuners.tuners_utils:BaseTunerLayer"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
ZERO_1_2, ZERO_3 = (
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
)
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"  # ZeRO-1 with float32 gradients
STAGE_0 = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"  # in 16 bits, bf16 included
LOSS_SCALER = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"
PARTITIONED = "deepspeed.runtime.zero.partition_parameters"

# By the module that relies on them, which calls check_private_api with this name.
PARTS = {
    "training.trainer": (
        Part(TRAINER, "get_train_dataloader", "", TRAINER),
        Part(TRAINER, "create_optimizer", "model", TRAINER),
        Part(TRAINER, "get_optimizer_cls_and_kwargs", "args model"),
        Part(TRAINER, "get_batch_samples", "epoch_iterator num_batches device", TRAINER),
        Part(TRAINER, "_get_num_items_in_batch", "batch_samples device", TRAINER),
        Part(TRAINER, "_prepare_input", "data", TRAINER),
        Part(TRAINER, "floating_point_ops", "inputs", TRAINER),
        Part(TRAINER, "training_step", "model inputs num_items_in_batch", TRAINER),
        Part(TRAINER, "compute_loss", "model inputs return_outputs num_items_in_batch", TRAINER),
        Part(TRAINER, "model_accepts_loss_kwargs"),
        Part(TRAINER, "_clip_grad_norm", "model", TRAINER),
        Part(TRAINER, "_get_grad_norm", "model grad_norm", TRAINER),
        Part(TRAINER, "log", "logs start_time", TRAINER),
        Part(TRAINER, "_save_checkpoint", "model trial", TRAINER),
        Part(TRAINER, "_prepare_for_training", "max_steps train_dataloader resume_from_checkpoint", TRAINER),
        Part(TRAINER, "_run_epoch", "model epoch train_dataloader *", TRAINER),
        Part(TRAINER, "_load_from_checkpoint", "resume_from_checkpoint model", TRAINER),
        Part(TRAINER, "_load_rng_state", "checkpoint", TRAINER),
    ),
    "recompute": (
        Part(CHECKPOINTED_LAYER, "gradient_checkpointing"),
        Part(CHECKPOINTED_LAYER, "_gradient_checkpointing_func"),
    ),
    "adapters.layers": (
        Part(VARIANT, "init", "module adapter_name", LORA),
        Part(VARIANT, "forward", "module active_adapter x result", LORA_LINEAR),
        Part(VARIANT, "merge_safe", "module active_adapter orig_weight", LORA_LINEAR),
        Part(VARIANT, "merge_unsafe", "module active_adapter orig_weight", LORA_LINEAR),
        Part(VARIANT, "unmerge", "module active_adapter orig_weight", LORA_LINEAR),
        Part(LORA, "resolve_lora_variant", "config", LORA),
        Part(LORA, "update_layer", "adapter_name r lora_alpha config", LORA_LINEAR),
        Part(LORA_LINEAR, "get_delta_weight", "adapter", LORA_LINEAR),
        Part(TUNER_LAYER, "_cast_input_dtype", "x dtype", LORA_LINEAR),
        Part(TUNER_LAYER, "frozen_peft_weight_names"),
        Part(TUNER_LAYER, "_move_adapter_to_device_of_base_layer", "adapter_name device"),
        Part(LORA, "_cache_store", "key value"),
        Part(LORA, "_cache_pop", "key"),
    ),
    "deepspeed": (
        Part(ENGINE, "train", "mode", TRAINER),
        Part(ENGINE, "zero_grad", "", TRAINER),
        Part(ENGINE, "step", "lr_kwargs", "accelerate.utils.deepspeed:DeepSpeedEngineWrapper"),
        Part(ENGINE, "fp16_enabled", ""),
        Part(ENGINE, "skipped_steps"),
        *(Part(owner, "_hp_optimizer_states_linked") for owner in (ZERO_1_2, BF16)),
        *(Part(owner, "_lazy_init_hp_params_optimizer_state", "", owner) for owner in (ZERO_1_2, BF16)),
        *(Part(ZERO_3, name) for name in ("fp32_partitioned_groups_flat", "sub_group_to_group_id")),
        *(Part(STAGE_0, name) for name in ("fp16_groups", "fp32_groups")),
        *(Part(owner, "loss_scaler") for owner in (ZERO_1_2, ZERO_3)),
        *(Part(LOSS_SCALER, name) for name in ("dynamic", "cur_scale", "min_scale")),
        *(Part(PARTITIONED, name) for name in ("ds_id", "ds_shape", "ds_numel")),
        Part("deepspeed.utils.mixed_precision_linkage", "_hp_mapping"),
    ),
}


def check_private_api(user: str) -> None:
    """Called where ``user``, a key of :data:`PARTS`, is imported; for DeepSpeed, which is imported late, when a run has
    an engine.

    Raises:
        Refusal: E-VERSION, a part is missing, has other parameters, or is no longer called.
    """
    for part in PARTS[user]:
        if difference := _difference(part):
            library, found = difference
            parameters = "" if part.parameters is None else f"({', '.join(part.parameters.split())})"
            raise Refusal(
                "E-VERSION",
                f"llava_moslora.{user} relies on a part of {library} that has changed",
                key=f"{_dotted(part.owner)}.{part.name}",
                found=f"{found} in {library} {metadata.version(library)}",
                expected=f"{part.name}{parameters}, as in {library} {SUPPORTED[library]}",
                fix=f"pip install {library}=={TESTED[library]}, the version this was tested with",
            )


def _difference(part: Part) -> tuple[str, str] | None:
    """The library that is not as listed, and what is there instead."""
    library, owner, listed = _library(part.owner), _find(part.owner), (part.parameters or "").split()
    if owner is None:
        return library, f"no {_dotted(part.owner)}"
    if part.parameters is None:
        return None if part.name in _names_used_by(owner, library) else (library, "no such attribute")
    method = getattr(owner, part.name, None)
    if method is None:
        return library, "no such method"
    signature = inspect.signature(method)
    static = isinstance(inspect.getattr_static(owner, part.name), staticmethod)
    if not _takes(signature, listed, static):
        return library, f"{part.name}{signature}"
    if part.caller is not None:
        library, caller = _library(part.caller), _find(part.caller)
        if caller is None or part.name not in _names_used_by(caller, library, besides=part.name):
            return library, f"{_dotted(part.caller)} does not call it"
    return None


def _takes(signature: inspect.Signature, listed: list[str], static: bool) -> bool:
    """Whether a method has the listed parameters, and only optional ones besides."""
    parameters = list(signature.parameters.values())[0 if static else 1 :]  # without self
    if [p.kind for p in parameters] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return True
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if listed[-1:] == ["*"]:
        listed = listed[:-1]
        names = names[: len(listed)]
    optional = {p.name for p in parameters if p.default is not p.empty}
    return [name for name in names if name in listed or name not in optional] == listed


def _library(path: str) -> str:
    return path.partition(".")[0]


def _dotted(path: str) -> str:
    return path.replace(":", ".")


def _find(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return getattr(found, name, None) if name else found


def _names_used_by(owner: Any, library: str, besides: str | None = None) -> set[str]:
    """What the code of a class and its bases, or of a module and its classes, refers to by name.

    Args:
        library: bases from elsewhere are left out.
        besides: a method that is left out.
    """
    if inspect.isclass(owner):
        scopes = [base for base in inspect.getmro(owner) if _library(base.__module__) == library]
    else:
        classes = (m for m in vars(owner).values() if inspect.isclass(m))
        scopes = [owner, *(c for c in classes if c.__module__ == owner.__name__)]
    names: set[str] = set()
    for scope in scopes:
        for name, member in vars(scope).items():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)  # property, static method
            code = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
            if code is not None and name != besides:
                names.update(_names_in(code))
    return names


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside
            yield from _names_in(constant)
        elif isinstance(constant, str):  # of getattr and setattr
            yield constant
