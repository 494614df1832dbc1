"""How this process was started: as which rank of how many, and with what else in its environment."""

from __future__ import annotations

import os
from typing import Any

import torch

from llava_moslora.errors import Refusal

# What accelerate's launcher switches on for the Trainer, past all flags → what that is, in place of which flag
SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--deepspeed zero_configs/zero2.json in place of --use_deepspeed"),
    "ACCELERATE_USE_FSDP": ("FSDP", "--deepspeed zero_configs/zero3.json in place of --use_fsdp"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--deepspeed zero_configs/zero3.json in place of --use_megatron_lm"),
}
ON = ("1", "true", "yes", "y", "t", "on")
HIGHEST_PORT = 65535
BY_HAND = "or for every process RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


def check_launch(training: dict[str, Any], script: str = "scripts/train_vit_llm.py") -> None:
    """Check how this process was started, before it joins the others.

    Args:
        training: values for ``TrainingArguments``, as they were given.

    Raises:
        Refusal: E-LAUNCH, DeepSpeed without a launcher, a launcher that sets what the flags say otherwise, variables
            that are no place among the ranks, or more processes than this host has GPUs.
    """
    deepspeed = training["deepspeed"]
    _check_accelerate(training)
    start = f"deepspeed {script} …, torchrun --nproc_per_node N {script} …"
    if deepspeed and "RANK" not in os.environ:
        fix = start.replace(", ", ", or ")
        raise Refusal("E-LAUNCH", "DeepSpeed needs a launcher", key="--deepspeed", fix=fix)
    if "RANK" in os.environ:
        rank, world = _number("RANK", start), _number("WORLD_SIZE", start)
        if rank >= world:
            raise Refusal(
                "E-LAUNCH", "there is no such rank", key="RANK", found=rank, expected=f"below WORLD_SIZE {world}",
                fix=f"{start}, {BY_HAND}",
            )  # fmt: skip
        if deepspeed and not 0 < (port := _number("MASTER_PORT", start)) <= HIGHEST_PORT:
            raise Refusal(
                "E-LAUNCH", "no port", key="MASTER_PORT", found=port, expected=f"1 to {HIGHEST_PORT}",
                fix=f"{start}, {BY_HAND}",
            )  # fmt: skip
    local, devices = _number("LOCAL_RANK", start, missing=0), torch.cuda.device_count()
    if devices and local >= devices:
        raise Refusal(
            "E-LAUNCH", "more processes than GPUs on this host", found=f"process {local + 1}", expected=f"{devices}",
            fix="start as many processes as there are GPUs: --num_gpus, --nproc_per_node",
        )  # fmt: skip


def _check_accelerate(training: dict[str, Any]) -> None:
    """accelerate's launcher speaks to the Trainer through the environment, where no check of flags looks."""
    for name, (what, fix) in SWITCHES.items():
        on = os.environ.get(name, "").lower() in ON
        if on and not (name == "ACCELERATE_USE_DEEPSPEED" and training["deepspeed"]):
            raise Refusal("E-LAUNCH", f"{what} is switched on beside the flags", key=name, fix=fix)
    flag = "fp16" if training.get("fp16") else "bf16" if training.get("bf16") else "no"
    found = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if found not in ("no", "", flag):
        instead = f"--{found} True with --deepspeed in place of" if found in ("bf16", "fp16") else "leave out"
        raise Refusal(
            "E-LAUNCH", "another precision than the flags say", key="ACCELERATE_MIXED_PRECISION", found=found,
            expected=flag, fix=f"{instead} accelerate's --mixed_precision",
        )  # fmt: skip


def _number(name: str, start: str, missing: int | None = None) -> int:
    """An environment variable that a launcher sets; ``missing``: what stands for one that is not there."""
    text = os.environ.get(name)
    if text is None and missing is not None:
        return missing
    if text is None or not (text.isascii() and text.isdecimal()):
        raise Refusal(
            "E-LAUNCH", "no number in the environment", key=name, found="nothing" if text is None else repr(text),
            expected="0 or more", fix=f"{start}, {BY_HAND}",
        )  # fmt: skip
    return int(text)
