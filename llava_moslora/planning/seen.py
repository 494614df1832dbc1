"""A run's plan next to measurements of its first steps: written into the run folder, used by later plans.

Memory and time are rank 0's: ranks are alike. On a CPU, without an allocator peak and a plan, only the time is saved.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from llava_moslora.devices import GIB
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json, replace_json
from llava_moslora.planning.plan import Plan
from llava_moslora.planning.setting import Pair

PLAN = "plan.json"
PLANNER = 2  # incremented when plans of the same setting change: a run is only compared with plans of the same version
STEPS, WARM_UP = 20, 5  # measured steps after a start; the first ones compile kernels and fill the allocator


class SeenSteps(TrainerCallback):
    """After ``STEPS`` steps: prints planned against measured values and writes both into ``plan.json``, on rank 0.

    Args:
        run: the run folder.
        plan: of this run, or None.
    """

    def __init__(self, run: Path, plan: Plan | None):
        self.run, self.plan = run, plan
        self.ends: list[float] = []  # wall-clock seconds of steps

    def on_train_begin(self, args, state, control, **_):
        self.ends = [time.monotonic()]

    def on_step_end(self, args, state, control, **_):
        if not state.is_world_process_zero or len(self.ends) > STEPS:
            return
        self.ends.append(time.monotonic())
        if len(self.ends) <= STEPS:
            return
        # the median, because some steps also saved or evaluated
        steps = [after - before for before, after in zip(self.ends[WARM_UP:], self.ends[WARM_UP + 1 :], strict=False)]
        pair = {"planned": planned(self.plan), "seen": {"step_seconds": statistics.median(steps)} | memory(args.device)}
        replace_json(self.run / PLAN, pair | {"steps": [state.global_step - STEPS + 1, state.global_step]})
        tqdm.write(line(pair))


def planned(plan: Plan | None) -> dict[str, Any] | None:
    """The part of ``plan`` that can be measured; sizes in bytes."""
    if plan is None:
        return None
    request = plan.request
    return {
        "planner": PLANNER,
        "gpu": request.device_name,
        "gpus": request.gpus,
        "recompute": request.choice.recompute,
        "bits": request.choice.bits,
        "peak": plan.memory.peak,
        "step_seconds": plan.duration.step,
    }


def memory(device: torch.device) -> dict[str, Any]:
    """Peak of torch's allocator, and GPU memory in use beyond it, in bytes; for a CPU only its name."""
    if device.type != "cuda":
        return {"device": device.type}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
        "outside": total - free - torch.cuda.memory_reserved(device),
    }


def line(pair: dict[str, Any]) -> str:
    """One line for the log."""
    said, seen = pair["planned"], pair["seen"]
    last = f"after {STEPS} steps: {seen['step_seconds']:.2f} s a step"
    if said is not None:
        last += f" (planned {said['step_seconds']:.2f})"
    if "peak_allocated" in seen:
        last += f", peak {seen['peak_allocated'] / GIB:.1f} GiB"
        last += "" if said is None else f" (planned {said['peak'] / GIB:.1f})"
    else:
        last += f"; a {seen['device']} has no memory statistics"
    return f"{last}; kept in {PLAN}"


def read_pair(run: Path) -> Pair | None:
    """Of a run folder; None where its run had no plan of this version, or ended before ``STEPS`` steps.

    Raises:
        Refusal: K-JSON, the file is damaged.
    """
    if not (run / PLAN).is_file():
        return None
    found = read_json(run / PLAN)
    try:
        said, seen = found["planned"], found["seen"]
        if said is None or said.get("planner") != PLANNER or "peak_reserved" not in seen:
            return None
        return Pair(
            run=str(run), gpu=said["gpu"], recompute=said["recompute"], bits=said["bits"],
            memory=max(seen["peak_allocated"], seen["peak_reserved"]) / said["peak"], outside=seen["outside"],
            time=seen["step_seconds"] / said["step_seconds"],
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        fix = "delete it: it is written again when the run starts"
        raise Refusal("K-JSON", "not the plan of a run", file=run / PLAN, found=error, fix=fix) from error
