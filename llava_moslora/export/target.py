"""What a target is: which weights go where, the small files beside them, and how stock libraries open the result."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llava_moslora.errors import Refusal
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import PlannedTensor, WeightFiles
from llava_moslora.files.json import write_json
from llava_moslora.models.llm import with_old_rope
from llava_moslora.models.towers import CLIP, kind_of


@dataclass(frozen=True)
class Layout:
    """One target's folder, before anything is written.

    Attributes:
        finish: writes the configurations, tokenizer and processor files into the folder.
        reopen: for ``probe.py``, what to load: ``llava``, ``adapter``, or ``llm``, ``llm_adapter``, ``vision``,
            ``vision_adapter``, ``projector``; relative to the folder, or the absolute path of a base.
        merged: whether the adapters are in the weights; False: they lie beside an original base.
        unproven: why no stock library can reopen it, if none can.
        rounded: parts whose weights were rounded to the dtype of the export, ``llm`` and ``vision`` and ``projector``.
    """

    weights: list[WeightFiles]
    finish: Callable[[Path], None]
    reopen: dict[str, str]
    merged: bool
    rounded: tuple[str, ...] = ()
    unproven: str | None = None


def renamed(tensors: Iterable[PlannedTensor], *prefixes: tuple[str, str]) -> list[PlannedTensor]:
    """The plan under other names; the first prefix that fits is replaced."""
    result = []
    for planned in tensors:
        old, new = next(pair for pair in prefixes if planned.name.startswith(pair[0]))
        result.append(replace(planned, name=new + planned.name[len(old) :]))
    return result


def check_clip(trained: TrainedRun, name: str) -> None:
    """Refuse a target whose readers take every tower for a CLIP and drop its first token.

    Raises:
        Refusal: C-FORMAT
    """
    if (kind := kind_of(trained.vision_config)) is not CLIP:
        raise Refusal(
            "C-FORMAT", "its readers know CLIP towers only", file=trained.vision_spec, key=f"--format {name}",
            found=kind.model.__name__, expected=CLIP.model.__name__, fix="--format hf takes every tower",
        )  # fmt: skip


def llm_config(config: PreTrainedConfig, vocabulary: int, dtype: torch.dtype) -> PreTrainedConfig:
    """The LLM's configuration as exported: with rows for appended tokens, and a head of its own."""
    config = copy.deepcopy(config)
    config.vocab_size = vocabulary
    config.tie_word_embeddings = False
    # A part's own dtype outranks the whole's on loading, and would round what was just merged in a wider one.
    config.dtype = dtype
    return config


def vision_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.dtype = dtype
    return config


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """``config.json`` with the rotary settings in both spellings: older readers do not see the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    file = folder / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    if "text_config" in raw:
        raw["text_config"] = with_old_rope(raw["text_config"])
    write_json(file, with_old_rope(raw))
