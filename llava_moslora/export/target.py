"""Export targets (``--format``): objects that plan a folder and describe its use.

A new target is one file in ``export/targets/`` with one :class:`Target`, its row in
:data:`llava_moslora.export.export.TARGETS`, and its summary in :data:`llava_moslora.export.formats.FORMATS`.
``--help``, docs/export.md and the model card are made from the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_moslora.adapters.methods import METHODS
from llava_moslora.errors import Refusal
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles
from llava_moslora.models.names import PARTS
from llava_moslora.models.towers import CLIP, kind_of


@dataclass(frozen=True)
class ExportPlan:
    """The planned content of a target's folder for one run; nothing is written yet, and no base weight is read.

    Attributes:
        weights: every weight file with its tensors' names and shapes.
        write_files: writes all other files (configurations, tokenizer, processor) into the folder.
        load_from: where ``probe.py`` loads each part from: ``llava`` and ``adapter``, or ``llm``, ``llm_adapter``,
            ``vision``, ``vision_adapter``, ``projector``. Relative to the folder, or the absolute path of a base.
        rounded: the parts (:mod:`llava_moslora.models.names`) whose weights are rounded to ``--dtype``.
        not_provable: reason why no stock library can load the result, if so.
    """

    weights: list[WeightFiles]
    write_files: Callable[[Path], None]
    load_from: dict[str, str]
    rounded: tuple[str, ...] = ()
    not_provable: str | None = None


@dataclass(frozen=True)
class Target:
    """One export target.

    Attributes:
        name: in ``export.json``, the proof and the model card.
        summary: what the folder is and which tools load it, in one sentence.
        usage: Python that loads the folder, for the model card, which fills in ``FOLDER``, ``TEMPLATE`` (XTuner's name
            of the prompt template), ``VISION_CLASS`` and ``CLASS_TOKENS`` (of the vision tower), ``MAX_LORA_RANK``.
        text_usage: as ``usage``, for a text-only run; None if the target does not support one.
        plan: takes a run and the dtype of merged weights; raises ``Refusal`` (C-FORMAT) for an unsupported run.
        merged: the parts (:mod:`llava_moslora.models.names`) whose adapters are merged; the others' are saved as
            adapters over the original weights.
    """

    name: str
    summary: str
    usage: str
    plan: Callable[[TrainedRun, torch.dtype], ExportPlan]
    merged: tuple[str, ...] = tuple(PARTS)
    text_usage: str | None = None


def check_clip(trained: TrainedRun, name: str) -> None:
    """Refuse (C-FORMAT) a target whose readers treat every vision tower as a CLIP and drop its first token."""
    if (kind := kind_of(trained.vision_config)) is not CLIP:
        raise Refusal(
            "C-FORMAT", "its readers support only CLIP towers", file=trained.vision_spec, key=f"--format {name}",
            found=kind.model.__name__, expected=CLIP.model.__name__, fix="--format hf supports every tower",
        )  # fmt: skip


def check_text_only(trained: TrainedRun, targets: Mapping[str, Target]) -> None:
    """Refuse (C-FORMAT) targets that do not support a text-only run, if ``trained`` is one."""
    unfit = [name for name, target in targets.items() if trained.text_only and target.text_usage is None]
    if unfit:
        raise Refusal(
            "C-FORMAT", "the run is text-only", file=trained.run, key=f"--format {unfit[0]}",
            expected="--format llm (merged) or peft (plain LoRA)", fix="choose one of these",
        )  # fmt: skip


def check_adapters(trained: TrainedRun, name: str) -> None:
    """Refuse (C-FORMAT) a target that consists of adapters for a run of stage 1, which has none."""
    if trained.adapter is None:
        raise Refusal(
            "C-FORMAT", "stage 1 trains only the projector", file=trained.run, key=f"--format {name}",
            fix="--format projector",
        )  # fmt: skip


def check_lora(trained: TrainedRun, name: str) -> None:
    """Refuse (C-FORMAT) a plain-LoRA target for a run whose adapters are not a product of A and B."""
    row = METHODS[trained.record.adapter.method]
    if trained.adapter is not None and not row.own_layer:
        raise Refusal(
            "C-FORMAT", "its readers support only plain LoRA", file=trained.run, key=f"--format {name}",
            found=f"--method {trained.record.adapter.method}", fix="--format hf (merged), or peft (PEFT's own type)",
        )  # fmt: skip
