"""What the Trainer and DeepSpeed do anew at every step in Python, and need not.

A model with adapters in every linear has five thousand modules and six thousand parameters. Walking through them four
times a step takes longer on the host than starting a step's kernels takes, and on a fast GPU the host is what a step
waits for.
"""

from __future__ import annotations

from torch import nn


def switch_mode_once(model: nn.Module) -> None:
    """``model.train()`` of a model that trains already, and ``eval()`` of one that does not, visit no module."""
    switch = model.train

    def train(mode: bool = True) -> nn.Module:
        return model if model.training is mode else switch(mode)

    model.train = train


def clear_trained_gradients(engine, trained: dict[str, nn.Parameter]) -> None:
    """A DeepSpeed engine's ``zero_grad()`` looks at the parameters that can have a gradient, not at all."""

    def zero_grad() -> None:
        for parameter in trained.values():
            parameter.grad = None

    engine.zero_grad = zero_grad
