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


def plan_as_on(script, gib: float, name: str = H100, replace=setattr) -> None:
    """Let scripts/train_vit_llm.py plan as on this GPU.

    Args:
        replace: ``setattr``, or a monkeypatch's.
    """
    smallest_memory, check_and_decide = script.smallest_memory, script.check_and_decide

    def memory(_device) -> int | None:
        with described(gib, name):
            return smallest_memory(torch.device("cuda"))

    def check(planned, args):
        with described(gib, name), patch.object(type(args), "device", torch.device("cuda")):
            return check_and_decide(planned, args)

    replace(script, "smallest_memory", memory)
    replace(script, "check_and_decide", check)


def plan_on(gib: Sequence[float]) -> None:
    """A hook for :mod:`support.warm_server`: rank R makes its plan as on an H100 with ``gib[R]`` GiB; says how its
    layers recompute."""
    import train_vit_llm

    set_recompute = train_vit_llm.set_recompute

    def set_and_say(model, way: str) -> None:
        print(f"layers recompute: {way}")
        set_recompute(model, way)

    train_vit_llm.set_recompute = set_and_say
    plan_as_on(train_vit_llm, gib[int(os.environ.get("RANK", "0"))])
