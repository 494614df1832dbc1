"""The private API of transformers, accelerate, PEFT and DeepSpeed that this package overrides, calls or replaces.

:func:`check_private_api` refuses a version in which a part of it has changed: overriding a method that the library
has renamed or no longer calls is not an error in Python, but the NaN check, for example, would never run again. So a
method must exist with the listed parameters and still be called by the class named as its caller; an attribute must
still be used by its owner's code.
"""

from __future__ import annotations

import importlib
import inspect
import re
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
        parameters: names of the method's parameters without ``self``, in order. It may have others with a default;
            after ``*`` any others; a wrapper that takes anything passes. None for an attribute: code of the owner or
            its bases must use it.
        caller: ``module:Class`` whose methods must call it; None where this package does, and would fail without it.
    """

    owner: str
    name: str
    parameters: tuple[str, ...] | None = None
    caller: str | None = None


def _parts(owner: str, names: str, caller: str | None = None) -> list[Part]:
    """Methods, written ``name(parameter, …)``, and attributes, written ``name``, of one owner."""
    found = re.findall(r"(\w+)(\(([^)]*)\))?", names)
    return [Part(owner, name, tuple(re.findall(r"[\w*]+", p)) if method else None, caller) for name, method, p in found]


TRAINER = "transformers.trainer:Trainer"
VARIANT, LORA, LORA_LINEAR = (f"peft.tuners.lora.layer:{name}" for name in ("LoraVariant", "LoraLayer", "Linear"))
TUNER_LAYER = "peft.tuners.tuners_utils:BaseTunerLayer"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
ZERO_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"  # ZeRO-1 with float32 gradients
STAGE_0 = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"  # in 16 bits, bf16 included

# By the module that relies on them, which calls check_private_api with this name.
PARTS = {
    "training.trainer": [
        *_parts(
            TRAINER,
            """get_train_dataloader() create_optimizer(model) get_batch_samples(epoch_iterator, num_batches, device)
            _get_num_items_in_batch(batch_samples, device) _prepare_input(data) floating_point_ops(inputs)
            training_step(model, inputs, num_items_in_batch)
            compute_loss(model, inputs, return_outputs, num_items_in_batch)
            _clip_grad_norm(model) _get_grad_norm(model, grad_norm) log(logs, start_time)
            evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            _evaluate(trial, ignore_keys_for_eval, skip_scheduler) _determine_best_metric(metrics, trial)
            _save_checkpoint(model, trial) _run_epoch(model, epoch, train_dataloader, *)
            _prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            _load_from_checkpoint(resume_from_checkpoint, model) _load_rng_state(checkpoint)""",
            caller=TRAINER,
        ),
        *_parts(TRAINER, "get_optimizer_cls_and_kwargs(args, model) model_accepts_loss_kwargs"),
    ],
    "recompute": _parts(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        "gradient_checkpointing _gradient_checkpointing_func",
    ),
    "adapters.layers": [
        *_parts(VARIANT, "init(module, adapter_name)", caller=LORA),
        *_parts(
            VARIANT,
            """forward(module, active_adapter, x, result) merge_safe(module, active_adapter, orig_weight)
            merge_unsafe(module, active_adapter, orig_weight) unmerge(module, active_adapter, orig_weight)""",
            caller=LORA_LINEAR,
        ),
        *_parts(LORA, "resolve_lora_variant(config)", caller=LORA),
        *_parts(LORA, "update_layer(adapter_name, r, lora_alpha, config)", caller=LORA_LINEAR),
        *_parts(LORA, "_cache_store(key, value) _cache_pop(key)"),
        *_parts(LORA_LINEAR, "get_delta_weight(adapter)", caller=LORA_LINEAR),
        *_parts(TUNER_LAYER, "set_adapter(adapter_names, inference_mode)", caller="peft.tuners.tuners_utils:BaseTuner"),
        *_parts(TUNER_LAYER, "_cast_input_dtype(x, dtype)", caller=LORA_LINEAR),
        *_parts(TUNER_LAYER, "frozen_peft_weight_names _move_adapter_to_device_of_base_layer(adapter_name, device)"),
    ],
    "deepspeed": [
        *_parts(ENGINE, "train(mode) zero_grad()", caller=TRAINER),
        *_parts(ENGINE, "step(lr_kwargs)", caller="accelerate.utils.deepspeed:DeepSpeedEngineWrapper"),
        *_parts(ENGINE, "fp16_enabled() get_global_grad_norm() skipped_steps"),
        *_parts(ZERO_1_2, "_lazy_init_hp_params_optimizer_state()", caller=ZERO_1_2),
        *_parts(ZERO_1_2, "_hp_optimizer_states_linked loss_scaler"),
        *_parts(BF16, "_lazy_init_hp_params_optimizer_state()", caller=BF16),
        *_parts(BF16, "_update_hp_grad(lp, group_idx, param_idx, clear_lp_grads)", caller=BF16),
        *_parts(BF16, "step(closure)", caller=ENGINE),
        *_parts(
            BF16,
            """update_lp_params() clear_hp_grads() _hp_optimizer_states_linked clip_grad _global_grad_norm mpu
            has_moe_layers _uses_muon grad_acc_dtype norm_type
            fp32_groups_actual_gradients_flat fp32_groups_gradients fp32_groups_has_gradients
            fp32_groups_flat_partition fp32_groups_gradient_flat_partition""",
        ),
        *_parts(ZERO_3, "fp32_partitioned_groups_flat sub_group_to_group_id loss_scaler"),
        *_parts(STAGE_0, "fp16_groups fp32_groups"),
        *_parts("deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler", "dynamic cur_scale min_scale"),
        *_parts("deepspeed.runtime.zero.partition_parameters", "ds_id ds_shape ds_numel"),
        *_parts("deepspeed.utils.mixed_precision_linkage", "_hp_mapping"),
    ],
}


def check_private_api(user: str) -> None:
    """Check ``PARTS[user]``; called when the module ``user`` is imported, for DeepSpeed when a run has an engine.

    Raises:
        Refusal: E-VERSION, a part is missing, has other parameters, or is no longer called.
    """
    for part in PARTS[user]:
        if difference := _difference(part):
            library, found = difference
            parameters = "" if part.parameters is None else f"({', '.join(part.parameters)})"
            refusal = Refusal(
                "E-VERSION",
                f"llava_moslora.{user} relies on a part of {library} that has changed",
                key=f"{part.owner.replace(':', '.')}.{part.name}",
                found=f"{found} in {library} {metadata.version(library)}",
                expected=f"{part.name}{parameters}, as in {library} {SUPPORTED[library]}",
                fix=f"pip install {library}=={TESTED[library]}, the version this was tested with",
            )
            raise refusal


def _difference(part: Part) -> tuple[str, str] | None:
    """The library that differs, and what was found in it; None if nothing differs."""
    library, owner = _library(part.owner), _find(part.owner)
    if owner is None:
        return library, f"no {part.owner.replace(':', '.')}"
    if part.parameters is None:
        return None if part.name in _names_used_by(owner, library) else (library, "no such attribute")
    method = getattr(owner, part.name, None)
    if method is None:
        return library, "no such method"
    signature = inspect.signature(method)
    static = isinstance(inspect.getattr_static(owner, part.name), staticmethod)
    if not _takes(signature, list(part.parameters), static):
        return library, f"{part.name}{signature}"
    if part.caller is not None:
        library, caller = _library(part.caller), _find(part.caller)
        if caller is None or part.name not in _names_used_by(caller, library, besides=part.name):
            return library, f"{part.caller.replace(':', '.')} does not call it"
    return None


def _takes(signature: inspect.Signature, listed: list[str], static: bool) -> bool:
    """Whether a method takes the listed parameters, and others only with a default."""
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


def _find(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return getattr(found, name, None) if name else found


def _names_used_by(owner: Any, library: str, besides: str | None = None) -> set[str]:
    """Names in the code of a class and its bases in ``library``, or of a module and its classes, except the code of the
    method ``besides``."""
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
