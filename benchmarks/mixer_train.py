"""One run of benchmarks/mixer.py: an arm's adapters in a fresh copy of the frozen model, trained, then measured.

Shapes: r rank, B examples of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from mixer_tasks import Task
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from llava_moslora import MosLoraConfig
from llava_moslora.adapters.fold import folded
from llava_moslora.adapters.layers import init_mixer

RANK, ALPHA = 8, 16
HEAD_RATE = 1e-2  # of the images' head, the same for every arm
WARM_UP, CLIP = 0.1, 1.0  # share of the steps; gradient norm

# arm → the mixer's init and whether it is trained; None: stock PEFT's LoraConfig
MIXERS: dict[str, tuple[str, bool] | None] = {
    "lora": None,
    "moslora_kaiming": ("kaiming_uniform", True),
    "moslora_orthogonal": ("orthogonal", True),
    "frozen_kaiming": ("kaiming_uniform", False),
    "folded_kaiming": None,
    "two_subspaces": ("butterfly", False),
}
ARMS = tuple(MIXERS)


@dataclass(frozen=True)
class Run:
    """What tells one run from another. ``part``: where it is measured, "validation" for tuning or "test"."""

    task: str
    arm: str
    rate: float
    seed: int
    part: str


def config_of(arm: str, targets: str) -> LoraConfig:
    common = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    if (mixer := MIXERS[arm]) is None:
        return LoraConfig(**common)
    return MosLoraConfig(**common, mixer_init=mixer[0], train_mixer=mixer[1])


def add_adapters(task: Task, arm: str, seed: int) -> PeftModel:
    """The model with an arm's adapters. Every arm has the same A at a seed, the arms with a kaiming mixer the same W.

    Factors are drawn layer by layer, A before W, as PEFT and this package draw them; B is zero.
    """
    model = get_peft_model(task.fresh(), config_of(arm, task.targets))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for number, layer in enumerate(layers):
        torch.manual_seed(1_000 * seed + number)
        a = layer.lora_A["default"].weight.data  # (r, in)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if MIXERS[arm] is not None:
            init_mixer(layer.lora_mixer["default"].weight.data, MIXERS[arm][0])
        elif arm == "folded_kaiming":
            w = torch.empty(RANK, RANK)
            init_mixer(w, "kaiming_uniform")
            a.copy_(folded(a, w))
    return model


def batches(examples: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Numbers of the examples of each step (B): whole random orders, one after the other, the same for every arm."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(examples, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step: up in a line, then down to zero in a line."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def train(task: Task, run: Run, steps: int, batch: int) -> dict:
    """Train, then measure. ``loss`` is None where it is not finite."""
    start = time.process_time()
    model = add_adapters(task, run.arm, run.seed)
    torch.manual_seed(run.seed)
    head = task.head()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": adapters, "lr": run.rate}]
    if head is not None:
        groups.append({"params": list(head.parameters()), "lr": HEAD_RATE})
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    losses = []
    for examples in batches(task.train_examples, batch, steps, run.seed):
        loss = task.loss(model, head, examples)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        measured, accuracy = task.measure(model, head, run.part)
    last = sum(losses[-10:]) / len(losses[-10:])
    return {
        "loss": measured if math.isfinite(measured) else None,
        "accuracy": accuracy,
        "train_loss": last if math.isfinite(last) else None,  # mean of the last ten steps
        "trained_parameters": sum(parameter.numel() for parameter in adapters),
        "cpu_seconds": round(time.process_time() - start, 2),
    }
