"""The health of an adapter in training: its mixers' singular values, how far ΔW has gone, and its gradients.

Shapes: r rank, k and n width of an adapted linear's input and output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from llava_moslora.adapters.layers import MosLoraLayer
from llava_moslora.models.names import ADAPTER_NAME, part_of
from llava_moslora.training.optimizer_state import trained_parameters

TOWERS = {"llm": "llm", "vision_tower": "vision", "lm_head": "head"}  # part → its name in the log
FACTORS = ("lora_A", "lora_mixer", "lora_B")


class AdapterStats(TrainerCallback):
    """Every ``steps`` steps logs, for each tower and over its adapted linears:

    - ``mixer/TOWER/largest``, ``smallest``: singular values of the mixers, the extremes over all linears;
    - ``mixer/TOWER/rank``: their mean effective rank, exp of the entropy of the squared singular values' shares;
    - ``delta/TOWER``: ‖ΔW‖ of all linears together, and ``delta_largest/TOWER`` the largest of one linear;
    - ``gradient/TOWER/FACTOR`` and ``gradient/projector``: norm of the global batch's gradient, before clipping.

    Args:
        trainer: asked for its model and, under DeepSpeed, its engine.
    """

    def __init__(self, trainer, steps: int):
        self.trainer, self.steps = trainer, steps
        self.gradients: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **_):
        if self.trainer.is_deepspeed_enabled:
            # accelerate runs DeepSpeed's backward and step in one call: between them is the one place to look
            _before(self.trainer.model_wrapped, "step", self._look)
        else:
            _before(self.trainer, "_clip_grad_norm" if args.max_grad_norm > 0 else "_get_grad_norm", self._look)

    def on_step_end(self, args, state, control, **_):
        if self._due(state.global_step):
            figures = adapter_stats(self.trainer.model, whole_master) | self.gradients
            self.trainer.extra_logs = {name: round(value, 8) for name, value in figures.items()}
            self.gradients = {}
            control.should_log = True

    def _due(self, step: int) -> bool:
        return step % self.steps == 0

    def _look(self) -> None:
        if self._due(self.trainer.state.global_step + 1):
            scale = 1.0  # fp16's loss is scaled, and its gradients with it until the step
            if self.trainer.is_deepspeed_enabled and self.trainer.model_wrapped.fp16_enabled():
                scale = self.trainer.model_wrapped.optimizer.loss_scaler.cur_scale
            norms = gradient_norms(self.trainer.model, whole_gradient)
            self.gradients = {part: norm / scale for part, norm in norms.items()}


def _before(target: object, method: str, action: Callable[[], None]) -> None:
    """Let ``action`` run before every call of a method of this one object."""
    original = getattr(target, method)

    def with_action(*args, **kwargs):
        action()
        return original(*args, **kwargs)

    setattr(target, method, with_action)


def adapter_stats(model: nn.Module, whole: Callable[[nn.Parameter], Tensor]) -> dict[str, float]:
    """The figures of :class:`AdapterStats` but the gradients. Collective under ZeRO-3.

    Args:
        whole: a parameter's value, float32, whole.
    """
    found: dict[str, float] = {}
    for part, tower in TOWERS.items():
        largest, smallest, ranks, squares = [], [], [], []
        for layer in adapted(model, part):
            a, b = whole(layer.lora_A[ADAPTER_NAME].weight), whole(layer.lora_B[ADAPTER_NAME].weight)  # (r, k), (n, r)
            if ADAPTER_NAME in layer.lora_mixer:  # a frozen identity is not stored
                mixer = whole(layer.lora_mixer[ADAPTER_NAME].weight)  # (r, r)
                values = torch.linalg.svdvals(mixer)
                largest.append(float(values[0]))
                smallest.append(float(values[-1]))
                shares = values**2 / (values**2).sum()
                ranks.append(math.exp(float(-(shares * shares.clamp_min(1e-12).log()).sum())))
                a = mixer @ a
            # ‖BWA‖² = tr(BᵀB · WA AᵀWᵀ): r×r, whatever the linear's size
            square = float(((b.T @ b) * (a @ a.T)).sum())
            squares.append(layer.scaling[ADAPTER_NAME] ** 2 * max(square, 0.0))
        if largest:
            found[f"mixer/{tower}/largest"], found[f"mixer/{tower}/smallest"] = max(largest), min(smallest)
            found[f"mixer/{tower}/rank"] = sum(ranks) / len(ranks)
        if squares:
            found[f"delta/{tower}"], found[f"delta_largest/{tower}"] = sum(squares) ** 0.5, max(squares) ** 0.5
    return found


def gradient_norms(model: nn.Module, whole: Callable[[nn.Parameter], Tensor | None]) -> dict[str, float]:
    """Norm of the gradient by tower and factor, and of the projector's. Collective under DeepSpeed.

    Args:
        whole: a parameter's gradient, whole; None where it has none.
    """
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in trained_parameters(model).items():
        gradient = whole(parameter)
        part = part_of(name)
        if part != "projector":
            part = f"{TOWERS[part]}/{next(factor for factor in FACTORS if factor in name)}"
        squares[part] += 0.0 if gradient is None else float(gradient.float().square().sum())
    return {f"gradient/{part}": square**0.5 for part, square in squares.items()}


def adapted(model: nn.Module, part: str) -> Iterator[MosLoraLayer]:
    for name, module in model.named_modules():
        if isinstance(module, MosLoraLayer) and part_of(name) == part:
            yield module


def whole_master(parameter: nn.Parameter) -> Tensor:
    """The float32 master under DeepSpeed, the parameter itself elsewhere; a frozen mixer has no master."""
    if parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param  # not needed to train without DeepSpeed

        return safe_get_full_fp32_param(parameter).detach().float()
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return parameter.detach().float()


def whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return parameter.grad
