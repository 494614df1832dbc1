"""Each flag of transformers' ``TrainingArguments``: honoured, or refused with what to use instead.

docs/flags.md shows the table. A version of transformers with a flag that is not listed here fails
``tests/training/test_trainer_flags.py``; for users such a flag is refused if its value differs from the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llava_moslora.config import SAVING, SPEED, TRAINING, TrainerSettings
from llava_moslora.errors import Refusal
from llava_moslora.flags import Flag, flags_of
from llava_moslora.training.trainer_fields import trainer_fields


@dataclass(frozen=True)
class Honoured:
    """A flag with its documented effect.

    Attributes:
        test: the test that shows it; a bare name is one of ``tests/training/test_trainer_flags.py``.
        help, group: text and heading in --help, for commonly used flags.
        needs: another flag and the values of it that this flag needs to have an effect.
    """

    test: str
    help: str = ""
    group: str = ""
    needs: tuple[str, tuple] | None = None


@dataclass(frozen=True)
class Refused:
    """A flag that would have no effect here, or a harmful one; a value other than its default is refused."""

    why: str
    instead: str = "omit it"


SETTINGS, LOADER, OPTIMIZER = (
    "test_settings_of_a_step",
    "test_the_data_loaders_settings",
    "test_the_optimizers_settings",
)
LOGS, SAVES, NAMES = "test_what_is_logged", "test_what_is_saved", "test_names_for_trackers"
ZERO, VALIDATION = "tests/training/test_zero.py", "tests/training/test_validation.py"
EVALUATIONS = f"{VALIDATION}::test_evaluations_are_due_when_transformers_evaluates"
HUB = Refused("nothing is uploaded while training", "export the run and upload the export")
FSDP = Refused("checkpoints are made for DeepSpeed", "--deepspeed zero_configs/zero3.json")
DDP = Honoured("test_ranks_without_deepspeed", needs=("deepspeed", (None,)))
ORDER = Refused("this package has its own order of the records", "--data_order, --data_group")
COMPILE = "test_torch_compile"
LIGER = "tests/training/test_trainer.py::test_ligers_kernels_compute_the_same"
TRACKERS = ("report_to", ("wandb", "mlflow", "trackio", "comet_ml", "swanlab", "all"))
TRACKIO = ("report_to", ("trackio", "all"))
WITH_ARGS = ("sgd", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "ademamix", "ademamix_8bit",
             "paged_ademamix_32bit", "paged_ademamix_8bit")  # fmt: skip
ONE_COPY = Refused("rank 0 writes one run folder that all hosts share", "omit it")

FLAGS: dict[str, Honoured | Refused] = {
    "output_dir": Honoured("tests/training/test_arguments.py::test_missing_output_dir_is_named"),
    # Length and size of the training
    "per_device_train_batch_size": Honoured(SETTINGS, "records per micro-batch and rank", TRAINING),
    "num_train_epochs": Honoured("test_epochs", "number of epochs", TRAINING),
    "max_steps": Honoured(SETTINGS, "-1: as many as --num_train_epochs makes", TRAINING),
    "gradient_accumulation_steps": Honoured(
        "tests/training/test_arguments.py::test_the_global_batch_and_its_parts_agree"
    ),
    "average_tokens_across_devices": Honoured("test_tokens_of_all_ranks"),
    "auto_find_batch_size": Refused(
        "the global batch must not depend on free memory",
        "--global_batch_size with a smaller --per_device_train_batch_size",
    ),
    # Optimizer and schedule
    "learning_rate": Honoured(OPTIMIZER, "peak learning rate of the LLM's adapters", TRAINING),
    "lr_scheduler_type": Honoured(OPTIMIZER),
    "lr_scheduler_kwargs": Honoured(OPTIMIZER),
    "warmup_steps": Honoured(OPTIMIZER),
    "optim": Honoured(OPTIMIZER, "adamw_torch_fused | adamw_bnb_8bit | lion_32bit | sgd | …", TRAINING),
    "optim_args": Honoured("test_arguments_of_an_optimizer", needs=("optim", WITH_ARGS)),
    "optim_target_modules": Refused("GaLore and APOLLO change full weights", "--lora_target_modules"),
    "weight_decay": Honoured(OPTIMIZER, "weight decay, on matrices only", TRAINING),
    "adam_beta1": Honoured(OPTIMIZER),
    "adam_beta2": Honoured(OPTIMIZER),
    "adam_epsilon": Honoured(OPTIMIZER),
    "max_grad_norm": Honoured(OPTIMIZER, "clip the gradient norm to this value; 0: no clipping"),
    "label_smoothing_factor": Refused("the loss has no label smoothing"),
    "neftune_noise_alpha": Honoured("test_neftune_changes_the_embeddings"),
    # Randomness
    "seed": Honoured(SETTINGS, "seed of adapters, dropout and data order", TRAINING),
    "data_seed": Honoured(SETTINGS),
    "full_determinism": Honoured("test_full_determinism"),
    # Precision, memory and speed
    "deepspeed": Honoured(ZERO, "DeepSpeed config, required for 16 bits: zero_configs/*.json", SPEED),
    "bf16": Honoured(ZERO, "train in bfloat16", SPEED),
    "fp16": Honoured(ZERO),
    "tf32": Honoured("test_tf32"),
    "use_cpu": Honoured("test_use_cpu"),
    "gradient_checkpointing": Honoured("test_checkpointing_by_either_name"),
    "activation_checkpointing": Honoured("test_checkpointing_by_either_name"),
    "gradient_checkpointing_kwargs": Refused("activation checkpointing is one setting here", "--recompute"),
    "activation_checkpointing_kwargs": Refused("activation checkpointing is one setting here", "--recompute"),
    "torch_compile": Honoured(COMPILE),
    "torch_compile_backend": Honoured(COMPILE),
    "torch_compile_mode": Honoured(COMPILE),
    "use_liger_kernel": Honoured(LIGER),
    "liger_kernel_config": Honoured("test_ligers_settings", needs=("use_liger_kernel", (True,))),
    "torch_empty_cache_steps": Honoured(SETTINGS),
    "use_cache": Refused("training has no KV cache"),
    "fsdp": FSDP,
    "fsdp_config": FSDP,
    "parallelism_config": FSDP,
    "accelerator_config": Refused("the data loader is not accelerate's"),
    "ddp_find_unused_parameters": DDP,
    "ddp_bucket_cap_mb": DDP,
    "ddp_broadcast_buffers": DDP,
    "ddp_static_graph": DDP,
    "ddp_backend": Refused("it follows from the device: nccl or gloo"),
    "ddp_timeout": Honoured("tests/training/test_watchdog.py"),
    "local_rank": Honoured("test_local_rank_is_the_launchers"),
    # Data
    "dataloader_num_workers": Honoured(LOADER),
    "dataloader_pin_memory": Honoured(LOADER),
    "dataloader_persistent_workers": Honoured(LOADER),
    "dataloader_prefetch_factor": Honoured(LOADER),
    "dataloader_drop_last": Refused("the last global batch is filled up, no record is dropped"),
    "dataloader_multiprocessing_context": Refused("the data loader's processes are forked"),
    "dataloader_in_order": Refused("a resumed run needs the same order of the records", "leave it True"),
    "remove_unused_columns": Refused("the collator reads columns that would be dropped", "leave it False"),
    "ignore_data_skip": Refused("the data loader itself starts where the run stopped", "leave it True"),
    "label_names": Refused("the labels are fixed"),
    "train_sampling_strategy": ORDER,
    "length_column_name": ORDER,
    # Logging
    "logging_strategy": Honoured(LOGS),
    "logging_steps": Honoured(LOGS),
    "logging_first_step": Honoured(LOGS),
    "report_to": Honoured("tests/training/callbacks/test_callbacks.py"),
    "run_name": Honoured(NAMES, needs=TRACKERS),
    "project": Honoured(NAMES, needs=TRACKIO),
    "trackio_space_id": Honoured(NAMES, needs=TRACKIO),
    "trackio_bucket_id": Honoured(NAMES, needs=TRACKIO),
    "trackio_static_space_id": Honoured(NAMES, needs=TRACKIO),
    "log_level": Honoured("test_log_levels"),
    "log_level_replica": Honoured("test_log_levels"),
    "disable_tqdm": Honoured("test_the_progress_bar"),
    "log_on_each_node": Refused("rank 0 alone logs", "leave it True"),
    "logging_nan_inf_filter": Refused("a loss that is NaN or Inf stops the run", "leave it False"),
    "include_num_input_tokens_seen": Refused("padding would count too", "tokens_per_second in metrics.jsonl"),
    "skip_memory_metrics": Refused("metrics.jsonl has the peak memory of a GPU", "leave it True"),
    "debug": Refused("a loss or gradient that is not finite stops the run and names its records"),
    # Saving and resuming
    "save_strategy": Honoured(SAVES),
    "save_steps": Honoured(SAVES, "save every N steps; below 1: a share of all steps", SAVING),
    "save_total_limit": Honoured(SAVES, "keep the newest N checkpoints; default: all", SAVING),
    "save_only_model": Refused("a run must be able to resume", "export.py converts a checkpoint to a model"),
    "save_on_each_node": ONE_COPY,
    "enable_jit_checkpoint": Refused("SIGTERM and Ctrl-C always save a checkpoint"),
    "resume_from_checkpoint": Refused(
        "a run resumes from the newest valid checkpoint in its --output_dir, not from a named one",
        "use --resume True",
    ),
    "restore_callback_states_from_checkpoint": Refused("a resumed run always restores its state"),
    # What the script is for
    "do_train": Refused("this script always trains"),
    "do_predict": Refused("this script trains", "scripts/evaluate.py"),
    "push_to_hub": HUB,
    "hub_token": HUB,
    "hub_private_repo": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    # Evaluation during the training
    "eval_strategy": Honoured(EVALUATIONS, "evaluate the validation data", TRAINING),
    "eval_steps": Honoured(EVALUATIONS),
    "eval_delay": Honoured(EVALUATIONS),
    "eval_on_start": Honoured(EVALUATIONS),
    "per_device_eval_batch_size": Honoured(f"{VALIDATION}::test_losses_are_those_of_a_plain_loop"),
    "load_best_model_at_end": Honoured(f"{VALIDATION}::test_the_best_is_exported"),
    "metric_for_best_model": Honoured(f"{VALIDATION}::test_early_stopping_keeps_the_best_next_to_the_newest"),
    "greater_is_better": Honoured(f"{VALIDATION}::test_without_improvement_counts_as_transformers_does"),
    "do_eval": Refused("--eval_strategy sets whether and when", "--eval_strategy steps"),
    **dict.fromkeys(
        ("prediction_loss_only", "batch_eval_metrics", "eval_use_gather_object", "bf16_full_eval", "fp16_full_eval"),
        Refused("evaluations compute loss and token accuracy, in the precision of the training"),
    ),
    **dict.fromkeys(
        ("eval_accumulation_steps", "eval_do_concat_batches", "include_for_metrics"),
        Refused("evaluations keep no predictions"),
    ),
}  # fmt: skip

# Flags of earlier transformers and of LLaVA's own script → what does the same here
FORMER: dict[str, str] = {
    "evaluation_strategy": "--eval_strategy",
    "warmup_ratio": "--warmup_steps, below 1 a share of all steps",
    "group_by_length": "--data_order modality_length, the default",
    "group_by_modality_length": "omit it: --data_order modality_length is the default",
    "no_cuda": "--use_cpu",
    "use_mps_device": "omit it",
    "overwrite_output_dir": "--overwrite",
    "save_safetensors": "omit it: nothing else is saved",
    "logging_dir": "omit it: logs are in --output_dir",
    "past_index": "omit it",
    "jit_mode_eval": "omit it",
    "tpu_num_cores": "omit it: TPUs are not supported",
    "torchdynamo": "--torch_compile_backend",
    "include_tokens_per_second": "omit it: metrics.jsonl has tokens_per_second",
    "lora_enable": "omit it: adapters are trained unless --lora_r is 0",
    "lora_weight_path": "--resume True",
    "lazy_preprocess": "omit it",
    "is_multimodal": "omit it",
    "freeze_backbone": "omit it: only adapters and the projector are trained",
    "mm_projector_type": "omit it: it follows from --pretrain_mm_mlp_adapter",
    "mm_vision_select_layer": "omit it: features are from the penultimate layer",
    "mm_use_im_start_end": "omit it",
    "mm_use_im_patch_token": "omit it",
    "quant_type": "omit it: --bits 4 is nf4",
    "double_quant": "omit it: --bits 4 quantises twice",
    "cache_dir": "omit it: nothing is downloaded",
}


def flags() -> list[Flag]:
    """The Trainer's flags with this package's defaults; commonly used ones have a heading in --help."""
    known = {**trainer_fields(), **{flag.name: flag for flag in flags_of(TrainerSettings)}}
    for name, rule in FLAGS.items():
        if name in known and isinstance(rule, Honoured) and rule.help:
            known[name] = replace(known[name], help=rule.help, group=rule.group)
    for name, flag in known.items():
        if flag.choices is None and name in trainer_fields():
            known[name] = replace(flag, choices=trainer_fields()[name].choices)
    return list(known.values())


def check_flags(values: Mapping[str, Any]) -> None:
    """Refuse flags that would have no effect.

    Args:
        values: of the given Trainer flags, or of all of them.

    Raises:
        Refusal: C-FLAG, naming the flag and what to use instead.
    """
    for flag in flags():
        name, value = flag.name, values.get(flag.name, flag.default)
        if value == flag.default:
            continue
        rule = FLAGS.get(name, Refused("this version of transformers has it, but its effect here was never tested"))
        if isinstance(rule, Refused):
            raise Refusal("C-FLAG", rule.why, key=f"--{name}", found=value, fix=rule.instead)
        if isinstance(rule, Honoured) and rule.needs is not None:
            _check_other(name, value, values, rule.needs)
    local, expected = values.get("local_rank", -1), os.environ.get("LOCAL_RANK", "-1")
    if local != -1 and str(local) != expected:
        raise Refusal(
            "C-FLAG", "the launcher sets it", key="--local_rank", found=local, expected=expected, fix="omit it"
        )


def _check_other(name: str, found: object, values: Mapping[str, Any], needs: tuple[str, tuple]) -> None:
    """Refuse (C-FLAG) a flag that has an effect with certain values of another flag only."""
    other, wanted = needs
    given = values.get(other)
    if any(value in wanted for value in (given if isinstance(given, list) else [given])):
        return
    if wanted == (None,):
        raise Refusal("C-FLAG", f"no effect with --{other}", key=f"--{name}", found=found, fix="omit it")
    expected = f"--{other} " + " | ".join(str(value) for value in wanted if value != "all")
    raise Refusal("C-FLAG", f"no effect without --{other}", key=f"--{name}", found=found, expected=expected)
