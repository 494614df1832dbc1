"""Trainings that run on a CPU and make their plan as on GPUs that are only described."""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from unittest.mock import patch

import torch

from llava_moslora.devices import GIB

H100 = "NVIDIA H100 80GB HBM3"


def described(gib: float, name: str = H100):
    """A context: torch says of every GPU that it is this one."""
    gpu = SimpleNamespace(name=name, total_memory=round(gib * GIB))
    return patch.object(torch.cuda, "get_device_properties", lambda _: gpu)


def planned_on(script, gib: float, name: str = H100):
    """``plan_first`` of scripts/train_vit_llm.py, as on this GPU."""
    plan_first = script.plan_first

    def plan(*settings):
        with described(gib, name), patch.object(type(settings[3]), "device", torch.device("cuda")):
            return plan_first(*settings)

    return plan


def plan_on(gib: Sequence[float]) -> None:
    """A hook for :mod:`support.warm_server`: rank R makes its plan as on an H100 with ``gib[R]`` GiB; says how its
    layers recompute."""
    import train_vit_llm

    set_recompute = train_vit_llm.set_recompute

    def set_and_say(model, way: str) -> None:
        print(f"layers recompute: {way}")
        set_recompute(model, way)

    train_vit_llm.set_recompute = set_and_say
    train_vit_llm.plan_first = planned_on(train_vit_llm, gib[int(os.environ.get("RANK", "0"))])
