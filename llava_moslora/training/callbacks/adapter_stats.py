"""Adapter statistics during training: singular values of the mixers, norm of ΔW, gradient norms.

Shapes: r rank, k and n width of an adapted linear layer's input and output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from llava_moslora.adapters.layers import MosLoraLayer
from llava_moslora.models.names import ADAPTER_NAME, SDXL_PARTS, adapter_tensor, part_of
from llava_moslora.training.optimizer_state import trained_parameters

# part → its name in the log
LOG_NAMES = {
    "llm": "llm",
    "vision_tower": "vision",
    "lm_head": "head",
    **dict(zip(SDXL_PARTS, SDXL_PARTS, strict=True)),
}


class AdapterStats(TrainerCallback):
    """Every ``steps`` steps logs, for each part (llm, vision, head; unet, text_encoder, text_encoder_2) and over
    its adapted linear layers:

    - ``mixer/PART/largest``, ``smallest``: largest and smallest singular value of all mixers;
    - ``mixer/PART/rank``: their mean effective rank, exp of the entropy of the squared singular values' shares;
    - ``delta/PART``: ‖ΔW‖ of all layers together; ``delta_largest/PART``: the largest of one layer;
    - ``weight/PART/KIND`` in place of these if the method does not use this package's layer: norm of each kind of
      trained tensor, such as ``hada_w1_a``;
    - ``gradient/PART/FACTOR`` and ``gradient/projector``: norm of the global batch's gradient, before clipping.
    """

    def __init__(self, trainer, steps: int):
        self.trainer, self.steps = trainer, steps
        self.gradients: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **_):
        if self.trainer.engine is not None:
            # accelerate runs DeepSpeed's backward and step in one call: gradients exist only in between
            _call_before(self.trainer.engine, "step", self._measure_gradients)
        else:
            method = "_clip_grad_norm" if args.max_grad_norm > 0 else "_get_grad_norm"
            _call_before(self.trainer, method, self._measure_gradients)

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            stats = mixer_and_update_stats(self.trainer.model, full_weight) | self.gradients
            if not any(isinstance(module, MosLoraLayer) for module in self.trainer.model.modules()):
                stats |= norms("weight", self.trainer.model, full_weight, adapters_only=True)
            self.trainer.extra_logs = {name: round(value, 8) for name, value in stats.items()}
            self.gradients = {}
            control.should_log = True

    def _measure_gradients(self) -> None:
        if (self.trainer.state.global_step + 1) % self.steps == 0:
            scale = 1.0  # with fp16 the loss is scaled, and so are the gradients until the step
            if self.trainer.engine is not None and self.trainer.engine.fp16_enabled():
                scale = self.trainer.engine.optimizer.loss_scaler.cur_scale
            norms = gradient_norms(self.trainer.model, full_gradient)
            self.gradients = {name: norm / scale for name, norm in norms.items()}


def _call_before(target: object, method: str, action: Callable[[], None]) -> None:
    """Make this one object call ``action`` before every call of its method."""
    original = getattr(target, method)

    def with_action(*args, **kwargs):
        action()
        return original(*args, **kwargs)

    setattr(target, method, with_action)


def mixer_and_update_stats(model: nn.Module, full: Callable[[nn.Parameter], Tensor]) -> dict[str, float]:
    """The statistics of :class:`AdapterStats` without the gradients. Collective under ZeRO-3.

    Args:
        full: returns a parameter's unpartitioned value, float32.
    """
    stats: dict[str, float] = {}
    for part, name in LOG_NAMES.items():
        largest, smallest, ranks, squares = [], [], [], []
        for layer in adapted_layers(model, part):
            a, b = full(layer.lora_A[ADAPTER_NAME].weight), full(layer.lora_B[ADAPTER_NAME].weight)  # (r, k), (n, r)
            if ADAPTER_NAME in layer.lora_start_A:
                a = torch.cat([a, full(layer.lora_start_A[ADAPTER_NAME].weight)])
                b = torch.cat([b, -full(layer.lora_start_B[ADAPTER_NAME].weight)], dim=1)
            if ADAPTER_NAME in layer.lora_mixer:  # a frozen identity is not stored
                mixer = full(layer.lora_mixer[ADAPTER_NAME].weight)  # (r, r)
                values = torch.linalg.svdvals(mixer)
                largest.append(float(values[0]))
                smallest.append(float(values[-1]))
                shares = values**2 / (values**2).sum()
                ranks.append(math.exp(float(-(shares * shares.clamp_min(1e-12).log()).sum())))
                a = mixer @ a
            # ‖BWA‖² = tr(BᵀB · WA AᵀWᵀ): r×r, whatever the layer's size
            square = float(((b.T @ b) * (a @ a.T)).sum())
            squares.append(layer.scaling[ADAPTER_NAME] ** 2 * max(square, 0.0))
        if largest:
            stats[f"mixer/{name}/largest"], stats[f"mixer/{name}/smallest"] = max(largest), min(smallest)
            stats[f"mixer/{name}/rank"] = sum(ranks) / len(ranks)
        if squares:
            stats[f"delta/{name}"], stats[f"delta_largest/{name}"] = sum(squares) ** 0.5, max(squares) ** 0.5
    return stats


def gradient_norms(model: nn.Module, full: Callable[[nn.Parameter], Tensor | None]) -> dict[str, float]:
    """Norm of the gradient by part and factor, and of the projector's. Collective under DeepSpeed.

    Args:
        full: returns a parameter's unpartitioned gradient; None where it has none.
    """
    return norms("gradient", model, full)


def norms(
    what: str, model: nn.Module, full: Callable[[nn.Parameter], Tensor | None], adapters_only: bool = False
) -> dict[str, float]:
    """``WHAT/PART/KIND`` and ``WHAT/projector`` → norm of what ``full`` returns of all trained parameters of a kind."""
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in trained_parameters(model).items():
        key = part_of(name)
        if key == "projector" and adapters_only:
            continue
        value = full(parameter)
        if key != "projector":
            key = f"{LOG_NAMES[key]}/{adapter_tensor(name)}"
        squares[key] += 0.0 if value is None else float(value.float().square().sum())
    return {f"{what}/{key}": square**0.5 for key, square in squares.items()}


def adapted_layers(model: nn.Module, part: str) -> Iterator[Any]:  # MosLoraLayers, whose attributes are PEFT's
    for name, module in model.named_modules():
        if isinstance(module, MosLoraLayer) and part_of(name) == part:
            yield module


def full_weight(parameter: nn.Parameter) -> Tensor:
    """The float32 master weight under DeepSpeed, else the parameter itself; a frozen mixer has no master weight."""
    if parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param  # imported here: not needed without DeepSpeed

        return safe_get_full_fp32_param(parameter).detach().float()
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return parameter.detach().float()


def full_gradient(parameter: nn.Parameter) -> Tensor | None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return parameter.grad
