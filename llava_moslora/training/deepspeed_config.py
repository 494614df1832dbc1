"""Reads the file of ``--deepspeed`` and compares its values with the flags; ``"auto"`` takes the flag's value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_moslora.errors import Refusal
from llava_moslora.files.json import LARGEST_CONFIG, parse_json

if TYPE_CHECKING:  # imports torch
    import torch
    from transformers import TrainingArguments

STAGES = (0, 1, 2, 3)
AUTO = "auto"
OFFLOADS = ("offload_optimizer", "offload_param")
SIZES = (  # of zero_optimization, in elements
    "reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)  # fmt: skip
SIZE = '0 or more, or "auto"'


def read_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """
    Raises:
        Refusal: C-PATH, no such file; C-PARSE, not JSON in UTF-8; C-DEEPSPEED, a mapping was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise Refusal("C-PATH", "no such file", file=path, key="--deepspeed", fix="the package's are in zero_configs/")
    try:
        config = parse_json(path.read_bytes(), largest=LARGEST_CONFIG)
    except UnicodeDecodeError as error:
        raise Refusal("C-PARSE", "not UTF-8", file=path, key="--deepspeed", found=error.reason) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}: {error.msg}"
        raise Refusal("C-PARSE", "not JSON", file=path, key="--deepspeed", found=place) from error
    except ValueError as error:
        raise Refusal("C-PARSE", "not usable", file=path, key="--deepspeed", found=error) from error
    _check_types({"--deepspeed": config}, ("--deepspeed",), path)
    _check_types(config, ("zero_optimization", "bf16", "fp16", "data_types"), path)
    zero = config.get("zero_optimization", {})
    for name in OFFLOADS:
        if zero.get(name, {}) is None:  # DeepSpeed's own default
            del zero[name]
    _check_types(zero, OFFLOADS, path)
    for name in SIZES:
        value = zero.get(name, AUTO)
        if value != AUTO and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise Refusal("C-DEEPSPEED", "not a number of elements", file=path, key=name, found=value, expected=SIZE)
    return config


def _check_types(block: dict[str, Any], names: tuple[str, ...], path: Path) -> None:
    for name in names:
        if not isinstance(found := block.get(name, {}), dict):
            raise Refusal("C-DEEPSPEED", "not a mapping", file=path, key=name, found=found, expected="{…}")


def zero_stage(config: dict[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(config: dict[str, Any]) -> bool:
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def check_deepspeed(config: dict[str, Any], args: TrainingArguments) -> None:
    """
    Args:
        config: the content of ``args.deepspeed``.

    Raises:
        Refusal: C-DEEPSPEED, a file that cannot be used, or that differs from the flags (every difference at once);
            C-FLAG, float16 under stage 0.
    """
    _check_blocks(config, Path(args.deepspeed))
    _check_zero(config.get("zero_optimization", {}), Path(args.deepspeed))
    if zero_stage(config) == 0 and args.fp16:
        raise Refusal(
            "C-FLAG", "DeepSpeed's stage 0 has a float16 loss scale that cannot be saved", key="--fp16",
            fix="--bf16 True, or zero_configs/zero1.json",
        )  # fmt: skip
    if clashes := [
        f"{key} {value} against {flag}"
        for key, (wanted, flag) in _flags_in_file(args).items()
        if (value := _look_up(config, key)) not in (AUTO, wanted)
    ]:
        raise Refusal(
            "C-DEEPSPEED", "the file and the flags disagree", file=args.deepspeed, key="--deepspeed",
            found="; ".join(clashes), fix='"auto" in the file takes the flags\' values',
        )  # fmt: skip


def _check_blocks(config: dict[str, Any], file: Path) -> None:
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & config.keys():
        raise Refusal(
            "C-DEEPSPEED", "DeepSpeed needs the batch size", file=file, key="train_micro_batch_size_per_gpu",
            found="neither it nor train_batch_size", fix='"train_micro_batch_size_per_gpu": "auto"',
        )  # fmt: skip
    if type(stage := zero_stage(config)) is not int or stage not in STAGES:
        raise Refusal(
            "C-DEEPSPEED", "unknown stage", file=file, key="zero_optimization.stage", found=stage, expected="0 to 3"
        )
    for block in ("optimizer", "scheduler"):
        if block in config:
            raise Refusal(
                "C-DEEPSPEED", "would replace the optimizer with a learning rate per part", file=file, key=block,
                fix=f"remove {block} from the file and use flags: --learning_rate, --optim, --lr_scheduler_type, …",
            )  # fmt: skip


def check_rotary_frequencies(model: torch.nn.Module) -> None:
    """
    Raises:
        Refusal: C-DEEPSPEED, a buffer ``inv_freq`` is not float32: at late positions the rotary angles would differ
            from the exported model's.
    """
    import torch  # imported here: the planner reads files without it

    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise Refusal(
                "C-DEEPSPEED", "DeepSpeed has rounded the rotary frequencies", key=name,
                found=buffer.dtype, expected=torch.float32,
                fix="deepspeed 0.19.8 or newer, and no data_types.buffer_dtype in its file",
            )  # fmt: skip


def _check_zero(zero: dict[str, Any], file: Path) -> None:
    """DeepSpeed's own check of names, types and ranges, which would otherwise run after everything is loaded."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # imported here: the planner reads files without it
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, first["loc"])])
        fix = "see zero_configs/, or DeepSpeed's documentation"
        found = first["input"]
        raise Refusal("C-DEEPSPEED", first["msg"].lower(), file=file, key=key, found=found, fix=fix) from error


def _flags_in_file(args: TrainingArguments) -> dict[str, tuple[object, str]]:
    """Key of the file → the value of the flags, and its text for a message."""
    micro, steps, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    product = f"{micro * steps * world} = {micro} per device × {steps} accumulated × {world} ranks"
    return {
        "train_micro_batch_size_per_gpu": (micro, f"{micro} (--per_device_train_batch_size)"),
        "gradient_accumulation_steps": (steps, f"{steps} (--gradient_accumulation_steps)"),
        "train_batch_size": (micro * steps * world, product),
        "gradient_clipping": (args.max_grad_norm, f"{args.max_grad_norm} (--max_grad_norm)"),
        "bf16.enabled": (args.bf16, f"{args.bf16} (--bf16)"),
        "fp16.enabled": (args.fp16, f"{args.fp16} (--fp16)"),
    }


def _look_up(config: dict[str, Any], key: str) -> object:
    """The value of a dotted key such as ``bf16.enabled``; ``"auto"`` if missing."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part, AUTO)
        if value == AUTO:
            break
    return value
