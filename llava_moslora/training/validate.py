"""Refuses flags that cannot work together or would give silently wrong results, before any weight is read."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llava_moslora.adapters.methods import check_method
from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.errors import Refusal, did_you_mean
from llava_moslora.training import deepspeed_config
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.compatible import check_method_under, check_optimizer
from llava_moslora.training.evaluation_flags import check_evaluation

# flag → smallest value, and whether that value itself is allowed
RANGES = {
    **dict.fromkeys(
        ("learning_rate", "vision_lr", "mm_projector_lr", "mixer_lr", "lora_plus_ratio", "adam_epsilon",
         "neftune_noise_alpha", "save_steps", "logging_steps"), (0, False)),
    **dict.fromkeys(
        ("weight_decay", "max_grad_norm", "warmup_steps", "adam_beta1", "adam_beta2", "health_steps", "seed",
         "data_seed", "eval_delay", "early_stopping_threshold"), (0, True)),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_prefetch_factor", "sample_steps",
         "sample_max_new_tokens", "per_device_eval_batch_size", "early_stopping_patience"), (1, True)),
}  # fmt: skip
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32}
BITSANDBYTES_NAMES = ("bit", "bnb", "ademamix")  # its optimizers are detected by these parts of their names
ADAPTER_RANGES = {"lora_r": (0, True), "lora_alpha": (0, False), "lora_dropout": (0, True)}  # of the LLM and the tower
# --attn_implementation → the package that it needs, how to install it
FLASH_ATTENTION = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "build FlashAttention-3 from its repository's hopper folder"),
}

# --report_to → the package that is imported, and what installs it
TRACKERS = {
    **{name: (name, name) for name in ("wandb", "mlflow", "trackio", "neptune", "codecarbon", "clearml", "dvclive",
                                       "swanlab", "dagshub", "comet_ml")},
    "azure_ml": ("azureml", "azureml-mlflow"),
    "flyte": ("flytekit", "flytekit flytekitplugins-deck-standard"),
}  # fmt: skip


def check(model: ModelSettings, data: DataSettings, adapter: AdapterSettings, args: TrainingArguments) -> None:
    """Check all flags together.

    Raises:
        Refusal: C-FLAG, a value out of its range or flags that exclude each other; C-DEEPSPEED, a DeepSpeed file that
            differs from the flags, every difference at once; E-MISSING, an optional package is not installed.
    """
    check_evaluation(data, args)
    _check_adapters(adapter)
    check_method(adapter, model.bits, args)
    if args.riemannian and args.deepspeed:
        raise Refusal(
            "C-FLAG", "DeepSpeed partitions or frees the gradients that would be preconditioned", key="--riemannian",
            fix="omit --deepspeed (float32 on one GPU or several), or --riemannian",
        )  # fmt: skip
    check_trainer(model, args)
    deepspeed = deepspeed_config.read_deepspeed_config(args.deepspeed) if args.deepspeed else None
    check_method_under(adapter, deepspeed, args.deepspeed)


def check_trainer(model: ModelSettings, args: TrainingArguments) -> None:
    """As :func:`check`, for what does not depend on the data and on the adapters' targets.

    Raises:
        Refusal: as :func:`check`.
    """
    _check_numbers(args)
    _check_precision(args)
    _check_packages(model, args)
    _check_attention(model, args)
    if args.use_liger_kernel and args.use_cpu:
        raise Refusal("C-FLAG", "Liger's kernels need a GPU", key="--use_liger_kernel", fix="omit it on a CPU")
    if args.torch_compile and args.recompute == "selective":
        raise Refusal(
            "C-FLAG", "torch.compile itself decides what is recomputed", key="--torch_compile, --recompute selective",
            fix="--recompute none or full, or leave --torch_compile out",
        )  # fmt: skip
    deepspeed = deepspeed_config.read_deepspeed_config(args.deepspeed) if args.deepspeed else None
    if deepspeed is not None:
        deepspeed_config.check_deepspeed(deepspeed, args)
        if args.sample_questions and deepspeed_config.zero_stage(deepspeed) == 3:
            raise Refusal(
                "C-FLAG", "under ZeRO-3, generation would gather the model for every token, which is too slow",
                key="--sample_questions",
                fix="zero_configs/zero2.json, or evaluate the checkpoints with scripts/evaluate.py",
            )  # fmt: skip
    check_optimizer(name_of(args.optim), deepspeed)
    _check_optimizers_arguments(args)
    _check_schedule(args)


def _check_numbers(args: TrainingArguments) -> None:
    for name, (smallest, allowed) in RANGES.items():
        if (value := getattr(args, name)) is not None:
            check_range(name, value, smallest, allowed)
            if value >= BELOW.get(name, math.inf):
                raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=f"below {BELOW[name]}")
    if unknown := [name for name in args.reporters if name not in INTEGRATION_TO_CALLBACK]:
        expected = ", ".join(sorted(INTEGRATION_TO_CALLBACK)) + ", or none"
        raise Refusal(
            "C-FLAG", "unknown reporter", key="--report_to", found=", ".join(unknown), expected=expected,
            fix=did_you_mean(unknown[0], INTEGRATION_TO_CALLBACK) or None,
        )  # fmt: skip
    if args.max_steps == 0 or args.max_steps < -1:
        expected = "at least 1, or -1 for as many as --num_train_epochs makes"
        raise Refusal("C-FLAG", "nothing to train", key="--max_steps", found=args.max_steps, expected=expected)
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        epochs = args.num_train_epochs
        raise Refusal("C-FLAG", "nothing to train", key="--num_train_epochs", found=epochs, expected="above 0")


def _check_adapters(adapter: AdapterSettings) -> None:
    if adapter.lora_r == adapter.vision_lora_r == 0 and not adapter.tune_mm_mlp_adapter:
        raise Refusal("C-FLAG", "no adapter to train", key="--lora_r", fix="give --lora_r or --vision_lora_r above 0")
    for prefix in ("", "vision_"):
        for name, (smallest, allowed) in ADAPTER_RANGES.items():
            check_range(prefix + name, getattr(adapter, prefix + name), smallest, allowed)
        if (dropout := getattr(adapter, f"{prefix}lora_dropout")) >= 1:
            key, expected = f"--{prefix}lora_dropout", "a probability below 1"
            raise Refusal("C-FLAG", "out of range", key=key, found=dropout, expected=expected)


def check_range(name: str, value: float, smallest: float, allowed: bool) -> None:
    """Refuse (C-FLAG) a value of ``--name`` below ``smallest``; ``allowed``: that value itself may be given."""
    if not math.isfinite(value) or value < smallest or (value == smallest and not allowed):
        expected = f"{'at least' if allowed else 'above'} {smallest}"
        raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=expected)


def _check_precision(args: TrainingArguments) -> None:
    flag = "--fp16" if args.fp16 else "--bf16"
    if args.fp16 and args.use_cpu:
        fix = "--bf16 True, or omit it for float32"
        raise Refusal("C-FLAG", "float16 cannot be trained on a CPU", key=flag, fix=fix)
    if (args.fp16 or args.bf16) and not args.deepspeed:
        raise Refusal(
            "C-FLAG", "without DeepSpeed there are no float32 master weights, and 16-bit weights lose small updates",
            key=flag, fix="--deepspeed zero_configs/zero2.json, also on one GPU; or omit it for float32",
        )  # fmt: skip


def _check_optimizers_arguments(args: TrainingArguments) -> None:
    """Each ``KEY=VALUE`` of --optim_args must change a setting of the optimizer: the Trainer ignores other keys."""

    def settings(given: str | None) -> dict[str, Any]:
        changed = copy.copy(args)
        changed.optim_args = given
        return Trainer.get_optimizer_cls_and_kwargs(changed)[1]

    for word in (args.optim_args or "").replace(" ", "").split(","):
        if word:
            try:
                wrong: object = None if settings(word) != settings(None) else f"{word}, which has no effect"
            except (ValueError, TypeError) as error:
                wrong = f"{word}: {error}"
            if wrong:
                expected = f"KEY=VALUE,… with keys that {name_of(args.optim)} has"
                raise Refusal("C-FLAG", "cannot be used", key="--optim_args", found=wrong, expected=expected)


def _check_schedule(args: TrainingArguments) -> None:
    """Create the schedule for a dummy optimizer: the Trainer creates its own only after everything is loaded."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        what = f"does not fit --lr_scheduler_type {name_of(args.lr_scheduler_type)}"
        expected = "a JSON object with this schedule's parameters"
        raise Refusal("C-FLAG", what, key="--lr_scheduler_kwargs", found=error, expected=expected) from error


