"""What the Trainer and DeepSpeed do anew at every step in Python, and need not.

A model with adapters in every linear has five thousand modules and six thousand parameters. Walking through them four
times a step takes longer on the host than starting a step's kernels takes, and on a fast GPU the host is what a step
waits for.
"""

from __future__ import annotations

from torch import nn


def switch_mode_once(engine) -> None:
    """A DeepSpeed engine's ``train()``, which the Trainer calls at every step, visits modules only where the model on
    top is in the other mode. The first call visits all: parts come from their loaders in eval mode, and the model that
    was put together of them still says that it trains."""
    switch, visited = engine.train, False

    def train(mode: bool = True) -> None:
        nonlocal visited
        if not visited or engine.module.training is not mode:
            visited = True
            switch(mode)

    engine.train = train


def clear_trained_gradients(engine, trained: dict[str, nn.Parameter]) -> None:
    """A DeepSpeed engine's ``zero_grad()`` looks at the parameters that can have a gradient, not at all."""

    def zero_grad() -> None:
        for parameter in trained.values():
            parameter.grad = None

    engine.zero_grad = zero_grad
