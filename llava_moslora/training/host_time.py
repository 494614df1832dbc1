"""What the Trainer and DeepSpeed do anew at every step in Python, and need not.

A model with adapters in every linear has five thousand modules and six thousand parameters. Walking through them four
times a step takes longer on the host than starting a step's kernels takes, and on a fast GPU the host is what a step
waits for.
"""

from __future__ import annotations

from torch import nn


def switch_mode_once(model: nn.Module) -> None:
    """From the second call on, ``model.train()`` of a model that trains already visits no module, nor does
    ``model.train(False)`` of one that does not.

    The first call visits all: parts come from their loaders in eval mode, and the model that was put together of them
    still says that it trains.
    """
    switch, visited = model.train, False

    def train(mode: bool = True) -> nn.Module:
        nonlocal visited
        if visited and model.training is mode:
            return model
        visited = True
        return switch(mode)

    model.train = train


def clear_trained_gradients(engine, trained: dict[str, nn.Parameter]) -> None:
    """A DeepSpeed engine's ``zero_grad()`` looks at the parameters that can have a gradient, not at all."""

    def zero_grad() -> None:
        for parameter in trained.values():
            parameter.grad = None

    engine.zero_grad = zero_grad
