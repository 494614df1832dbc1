"""Running a model while it is in training, without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from llava_moslora.training.random_state import preserved_random_state


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode inside; afterwards every module is in the mode it was in before, and every random
    generator in its state."""
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
