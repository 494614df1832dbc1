"""Settings and inputs are compared on all ranks before a model is loaded: what differs would train on, with another
result, or leave the ranks waiting for each other.

Paths may differ from host to host. What lies there is compared: models by the fingerprints that a checkpoint has too,
data by their prepared records.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from datasets import Dataset

from llava_moslora._version import __version__
from llava_moslora.data.cache import content_digest
from llava_moslora.data.split import ValidationData
from llava_moslora.distributed import from_all_ranks
from llava_moslora.errors import Refusal
from llava_moslora.runs.folder import only_differing
from llava_moslora.runs.paths import PATHS
from llava_moslora.runs.record import RunSettings
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.deepspeed_config import read_deepspeed_config

# What a host may have of its own: where files lie, how fast they are read, what is printed, and the rank's number.
# Another --output_dir is refused by ``check_shared``.
FREE = {
    *("output_dir", "data_cache", "sample_questions", "sample_image_folder", "deepspeed", "local_rank"),
    *("preprocessing_num_workers", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
    *("log_level", "log_level_replica", "disable_tqdm", "hub_token", "run_name"),
    *("train_batch_size", "eval_batch_size"),  # said under their flags' names
}
SHOWN = 3  # differences in one message


def check_same_settings(args: TrainingArguments, *groups: Any) -> None:
    """Every flag of every rank, and the version of this package. Collective.

    Args:
        groups: the settings of model, data and adapter.

    Raises:
        Refusal: C-RANKS, on all ranks.
    """
    values: dict[str, Any] = {"version of llava_moslora": __version__}
    for group in groups:
        values |= {f.name: getattr(group, f.name) for f in fields(group)}
    values |= {name: _given(value) for name, value in values.items() if name in PATHS}
    values |= args.as_record()
    content = read_deepspeed_config(args.deepspeed) if args.deepspeed else None
    compared = {name: value for name, value in values.items() if name not in FREE} | {"content of --deepspeed": content}
    _check_same(compared, "start every process with the same flags and the same version of this package")


def data_read(dataset: Dataset, trained: np.ndarray, validation: ValidationData | None) -> dict[str, Any]:
    """The data of this rank, for :func:`check_same_inputs`: the number of records, and digests of those in the rows
    ``trained``, int64[n], and in each validation set."""
    read: dict[str, Any] = {"records": len(dataset), "data": content_digest(dataset, trained)}
    if validation is not None:
        read["validation"] = [content_digest(validation.dataset, rows) for rows in validation.sets.values()]
    return read


def check_same_inputs(settings: RunSettings, inputs: dict[str, Any]) -> None:
    """What every rank has read: base models, data, image-processor settings, conversation template. Collective.

    Args:
        settings: with the conversation template. inputs: fingerprints of the models, and :func:`data_read`.

    Raises:
        Refusal: C-RANKS, on all ranks.
    """
    compared = inputs | {"version": getattr(settings.model, "version", None), "image processor": settings.preprocessor}
    _check_same(compared, "give every process the same files: copy rank 0's to the other hosts")


def _check_same(values: dict[str, Any], fix: str) -> None:
    first, *others = from_all_ranks(values)
    found: dict[str, tuple[int, Any, Any]] = {}  # name → the first rank that differs, its value and rank 0's
    for number, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                found.setdefault(name, (number, *only_differing(other.get(name), first.get(name))))
    if found:
        shown, more = dict(list(found.items())[:SHOWN]), len(found) - SHOWN
        raise Refusal(
            "C-RANKS", "not the same on all ranks", key=", ".join(shown) + (f" and {more} more" if more > 0 else ""),
            found="; ".join(f"{name} {value} on rank {number}" for name, (number, value, _) in shown.items()),
            expected="; ".join(f"{name} {value}" for name, (_, _, value) in shown.items()) + ", as on rank 0",
            fix=fix,
        )  # fmt: skip


def _given(path: str | list[str] | None) -> int:
    """Of a path that may be another one on each host: how many it is."""
    return len(path) if isinstance(path, list) else int(path is not None)
