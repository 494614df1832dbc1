"""Which keys of a DeepSpeed file a training can use: the others are refused before anything is loaded.

DeepSpeed ignores a top-level key that it does not know, and names one that it has removed only when everything has been
loaded. Some of its features take over what this package does itself: the order of the records, the schedule, which
optimizer state is saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal, did_you_mean

USABLE = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "fp16", "data_types", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "seq_parallel_communication_data_type", "disable_allgather", "disable_python_gc",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "managed_gradient_accumulation",
    "activation_checkpointing", "aio", "checkpoint", "dataloader_drop_last", "vocabulary_size",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "flops_profiler",
    "comms_logger", "log_level", "tensorboard", "wandb", "csv_monitor", "comet",
)  # fmt: skip
REMOVED = (  # by DeepSpeed, which refuses them also where they are switched off
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
)  # fmt: skip
FLAGS = "use flags: --learning_rate, --optim, --lr_scheduler_type, …"
REPLACING = ("optimizer", "scheduler")
# Sections → why, what to do instead. Others than the first two may be there as {"enabled": false}.
UNUSABLE = {
    **dict.fromkeys(REPLACING, ("would replace the optimizer with a learning rate per part", FLAGS)),
    "torch_autocast": ("trains in another precision than the flags, the log and run.json say", "use --bf16 True"),
    "data_efficiency": ("would change the order of the records, and what is trained of them", None),
    "autotuning": ("would start other runs than the one that was asked for", "use scripts/plan.py"),
    "bfloat16": ("is an old name of bf16", 'write "bf16": {"enabled": "auto"}'),
    "compile": ("is not for adapters", "use --torch_compile True"),
    **dict.fromkeys(
        ("datastates_ckpt", "expert_parallel", "hybrid_engine", "pipeline", "sequence_parallel_size",
         "tensor_parallel", "weight_quantization"), ("is not supported by this package's trainings", None)),
}  # fmt: skip
MASTERS = "the master weights of a checkpoint are float32"
ONE_STATE = "part of the optimizer would follow no learning-rate schedule, and its state would not be saved"
OLD_NAME = "is an old name, with which DeepSpeed does not exchange the optimizer"
PLAIN_MEAN = "the gradient is the plain mean over the ranks"
# Dotted keys → the only value that works, why
FIXED: dict[str, tuple[object, str]] = {
    "prescale_gradients": (False, PLAIN_MEAN),
    "gradient_predivide_factor": (1, PLAIN_MEAN),
    "gradient_allreduce_op": ("mean", PLAIN_MEAN),
    "managed_gradient_accumulation": (True, "a step would be taken after every micro-batch"),
    "bf16.bf16_master_weights_and_grads": (False, MASTERS),
    "bf16.bf16_optimizer_states": (False, MASTERS),
    "fp16.fp16_master_weights_and_grads": (False, MASTERS),
    "zero_optimization.offload_optimizer.ratio": (1, ONE_STATE),
    "zero_optimization.offload_optimizer.super_offload": (False, "its optimizer state cannot be saved"),
    "zero_optimization.zenflow": (None, "its optimizer state cannot be saved"),
    "zero_optimization.zero_hpz_partition_size": (1, "vision tower and LLM are loaded one after the other"),
    "zero_optimization.compute_grad_norm": (True, "the norm of every step is checked and logged"),
    "zero_optimization.cpu_offload": (None, f'{OLD_NAME}: "offload_optimizer": {{"device": "cpu"}}'),
    "zero_optimization.cpu_offload_param": (None, f'{OLD_NAME}: "offload_param": {{"device": "cpu"}}'),
}
ON_A_GPU = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
MISSING = object()


def check_keys(config: dict[str, Any], file: Path, *, use_cpu: bool) -> None:
    """
    Args:
        config: the content of ``file``; ``zero_optimization`` is a mapping.
        use_cpu: whether it trains without a GPU.

    Raises:
        Refusal: C-DEEPSPEED, an unknown key, a section that cannot be used, or a value other than the only one that
            works.
    """
    for key, value in config.items():
        if key in REMOVED:
            raise Refusal(
                "C-DEEPSPEED", "DeepSpeed has removed this", file=file, key=key, fix=f"remove {key} from the file"
            )
        if key in UNUSABLE:
            if key not in REPLACING and isinstance(value, dict) and value.get("enabled") is False:
                continue
            why, instead = UNUSABLE[key]
            fix = f"remove {key} from the file" + (f" and {instead}" if instead else "")
            raise Refusal("C-DEEPSPEED", why, file=file, key=key, fix=fix)
        if key not in USABLE:
            fix = did_you_mean(key, [*USABLE, *UNUSABLE]) or "remove it from the file"
            raise Refusal("C-DEEPSPEED", "unknown key, which DeepSpeed would ignore", file=file, key=key, fix=fix)
    for key, (wanted, why) in FIXED.items():
        found = look_up(config, key, MISSING)
        if found not in (MISSING, wanted) and found is not None:
            raise Refusal(
                "C-DEEPSPEED", why, file=file, key=key, found=found, expected="nothing" if wanted is None else wanted,
                fix="remove it from the file",
            )  # fmt: skip
    for key in ON_A_GPU:
        if use_cpu and config.get("zero_optimization", {}).get(key):
            key, fix = f"zero_optimization.{key}", "remove it from the file"
            raise Refusal("C-DEEPSPEED", "DeepSpeed has no kernels for this on a CPU", file=file, key=key, fix=fix)


def look_up(config: dict[str, Any], key: str, missing: object) -> object:
    """The value of a dotted key such as ``bf16.enabled``; ``missing`` where it or its section is not there."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return missing
        value = value[part]
    return value
