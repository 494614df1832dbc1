"""Combinations of flags that cannot work, or would work silently wrong: refused before any weight is read."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llava_moslora.config import AdapterSettings, ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.deepspeed_config import (
    check_deepspeed,
    offloads_optimizer,
    read_deepspeed_config,
    zero_stage,
)

# flag → smallest value, and whether that value itself is allowed
RANGES = {
    "learning_rate": (0, False),
    "vision_lr": (0, False),
    "mm_projector_lr": (0, False),
    "mixer_lr": (0, False),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "warmup_steps": (0, True),
    "per_device_train_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "dataloader_prefetch_factor": (1, True),
    "save_steps": (0, False),
    "logging_steps": (0, False),
    "sample_steps": (1, True),
    "sample_max_new_tokens": (1, True),
    "health_steps": (0, True),
    "adam_beta1": (0, True),
    "adam_beta2": (0, True),
    "adam_epsilon": (0, False),
    "seed": (0, True),
    "data_seed": (0, True),
    "neftune_noise_alpha": (0, False),
}
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32}
# The Trainer's own flags that would do nothing here → the values that are accepted, and why no others are
UNUSED = {
    "eval_strategy": (("no",), "nothing is evaluated while training; ask the checkpoints with scripts/evaluate.py"),
    "save_strategy": (("steps", "epoch", "no"), "no checkpoint is known to be the best without an evaluation"),
    "label_smoothing_factor": ((0.0,), "the loss has no label smoothing"),
}
# Optimizer state is saved as it is. ZeRO partitions state that has a number for every weight; it concatenates
# parameters, and blocks of 8-bit numbers or factored rows would reach over their borders.
PER_WEIGHT = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_32bit", "paged_lion_32bit", "sgd",
              "rmsprop", "rmsprop_bnb_32bit")  # fmt: skip
PER_PARAMETER = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "rmsprop_bnb",
                 "rmsprop_bnb_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
                 "adafactor")  # fmt: skip
OFFLOADABLE = ("adamw_torch", "adamw_torch_fused")  # anything else would silently become DeepSpeed's Adam there
BITSANDBYTES_NAMES = ("bit", "bnb", "ademamix")  # parts of the names of its optimizers
ADAPTER_RANGES = {  # for each tower's own flag too
    "lora_r": (0, True),
    "lora_alpha": (0, False),
    "lora_dropout": (0, True),
}
# --attn_implementation → the package that it needs, and how to get that
FLASH_ATTENTION = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "build FlashAttention-3 from its repository's hopper folder"),
}


def check(model: ModelSettings, adapter: AdapterSettings, args: TrainingArguments) -> None:
    """Check all flags together.

    Raises:
        Refusal: C-FLAG, a value out of its range or flags that exclude each other; C-DEEPSPEED, a DeepSpeed file that
            says other than the flags, every difference at once; E-MISSING, an optional package is not installed.
    """
    if args.resume_from_checkpoint is not None:
        raise Refusal(
            "C-FLAG", "a run resumes from the newest valid checkpoint in its --output_dir, not from one that is named",
            key="--resume_from_checkpoint", found=args.resume_from_checkpoint, fix="use --resume True",
        )  # fmt: skip
    _check_numbers(args)
    _check_adapters(adapter)
    _check_precision(args)
    _check_packages(model, args)
    _check_attention(model, args)
    _check_liger(args)
    _check_compile(args)
    deepspeed = read_deepspeed_config(args.deepspeed) if args.deepspeed else None
    if deepspeed is not None:
        check_deepspeed(deepspeed, args)
    _check_optimizer(args, deepspeed)


def _check_numbers(args: TrainingArguments) -> None:
    for name, (smallest, allowed) in RANGES.items():
        if (value := getattr(args, name)) is not None:
            _check_range(name, value, smallest, allowed)
            if value >= BELOW.get(name, math.inf):
                raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=f"below {BELOW[name]}")
    for name, (taken, why) in UNUSED.items():
        value = getattr(args, name)
        value = getattr(value, "value", value)  # of an enumeration
        if value not in taken:
            expected = " or ".join(map(str, taken))
            raise Refusal("C-FLAG", why, key=f"--{name}", found=value, expected=expected, fix="leave it out")
    if unknown := [name for name in args.report_to if name not in INTEGRATION_TO_CALLBACK]:
        expected = ", ".join(sorted(INTEGRATION_TO_CALLBACK)) + ", or none"
        raise Refusal("C-FLAG", "unknown reporter", key="--report_to", found=", ".join(unknown), expected=expected)
    if args.max_steps == 0 or args.max_steps < -1:
        expected = "at least 1, or -1 for as many as --num_train_epochs makes"
        raise Refusal("C-FLAG", "nothing to train", key="--max_steps", found=args.max_steps, expected=expected)
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise Refusal(
            "C-FLAG", "nothing to train", key="--num_train_epochs", found=args.num_train_epochs, expected="above 0"
        )


def _check_adapters(adapter: AdapterSettings) -> None:
    for prefix in ("", "vision_"):
        for name, (smallest, allowed) in ADAPTER_RANGES.items():
            _check_range(prefix + name, getattr(adapter, prefix + name), smallest, allowed)
        if (dropout := getattr(adapter, f"{prefix}lora_dropout")) >= 1:
            raise Refusal(
                "C-FLAG", "out of range", key=f"--{prefix}lora_dropout", found=dropout, expected="a probability below 1"
            )


def _check_range(name: str, value: float, smallest: float, allowed: bool) -> None:
    if not math.isfinite(value) or value < smallest or (value == smallest and not allowed):
        expected = f"{'at least' if allowed else 'above'} {smallest}"
        raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=expected)


def _check_precision(args: TrainingArguments) -> None:
    flag = "--fp16" if args.fp16 else "--bf16"
    if args.fp16 and args.use_cpu:
        raise Refusal(
            "C-FLAG", "float16 cannot be trained on a CPU", key=flag, fix="--bf16 True, or leave it out for float32"
        )
    if (args.fp16 or args.bf16) and not args.deepspeed:
        raise Refusal(
            "C-FLAG",
            "without DeepSpeed there are no float32 masters, and 16-bit weights round small updates away",
            key=flag,
            fix="--deepspeed zero_configs/zero2.json, also on one GPU; or leave it out for float32",
        )


def _check_optimizer(args: TrainingArguments, deepspeed: dict[str, Any] | None) -> None:
    """A run whose optimizer cannot be saved would fail at its first checkpoint."""
    name, known = str(getattr(args.optim, "value", args.optim)), PER_WEIGHT + PER_PARAMETER
    what, fix = "this optimizer's state cannot be saved", "--optim adamw_torch_fused, or another of those"
    if deepspeed and offloads_optimizer(deepspeed):
        known, what = OFFLOADABLE, "an optimizer that is offloaded becomes DeepSpeed's Adam, whatever was asked for"
    elif deepspeed and zero_stage(deepspeed) and name in PER_PARAMETER:
        known, what = PER_WEIGHT, "ZeRO joins parameters, over whose borders this optimizer's state cannot be cut"
        fix = "zero_configs/zero0.json, or an optimizer of those"
    if name not in known:
        expected = ", ".join(known)
        raise Refusal("C-FLAG", what, key="--optim", found=name, expected=expected, fix=fix)


def _check_packages(model: ModelSettings, args: TrainingArguments) -> None:
    optimizer = str(getattr(args.optim, "value", args.optim))
    by_optimizer = any(part in optimizer for part in BITSANDBYTES_NAMES)
    flag = f"--optim {optimizer}" if by_optimizer else "--bits 4"
    wanted = {
        "bitsandbytes": (model.bits == 4 or by_optimizer, flag, "pip install 'llava_moslora[quant]'"),
        "liger_kernel": (args.use_liger_kernel, "--use_liger_kernel", "pip install 'llava_moslora[liger]'"),
        "wandb": ("wandb" in args.report_to, "--report_to wandb", "pip install wandb"),
    }
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
            "C-FLAG",
            "flash attention's kernels are for 16-bit numbers on a GPU",
            key=f"--attn_implementation {name}",
            found="a CPU" if args.use_cpu else "float32",
            fix="--attn_implementation sdpa" + ("" if args.use_cpu else ", or --bf16 True"),
        )


def _check_compile(args: TrainingArguments) -> None:
    if args.torch_compile and args.recompute == "selective":
        raise Refusal(
            "C-FLAG", "torch.compile decides itself what is recomputed", key="--torch_compile, --recompute selective",
            fix="--recompute none or full, or leave --torch_compile out",
        )  # fmt: skip


def _check_liger(args: TrainingArguments) -> None:
    if args.use_liger_kernel and args.use_cpu:
        raise Refusal("C-FLAG", "Liger's kernels need a GPU", key="--use_liger_kernel", fix="leave it out on a CPU")


def check_launch(deepspeed: object) -> None:
    """Check how this process was started, before it joins the others.

    Args:
        deepspeed: whether ``--deepspeed`` was given.

    Raises:
        Refusal: E-LAUNCH, DeepSpeed without a launcher, or more processes than this host has GPUs.
    """
    if deepspeed and "RANK" not in os.environ:
        raise Refusal(
            "E-LAUNCH",
            "DeepSpeed needs a launcher",
            key="--deepspeed",
            fix="deepspeed scripts/train_vit_llm.py …, or torchrun --nproc_per_node N scripts/train_vit_llm.py …",
        )
    local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if devices and local >= devices:
        raise Refusal(
            "E-LAUNCH", "more processes than GPUs on this host", found=f"process {local + 1}", expected=f"{devices}",
            fix="start as many processes as there are GPUs: --num_gpus, --nproc_per_node",
        )  # fmt: skip
