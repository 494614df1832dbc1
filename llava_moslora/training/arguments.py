"""The flags of ``scripts/train_vit_llm.py``: the settings of :mod:`llava_moslora.config` and transformers' own.

The same fields can come from one YAML or JSON file (``--config FILE``), over which the command line wins.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, make_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from torch import distributed
from transformers import HfArgumentParser
from transformers import TrainingArguments as HfTrainingArguments

from llava_moslora.adapters.kernel import mask_source
from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings, TrainingSettings, setting
from llava_moslora.data.loader import default_workers
from llava_moslora.data.sources.saved_dataset import is_hub
from llava_moslora.distributed import world_size
from llava_moslora.errors import Refusal
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP
from llava_moslora.recompute import parse_recompute
from llava_moslora.training.config_file import read_config
from llava_moslora.training.deepspeed_config import read_deepspeed_config

# The Trainer's switch for full recomputation: transformers renamed it in 5.23.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


@dataclass
class TrainingArguments(TrainingSettings, HfTrainingArguments):
    """This package's training settings and those of transformers' Trainer, some with another default.

    With DeepSpeed the process group must have been joined before (:mod:`llava_moslora.training.process_group`).

    Raises:
        Refusal: C-FLAG, values that do not go together.
    """

    gradient_accumulation_steps: int | None = setting(
        None, "micro-batches per optimizer step; default: as --global_batch_size asks, or 1"
    )
    logging_steps: float = setting(1, "log every N steps; below 1: a share of all steps")
    logging_nan_inf_filter: bool = setting(False, "no effect: a loss that is NaN or Inf stops the run")
    report_to: None | str | list[str] = setting(  # noqa: RUF009, RUF036 (the parser needs None first)
        "tensorboard", "besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, or none"
    )
    remove_unused_columns: bool = setting(False, "leave it False: the collator reads columns that would be dropped")
    dataloader_num_workers: int = setting(-1, "processes per rank that read images; -1: as the cores allow, at most 8")
    dataloader_persistent_workers: bool = setting(True, "keep the data loader's processes between epochs")
    ignore_data_skip: bool = setting(True, "leave it True: the data loader itself starts where the run stopped")
    lr_scheduler_type: str = setting("cosine", "schedule of the learning rate, a name of transformers' SchedulerType")
    warmup_steps: float = setting(0.03, "warmup of the learning rate in steps; below 1: a share of all steps")

    def __post_init__(self):
        TrainingSettings.__post_init__(self)
        if self.dataloader_num_workers < 0:
            self.dataloader_num_workers = default_workers()
        if not torch.cuda.is_available():
            self.use_cpu = True  # without it the Trainer refuses bf16 and counts one process
        self._set_recompute()
        self._set_accumulation()
        try:
            HfTrainingArguments.__post_init__(self)
        except Refusal:
            raise
        except (ValueError, ImportError, OverflowError) as error:  # the Trainer's own checks, in its words
            raise Refusal("C-FLAG", "the training arguments do not go together", found=error) from error
        self.global_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.use_liger_kernel:
            # The loss is ours; Liger's rotary embedding writes over its inputs, which selective recomputation keeps.
            own = {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}
            given: dict[str, Any] = getattr(self, "liger_kernel_config", None) or {}
            self.liger_kernel_config = given | own

    def _set_recompute(self) -> None:
        """``recompute``, where it is not given, from the Trainer's switch (``CHECKPOINTING``), which is then cleared:
        the Trainer's own recomputation has no selective mode."""
        asked = [on for name in CHECKPOINTING if (on := getattr(self, name, None)) is not None]
        if self.recompute is None:
            self.recompute = "full" if any(asked) else "none"
        mode, _ = parse_recompute(self.recompute)
        if any(asked) and mode == "none":
            raise Refusal(
                "C-FLAG", "two flags that disagree", key="--gradient_checkpointing, --recompute",
                found="True and none", fix="leave one of the two out",
            )  # fmt: skip
        for name in CHECKPOINTING:
            if hasattr(self, name):
                setattr(self, name, None)
            if getattr(self, name + "_kwargs", None):
                raise Refusal("C-FLAG", "not supported", key=f"--{name}_kwargs", fix="use --recompute instead")

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
                fix="leave one of the two out",
            )  # fmt: skip
        self.gradient_accumulation_steps = steps

    def as_record(self) -> dict[str, Any]:
        """The values as ``run.json`` has them, and where dropout's masks come from on this device."""
        return self.to_sanitized_dict() | {"dropout_masks": mask_source(self.device)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights in memory."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

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


def accumulation_steps(global_batch_size: int, per_device: int, ranks: int) -> int:
    """Micro-batches of ``per_device`` records that make ``global_batch_size`` on ``ranks`` ranks.

    Raises:
        Refusal: C-FLAG, no number of them is exactly ``global_batch_size``.
    """
    micro_batch = max(per_device, 1) * ranks  # a batch size below 1 is refused later (validate.py)
    steps, rest = divmod(global_batch_size, micro_batch)
    if steps > 0 and not rest:
        return steps
    nearest = [k * micro_batch for k in (steps, steps + 1) if k > 0]
    smaller = [n for n in range(per_device, 0, -1) if global_batch_size > 0 and global_batch_size % (n * ranks) == 0]
    fixes = [f"--global_batch_size {' or '.join(map(str, nearest))}"]
    fixes += [f"--per_device_train_batch_size {n}" for n in smaller[:1]]
    raise Refusal(
        "C-FLAG", "not a multiple of what the ranks compute at a time", key="--global_batch_size",
        found=global_batch_size, expected=f"a multiple of {micro_batch} = {per_device} per device × {ranks} ranks",
        fix=", or ".join(fixes),
    )  # fmt: skip


ARGUMENTS = (ModelSettings, DataSettings, AdapterSettings, TrainingArguments)


class FlagParser(HfArgumentParser):
    """Flags from the fields of dataclasses; a wrong one is a :class:`Refusal` (C-FLAG) that names it."""

    def __init__(self, groups: Sequence[type], description: str | None = None):
        super().__init__(
            groups,
            description=description,
            usage="%(prog)s --FLAG VALUE ...",  # argparse's own would be several screens of Trainer flags
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
        )

    def error(self, message: str) -> NoReturn:
        raise Refusal("C-FLAG", message, fix="see --help")

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The value of every flag, by name.

        Raises:
            Refusal: an unknown flag (with the nearest name), a missing one, a value of the wrong type or no choice.
        """
        try:
            namespace, unknown = self.parse_known_args(argv)
        except argparse.ArgumentError as error:
            flag = (error.argument_name or "").split("/")[0]
            raise Refusal("C-FLAG", error.message, key=flag or None, fix="see --help") from error
        known = set(vars(namespace))
        for word in unknown:
            if word.startswith("-"):
                raise Refusal("C-FLAG", "unknown flag", key=word.split("=")[0], fix=nearest_flag(word, known))
        if unknown:
            raise Refusal("C-FLAG", "a value without a flag", found=" ".join(unknown))
        return vars(namespace)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written; per flag one spelling (not also the one with dashes) and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        values = self._format_args(action, "True|False" if action.nargs == "?" else "VALUE")
        return " ".join([", ".join(names), values if len(values) < 80 else "VALUE"]).rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):  # HfArgumentParser adds --no_X for an X that is True
            return f"as --{action.dest} False"
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


def some_fields(settings: type, names: Collection[str], heading: str) -> type:
    """A dataclass of those fields of the dataclass ``settings``, as a group of flags under ``heading`` in --help."""
    types = get_type_hints(settings)
    chosen = [(f.name, types[f.name], copy.copy(f)) for f in fields(settings) if f.name in names]
    return make_dataclass(settings.__name__, chosen, namespace={"_argument_group_name": heading})


def parse(
    argv: Sequence[str], description: str | None = None
) -> tuple[ModelSettings, DataSettings, AdapterSettings, dict[str, Any]]:
    """The settings from a command line; those of training as the values to build :class:`TrainingArguments` from.

    They are not built here, because transformers' part initialises the device and the process group, which this
    package joins first. What can be refused without them is refused here.

    Raises:
        Refusal: as :meth:`FlagParser.parse`; a value out of range; a configuration or DeepSpeed file that is missing or
            no JSON/YAML.
    """
    own_names = {f.name for f in fields(TrainingSettings)}
    from_transformers = {f.name for f in fields(TrainingArguments)} - own_names
    heading = "training, of transformers' TrainingArguments"
    groups = (*ARGUMENTS[:3], TrainingSettings, some_fields(TrainingArguments, from_transformers, heading))
    parser = FlagParser(groups, description)
    parser.add_argument("--config", help="YAML or JSON file with the same flags")
    if file := _early(argv).config:
        known = {f.name for group in ARGUMENTS for f in fields(group) if f.init}
        argv = [*_as_flags(read_config(Path(file)), known, file), *argv]
    if (deepspeed := _early(argv).deepspeed) is not None:
        read_deepspeed_config(deepspeed)  # the Trainer looks into it while it reads its flags
    values = parser.parse(argv)
    model, data, adapter, training = ({f.name: values[f.name] for f in fields(g) if f.init} for g in ARGUMENTS)
    own = TrainingSettings(**{name: training[name] for name in own_names})
    if own.recompute is not None:
        parse_recompute(own.recompute)
    _check_timeout(training["ddp_timeout"])
    return ModelSettings(**model), DataSettings(**data), AdapterSettings(**adapter), training


def input_paths(
    model: ModelSettings, data: DataSettings, args: TrainingArguments, argv: Sequence[str]
) -> list[tuple[str, Path]]:
    """Flag and path of everything that a training reads: none of it may lie in a folder that is deleted."""
    tower = model.tower
    if tower.startswith(OPEN_CLIP):
        arch, at, where = tower.removeprefix(OPEN_CLIP).partition("@")
        tower = where if at else arch
    given: list[tuple[str, str | None]] = [
        ("--model_name_or_path", model.model_name_or_path),
        ("--vision_tower", tower if os.path.exists(tower) else None),  # not one of open_clip's tags
        ("--pretrain_mm_mlp_adapter", model.pretrain_mm_mlp_adapter),
        *(("--data_path", path) for path in data.data_path if "://" not in path and not is_hub(path)),
        ("--image_folder", data.image_folder),
        ("--sample_questions", args.sample_questions),
        ("--sample_image_folder", args.sample_image_folder),
        ("--deepspeed", args.deepspeed),
        ("--config", _early(argv).config),
    ]
    return [(flag, Path(path)) for flag, path in given if path]


def _early(argv: Sequence[str]) -> argparse.Namespace:
    """The files that are read before the flags are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--deepspeed")
    return parser.parse_known_args(argv)[0]


def _check_timeout(seconds: int) -> None:
    try:
        usable = timedelta(seconds=seconds) >= timedelta(seconds=1)
    except OverflowError:
        usable = False
    if not usable:
        raise Refusal("C-FLAG", "out of range", key="--ddp_timeout", found=seconds, expected="at least 1 second")


def nearest_flag(flag: str, known: set[str]) -> str:
    """Which flag was probably meant, as the ``fix`` of a refusal."""
    name = flag.lstrip("-").split("=")[0].replace("-", "_")
    close = difflib.get_close_matches(name, known, n=5)
    # people get the end of a name wrong more often than its beginning: --lora_rank means --lora_r, not --local_rank
    best = max(close, key=lambda other: len(os.path.commonprefix([name, other])), default=None)  # noqa: RUF071
    return f"did you mean --{best}?" if best else "see --help"


def _as_flags(content: dict[str, str | list[str]], known: set[str], path: str) -> list[str]:
    flags: list[str] = []
    for key, value in content.items():
        if key not in known:
            raise Refusal("C-FLAG", "unknown key", file=path, key=str(key), fix=nearest_flag(str(key), known))
        flags += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]
    return flags