def _check_packages(model: ModelSettings, args: TrainingArguments) -> None:
    optimizer = name_of(args.optim)
    by_optimizer = any(part in optimizer for part in BITSANDBYTES_NAMES)
    flag = f"--optim {optimizer}" if by_optimizer else "--bits 4"
    wanted = {
        "bitsandbytes": (model.bits == 4 or by_optimizer, flag, "pip install 'llava_moslora[quant]'"),
        "liger_kernel": (args.use_liger_kernel, "--use_liger_kernel", "pip install 'llava_moslora[liger]'"),
    }
    for name, (package, project) in TRACKERS.items():
        wanted[package] = (name in args.reporters, f"--report_to {name}", f"pip install {project}")
    for name, (package, fix) in FLASH_ATTENTION.items():
        flag = f"--attn_implementation {name}"
        wanted[package] = (model.attn_implementation == name, flag, f"{fix}, or --attn_implementation sdpa")
    for package, (asked, flag, fix) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise Refusal("E-MISSING", f"needs {package}, which is not installed", key=flag, fix=fix)


def _check_attention(model: ModelSettings, args: TrainingArguments) -> None:
    name = model.attn_implementation
    if name in FLASH_ATTENTION and (args.use_cpu or not (args.bf16 or args.fp16)):
        raise Refusal(
            "C-FLAG", "flash attention needs 16-bit weights on a GPU", key=f"--attn_implementation {name}",
            found="a CPU" if args.use_cpu else "float32",
            fix="--attn_implementation sdpa" + ("" if args.use_cpu else ", or --bf16 True"),
        )  # fmt: skip


def name_of(choice: object) -> str:
    """Name of a value that may be an enumeration member."""
    return str(getattr(choice, "value", choice))
