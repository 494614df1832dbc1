"""``TrainingArguments``: this package's training settings on top of those of transformers' Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainingArguments as HfTrainingArguments

from llava_moslora.adapters.dropout import mask_source
from llava_moslora.config import AUTO, DataSettings, ModelSettings, TrainerSettings, TrainingSettings, parse_recompute
from llava_moslora.data.loader import default_workers
from llava_moslora.data.sources.saved_dataset import is_hub
from llava_moslora.data.split import eval_files
from llava_moslora.distributed import world_size
from llava_moslora.errors import Refusal
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP
from llava_moslora.training.command_line import accumulation_steps, early
from llava_moslora.training.evaluation_flags import resolve_evaluation
from llava_moslora.training.trainer_fields import check_fields


@dataclass
class TrainingArguments(TrainingSettings, TrainerSettings, HfTrainingArguments):
    """This package's training settings and those of transformers' Trainer, some with a different default.

    With DeepSpeed the process group must have been joined before (:mod:`llava_moslora.training.process_group`).

    Raises:
        Refusal: C-FLAG, inconsistent values; E-LAUNCH, one process that sees several GPUs.
    """

    def __post_init__(self):
        TrainingSettings.__post_init__(self)
        check_fields(HfTrainingArguments)
        if self.dataloader_num_workers < 0:
            self.dataloader_num_workers = default_workers()
        if not torch.cuda.is_available():
            self.use_cpu = True  # without it the Trainer refuses bf16 and assumes one process
        self._set_recompute()
        self._set_accumulation()
        resolve_evaluation(self)
        try:
            HfTrainingArguments.__post_init__(self)
        except Refusal:
            raise
        except (ValueError, ImportError, OverflowError) as error:  # the Trainer's own checks, in its words
            raise Refusal("C-FLAG", "inconsistent training arguments", found=error) from error
        if self.n_gpu > 1:  # the Trainer would split every batch in DataParallel, and positions of labels with it
            raise Refusal(
                "E-LAUNCH", "one process that sees several GPUs", found=f"{self.n_gpu} GPUs",
                fix="start one process per GPU: torchrun --nproc_per_node N …, or deepspeed; "
                "or let it see one GPU: CUDA_VISIBLE_DEVICES=0",
            )  # fmt: skip
        self.global_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.use_liger_kernel:
            # The loss is ours; Liger's rotary embedding overwrites its inputs, which selective recomputation saves.
            own = {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}
            given: dict[str, Any] = getattr(self, "liger_kernel_config", None) or {}
            self.liger_kernel_config = given | own

    def _set_recompute(self) -> None:
        """If ``recompute`` is not given, take it from the Trainer's switch by either name, which is then cleared: the
        Trainer's own recomputation has no selective mode."""
        asked = [self.gradient_checkpointing, self.activation_checkpointing]
        if self.recompute is None:
            self.recompute = "full" if any(asked) else "none"
        mode = AUTO if self.recompute == AUTO else parse_recompute(self.recompute)[0]
        if any(asked) and mode in ("none", AUTO):
            raise Refusal(
                "C-FLAG", "two flags that disagree", key="--gradient_checkpointing, --recompute",
                found=f"True and {mode}", fix="omit one of them",
            )  # fmt: skip
        self.gradient_checkpointing = self.activation_checkpointing = None

    def _set_accumulation(self) -> None:
        """``gradient_accumulation_steps`` from ``global_batch_size``; before DeepSpeed's file is filled from it."""
        asked = self.gradient_accumulation_steps
        if self.global_batch_size is None:
            self.gradient_accumulation_steps = 1 if asked is None else asked
            return
        ranks = world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        per_device = self.per_device_train_batch_size
        steps = accumulation_steps(self.global_batch_size, per_device, ranks)
        if asked not in (None, steps):
            raise Refusal(
                "C-FLAG", "two flags that disagree", key="--global_batch_size, --gradient_accumulation_steps",
                found=f"{self.global_batch_size} and {asked}",
                expected=f"{self.global_batch_size} = {per_device} per device × {steps} accumulated × {ranks} ranks",
                fix="omit one of them",
            )  # fmt: skip
        self.gradient_accumulation_steps = steps

    def as_record(self) -> dict[str, Any]:
        """The values for ``run.json``, and the generator of dropout masks on this device."""
        return self.to_sanitized_dict() | {"dropout_masks": mask_source(self.device)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights in memory."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def device_name(self) -> str:
        """The device of rank 0, for messages."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{self.device} (no GPU used)"

    @property
    def reporters(self) -> list[str]:
        """``report_to``, which transformers has made a list."""
        return [self.report_to] if isinstance(self.report_to, str) else self.report_to or []

    @property
    def batches(self) -> dict[str, Any]:
        """How a global batch is divided over ranks and micro-batches, for ``GlobalBatchSampler.of``."""
        return {
            "per_device_batch_size": self.per_device_train_batch_size,
            "accumulation": self.gradient_accumulation_steps,
            "world_size": self.world_size,
            "rank": self.process_index,
            "seed": self.seed if self.data_seed is None else self.data_seed,
        }


def input_paths(
    model: ModelSettings, data: DataSettings, args: TrainingArguments, argv: Sequence[str]
) -> list[tuple[str, Path]]:
    """Flag and path of all inputs of a run: none of them may be in a folder that is deleted."""
    tower = model.vision_tower or ""
    if tower.startswith(OPEN_CLIP):
        arch, at, where = tower.removeprefix(OPEN_CLIP).partition("@")
        tower = where if at else arch
    files = [("--data_path", path) for path in data.data_path]
    files += [("--eval_data_path", path) for path in eval_files(data).values()]
    files += [("--sample_questions", path) for path in [args.sample_questions] if path]
    given: list[tuple[str, str | None]] = [
        ("--model_name_or_path", model.model_name_or_path),
        ("--vision_tower", tower if os.path.exists(tower) else None),  # not one of open_clip's tags
        ("--pretrain_mm_mlp_adapter", model.pretrain_mm_mlp_adapter),
        *((flag, path) for flag, path in files if "://" not in path and not is_hub(path)),
        ("--image_folder", data.image_folder),
        ("--sample_image_folder", args.sample_image_folder),
        ("--deepspeed", args.deepspeed),
        ("--config", early(argv).config),
    ]
    return [(flag, Path(path)) for flag, path in given if path]
