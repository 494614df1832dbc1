"""Batches of latents, and the random numbers of each: a function of the seed, the step and the position in the batch.

A resumed run, a run on another number of ranks, and a LoRA next to a MoSLoRA therefore all see the same noise.

Shapes: B pictures of a micro-batch, H and W of a latent, T, D and P as in ``encode.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.diffusion.subjects import Picture, generator_of

SUBJECT, CLASS = "subject", "class"


class Pictures(Dataset):
    """The subject's pictures as rows; ``collate`` makes a batch of some of them.

    Args:
        encoded: of :func:`llava_moslora.diffusion.encode.encode_once`.
        seed: of the noise.
        timesteps: of the noise schedule; SDXL: 1,000.
    """

    def __init__(self, pictures: Sequence[Picture], encoded: dict[str, Tensor], seed: int, timesteps: int):
        self.pictures, self.encoded, self.seed, self.timesteps = pictures, encoded, seed, timesteps
        self.preserves_prior = f"{CLASS}.mean" in encoded

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"record": number, "id": self.pictures[number].name}

    def collate(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        return {"record": torch.tensor([row["record"] for row in rows])}

    def sampler(self, **batches: Any) -> GlobalBatchSampler:
        """The order of the pictures. An epoch sees each as often as it takes to fill whole global batches."""
        size = batches["per_device_batch_size"] * batches.get("accumulation", 1) * batches.get("world_size", 1)
        times = math.lcm(len(self), size) // len(self)
        return GlobalBatchSampler(
            [1] * len(self), [True] * len(self), order="shuffle", source=[0] * len(self), weights=[times], **batches
        )

    def complete(self, records: Sequence[int], step: int, positions: Sequence[int]) -> dict[str, Tensor]:
        """The micro-batch of these pictures, at these positions of the global batch of ``step``.

        Returns:
            ``mean``, ``std``, ``latent_noise`` and ``noise`` float32[B, 4, H, W], ``timesteps`` int64[B], ``time_ids``
            float32[B, 6], ``embeds`` float32[B, T, D] and ``pooled`` float32[B, P], or ``ids.ENCODER`` int64[B, T].
            With prior preservation as many pictures of the class follow those of the subject.
        """
        rows = [self._row(SUBJECT, [record], step, at) for record, at in zip(records, positions, strict=True)]
        if self.preserves_prior:
            others = range(len(self.encoded[f"{CLASS}.mean"]))
            rows += [self._row(CLASS, others, step, at) for at in positions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, kind: str, choices: Sequence[int], step: int, position: int) -> dict[str, Tensor]:
        """One picture, drawn from ``choices``, with its noise."""
        generator = generator_of(self.seed, kind, step, position)
        chosen = choices[int(torch.randint(len(choices), (), generator=generator))]
        own = {name.removeprefix(f"{kind}."): value for name, value in self.encoded.items() if name.startswith(kind)}
        row = {name: own.pop(name)[chosen] for name in ("mean", "std", "time_ids")}
        return {
            **row,
            "timesteps": torch.randint(self.timesteps, (), generator=generator),
            "latent_noise": torch.randn(row["mean"].shape, generator=generator),
            "noise": torch.randn(row["mean"].shape, generator=generator),
            **own,  # of the prompt
        }
