"""A hook for :mod:`support.warm_server`: prints a digest of all that is frozen before and after training."""

import contextlib
import hashlib

import torch


def digest_around_training() -> None:
    import train_vit_llm

    class Digesting(train_vit_llm.MosLoraTrainer):
        def train(self, *args, **kwargs):
            _print(self.model)
            super().train(*args, **kwargs)
            _print(self.model)

    train_vit_llm.MosLoraTrainer = Digesting


def _print(model) -> None:
    import deepspeed

    digest, kinds = hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        partitioned = hasattr(parameter, "ds_id")
        gathered = deepspeed.zero.GatheredParameters([parameter]) if partitioned else contextlib.nullcontext()
        with gathered:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        kinds.add(type(parameter).__name__)
    print("\nfrozen", digest.hexdigest(), sorted(kinds))
