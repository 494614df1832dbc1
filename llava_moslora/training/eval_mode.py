"""Runs a model in the middle of training, without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from llava_moslora.training.random_state import preserved_random_state


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside; afterwards the mode of every module and the state of every random generator
    are restored."""
    modes = [(module, module.training) for module in model.modules()]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack 4-bit weights in place
            module.support_avx512bf16_for_cpu = False
    with preserved_random_state():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
