"""Work on the host that the Trainer and DeepSpeed repeat at every step, and need not.

A model with adapters in every linear has five thousand modules and six thousand parameters. Visiting all of them four
times a step takes the host longer than launching a step's kernels, and on a fast GPU the host is what a step waits for.
"""

from __future__ import annotations

from torch import nn


def switch_mode_once(engine) -> None:
    """Make a DeepSpeed engine's ``train()``, which the Trainer calls at every step, visit the modules only if the model
    is in the other mode. The first call visits all: the assembled model claims to be in training mode, while its parts
    come from their loaders in eval mode."""
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
