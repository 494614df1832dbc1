"""What a training run consists of besides frozen weights, in a form that no ZeRO stage and no world size owns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def master_weights(model: nn.Module, deepspeed: bool) -> dict[str, Tensor]:
    """Every trained parameter whole, float32, on the CPU, by its name in ``model``. Collective under DeepSpeed.

    With 16-bit training the optimizer's float32 masters are the model; the 16-bit weights are their rounded image.
    """
    if not deepspeed:
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trained_parameters(model).items()}
    from deepspeed.utils import safe_get_full_fp32_param  # imported here: DeepSpeed is not needed to train on one GPU

    masters = {}
    for name, parameter in trained_parameters(model).items():
        whole = safe_get_full_fp32_param(parameter)
        assert whole is not None, f"DeepSpeed holds no float32 master of {name}"
        masters[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return masters
