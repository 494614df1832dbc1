"""Combinations of flags that cannot work, or would work silently wrong: refused before any weight is read."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import torch

from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import HEAD
from llava_moslora.training.arguments import AdapterArguments, ModelArguments, TrainingArguments

STAGES = (0, 1, 2, 3)
LOSS_AVERAGES = ("tokens", "micro_batch")
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
    "ddp_timeout": (1, True),
}
ADAPTER_RANGES = {  # for each tower's own flag too
    "lora_r": (0, True),
    "lora_alpha": (0, False),
    "lora_dropout": (0, True),
}


def check(model_args: ModelArguments, adapter_args: AdapterArguments, args: TrainingArguments) -> None:
    """Look at all flags together.

    Raises:
        Refusal: C-FLAG, a value out of its range or flags that exclude each other; C-DEEPSPEED, a DeepSpeed file that
            says other than the flags, every difference at once; E-MISSING, an optional package is not installed.
    """
    _check_numbers(args)
    _check_adapters(adapter_args)
    _check_precision(args)
    _check_packages(model_args, args)
    _check_liger(adapter_args, args)
    if args.deepspeed:
        _check_deepspeed(args)


def _check_numbers(args: TrainingArguments) -> None:
    for name, (smallest, allowed) in RANGES.items():
        if (value := getattr(args, name)) is not None:
            _check_range(name, value, smallest, allowed)
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise Refusal(
            "C-FLAG", "nothing to train", key="--num_train_epochs", found=args.num_train_epochs, expected="above 0"
        )
    if args.loss_average not in LOSS_AVERAGES:
        expected = " or ".join(LOSS_AVERAGES)
        raise Refusal("C-FLAG", "unknown average", key="--loss_average", found=args.loss_average, expected=expected)


def _check_adapters(args: AdapterArguments) -> None:
    for prefix in ("", "vision_"):
        for name, (smallest, allowed) in ADAPTER_RANGES.items():
            _check_range(prefix + name, getattr(args, prefix + name), smallest, allowed)
        if (dropout := getattr(args, f"{prefix}lora_dropout")) >= 1:
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


def _check_packages(model_args: ModelArguments, args: TrainingArguments) -> None:
    wanted = {"bitsandbytes": (model_args.bits == 4, "--bits 4", "pip install 'llava_moslora[quant]'")}
    wanted["liger_kernel"] = (args.use_liger_kernel, "--use_liger_kernel", "pip install 'llava_moslora[liger]'")
    wanted["wandb"] = ("wandb" in args.report_to, "--report_to wandb", "pip install wandb")
    for package, (asked, flag, fix) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise Refusal("E-MISSING", f"needs {package}, which is not installed", key=flag, fix=fix)


def _check_liger(adapter_args: AdapterArguments, args: TrainingArguments) -> None:
    if args.use_liger_kernel and not adapter_args.tune_mm_mlp_adapter and HEAD in adapter_args.lora_target_modules:
        raise Refusal(
            "C-FLAG",
            "Liger's fused loss multiplies with the LM head's weight itself and would ignore the adapter on it",
            key="--use_liger_kernel, --lora_target_modules lm_head",
            fix="leave one of the two out",
        )
    if args.use_liger_kernel and args.use_cpu:
        raise Refusal("C-FLAG", "Liger's kernels need a GPU", key="--use_liger_kernel", fix="leave it out on a CPU")


def _check_deepspeed(args: TrainingArguments) -> None:
    """The file's own numbers against the flags; ``auto`` stands for the flag."""
    file = Path(args.deepspeed)
    config = json.loads(file.read_text(encoding="utf-8"))
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in STAGES:
        raise Refusal(
            "C-DEEPSPEED", "unknown stage", file=file, key="zero_optimization.stage", found=stage, expected="0 to 3"
        )
    for block in ("optimizer", "scheduler"):
        if block in config:
            raise Refusal(
                "C-DEEPSPEED",
                "would replace the optimizer that has a learning rate per part",
                file=file,
                key=block,
                fix=f"take {block} out of the file and give flags: --learning_rate, --optim, --lr_scheduler_type, …",
            )
    micro, steps, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    product = f"{micro * steps * world} = {micro} per device × {steps} accumulated × {world} ranks"
    flags = {
        "train_micro_batch_size_per_gpu": (micro, f"{micro} (--per_device_train_batch_size)"),
        "gradient_accumulation_steps": (steps, f"{steps} (--gradient_accumulation_steps)"),
        "train_batch_size": (micro * steps * world, product),
        "gradient_clipping": (args.max_grad_norm, f"{args.max_grad_norm} (--max_grad_norm)"),
        "bf16.enabled": (args.bf16, f"{args.bf16} (--bf16)"),
        "fp16.enabled": (args.fp16, f"{args.fp16} (--fp16)"),
    }
    if stage == 3 and args.use_liger_kernel:
        raise Refusal(
            "C-FLAG", "under ZeRO-3 the LM head's weight is not there for Liger's fused loss", key="--use_liger_kernel",
            fix="zero_configs/zero2.json, or leave it out",
        )  # fmt: skip
    if stage == 3 and args.sample_questions:
        raise Refusal(
            "C-FLAG",
            "under ZeRO-3 no rank holds the model that would answer, and gathering it for every token takes too long",
            key="--sample_questions",
            fix="zero_configs/zero2.json, or ask the checkpoints with scripts/evaluate.py",
        )
    clashes = []
    for key, (flag, said) in flags.items():
        value = config
        for part in key.split("."):
            value = value.get(part, "auto")
            if value == "auto":
                break
        if value not in ("auto", flag):
            clashes.append(f"{key} {value} against {said}")
    if clashes:
        raise Refusal(
            "C-DEEPSPEED", "the file and the flags disagree", file=file, key="--deepspeed", found="; ".join(clashes),
            fix='"auto" in the file takes the flags\' values',
        )  # fmt: skip


def check_launch(args: TrainingArguments) -> None:
    """DeepSpeed's processes are started by a launcher.

    Raises:
        Refusal: E-LAUNCH, this process was started without one, or sees fewer GPUs than its place asks for.
    """
    if args.deepspeed and "RANK" not in os.environ:
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
