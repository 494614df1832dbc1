"""The plan check of a training run for its GPU, before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.devices import GIB, known_name
from llava_moslora.distributed import from_all_ranks
from llava_moslora.errors import Refusal
from llava_moslora.planning.duration import MEASURED_ON
from llava_moslora.planning.plan import Plan, make_plan
from llava_moslora.planning.records import of_dataset
from llava_moslora.planning.report import verdict
from llava_moslora.planning.request import Asked, make_request


def smallest_memory(device: torch.device) -> int | None:
    """Bytes of the smallest GPU of all ranks; None on a CPU. Collective."""
    if device.type != "cuda":
        return None
    return min(from_all_ranks(torch.cuda.get_device_properties(device).total_memory))


def plan_of_training(
    model: ModelSettings, data: DataSettings, adapter: AdapterSettings, training: Mapping[str, Any], dataset: Dataset,
    *, rows: np.ndarray | None = None, gpus: int, device: torch.device, memory: int, deepspeed: dict[str, Any] | None,
) -> Plan:  # fmt: skip
    """The plan of a training on CUDA devices like ``device``, with ``memory`` bytes each.

    For a GPU that is not in ``devices.DEVICES`` memory is planned too; ``--recompute auto`` then uses an H100's times
    for the order, and its workspaces, which are the largest.

    Args:
        model: with its three parts named.
        training: the training flags' values by name, ``gradient_accumulation_steps`` resolved.
        dataset: the prepared data. rows: of them that are trained on; None: all.
    """
    name = torch.cuda.get_device_properties(device).name
    known = known_name(name)
    asked = Asked(known or MEASURED_ON, gpus, tokens=1, labels=1)  # of the records: replaced below
    request = make_request(
        asked, model, data, adapter, training, training["gradient_accumulation_steps"], deepspeed, zeros={}
    )
    records = of_dataset(
        dataset, data, rows, seed=int(training.get("seed") or 0), vision=not model.text_only,
        packing=bool(training.get("packing")),
    )  # fmt: skip
    request = replace(request, records=records, gib=memory / GIB, stands_for=None if known else name)
    return make_plan(request, with_largest=False)


def check_plan(plan: Plan) -> str:
    """The plan's first line.

    Raises:
        Refusal: M-PLAN, even the lower bound of the plan is more than the GPU has.
    """
    if plan.fits is False:
        used, capacity = plan.memory, plan.request.capacity
        raise Refusal(
            "M-PLAN", "the GPU's memory is not enough for this run", found=f"{capacity / GIB:.1f} GiB",
            expected=f"{used.low / GIB:.1f} GiB at least",
            fix="scripts/plan.py with the same flags and --suggest names settings that fit; "
            "--no_plan_check starts anyway",
        )  # fmt: skip
    return f"plan: {verdict(plan)}"
