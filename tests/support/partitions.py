"""A hook for :mod:`support.warm_server`: after training, writes the bytes of a rank's weights and optimizer state."""

import json
import os
from pathlib import Path

import torch


def count_after_training(folder: str) -> None:
    """``RANK.json`` in ``folder``: bytes of ``masters``, ``moments``, ``frozen`` and ``trained`` weights, and how many
    tensors are trained."""
    import train_vit_llm

    class Counting(train_vit_llm.MosLoraTrainer):
        def _run_epoch(self, **kwargs):
            super()._run_epoch(**kwargs)
            (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(_sizes(self.engine)))

    train_vit_llm.MosLoraTrainer = Counting


def _sizes(engine) -> dict[str, int]:
    weights = {True: 0, False: 0}
    for p in engine.module.parameters():
        own = getattr(p, "ds_tensor", p)
        weights[p.requires_grad] += own.numel() * own.element_size()
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    optimizer = engine.optimizer
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3 empties its groups after a step
    masters = masters or [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    assert {t.dtype for t in (*masters, *states)} == {torch.float32}
    return {
        "masters": sum(t.nbytes for t in masters),
        "moments": sum(t.nbytes for t in states),
        "frozen": weights[False],
        "trained": weights[True],
        "tensors": len(trained),
        "kind": type(engine.optimizer).__name__,
    }
