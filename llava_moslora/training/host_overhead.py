"""Avoids host work that the Trainer and DeepSpeed repeat needlessly at every step.

A model with adapters in every linear layer has five thousand modules and six thousand parameters, over a thousand of
them trained. Visiting all of them several times per step takes the host longer than launching the step's kernels; with
a fast GPU, steps are bound by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLIP_EPSILON = 1e-6  # DeepSpeed's


def switch_mode_once(engine) -> None:
    """Make a DeepSpeed engine's ``train()``, which the Trainer calls at every step, visit the modules only if the mode
    changes. The first call visits all: the assembled model is in training mode, but its loaded parts in eval mode."""
    switch, visited = engine.train, False

    def train(mode: bool = True) -> None:
        nonlocal visited
        if not visited or engine.module.training is not mode:
            visited = True
            switch(mode)

    engine.train = train


def clear_trained_gradients(engine, trained: dict[str, nn.Parameter]) -> None:
    """Make a DeepSpeed engine's ``zero_grad()`` visit only the parameters that can have a gradient."""

    def zero_grad() -> None:
        for parameter in trained.values():
            parameter.grad = None

    engine.zero_grad = zero_grad


def step_without_waiting(engine) -> bool:
    """Make the step of DeepSpeed's ``BF16_Optimizer`` (ZeRO-1 with float32 gradients) free of host-device
    synchronisation; with another optimizer the engine is unchanged, and False is returned.

    DeepSpeed's own step reads the gradient norm to decide whether to update and whether to clip, and the GPU idles
    until the next step's kernels are launched. Here clipping is done on the device, by a factor that is 1 below the
    limit, and :class:`~llava_moslora.training.nonfinite.FiniteCheck` reads the norm when it has arrived: the update has
    then been made even if the norm is not finite, and the run ends without saving it.

    Norm and factor are computed over the flat buffer with a group's gradients, where DeepSpeed loops over parameters,
    and a gradient is added to its slice in one operation instead of two: a step launches three or four fewer kernels
    per trained parameter. Only the order of summation in the norm differs.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups_actual_gradients_flat"):
        return False
    if optimizer.mpu is not None or optimizer.has_moe_layers or optimizer._uses_muon:
        return False  # their norm or update needs more than the code below
    if optimizer.grad_acc_dtype != torch.float32 or optimizer.norm_type != 2:
        return False

    @torch.no_grad()
    def add_gradient(parameter: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    @torch.no_grad()
    def step() -> None:
        gradients = optimizer.fp32_groups_actual_gradients_flat  # 0 where a parameter has none
        norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
        optimizer._global_grad_norm = norm
        if optimizer.clip_grad > 0:
            torch._foreach_mul_(gradients, (optimizer.clip_grad / (norm + CLIP_EPSILON)).clamp(max=1))
        parts = zip(optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition, strict=True)
        for masters, gradient in parts:
            masters.grad = gradient
        optimizer.optimizer.step()
        optimizer._lazy_init_hp_params_optimizer_state()  # it exists from the first step on
        optimizer.update_lp_params()
        optimizer.clear_hp_grads()

    optimizer.step, optimizer._update_hp_grad = step, add_gradient
    return True
