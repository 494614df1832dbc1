"""Throughput of a run: tokens and records per second, MFU, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import distributed, nn

from llava_moslora.devices import find_device
from llava_moslora.distributed import world_size
from llava_moslora.models.flops import Flops


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a device; None where unknown, as for a CPU."""
    if device.type != "cuda":
        return None
    known = find_device(torch.cuda.get_device_name(device))
    return None if known is None else known.flops


class Throughput:
    """Counts what this rank trains on; :meth:`rates` gives the rates of all ranks since the last call.

    Args:
        model: None if records have no tokens: then only samples are counted.
    """

    def __init__(self, model: nn.Module | None, device: torch.device):
        self.flops = None if model is None else Flops.of(model)
        self.device, self.peak = device, peak_flops(device)
        self.reset()

    def reset(self) -> None:
        self.counts = {"tokens": 0, "samples": 0, "flops": 0.0}
        self.since = time.monotonic()

    def add(self, lengths: Sequence[int], labels: int, images: int) -> None:
        """Count a micro-batch.

        Args:
            lengths: tokens of each record, without padding.
            labels: tokens with a label.
        """
        tokens, per = sum(lengths), self.flops
        self.counts["samples"] += len(lengths)
        if per is None:
            return
        self.counts["tokens"] += tokens
        self.counts["flops"] += per.token * tokens + per.pair * sum(length**2 for length in lengths)
        self.counts["flops"] += per.trained_token * labels + per.image * images

    def rates(self) -> dict[str, float]:
        """``tokens_per_second`` (without padding), ``samples_per_second``, ``mfu`` (where the device's peak is known)
        of all ranks; on a GPU ``peak_memory_gib``, the largest of a rank. Counting restarts. Collective."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        ranks = [[*self.counts.values(), memory]]
        if world_size() > 1:
            of_this_rank = torch.tensor(ranks[0], dtype=torch.float64, device=self.device)
            gathered = of_this_rank.new_empty(world_size(), len(of_this_rank))
            distributed.all_gather(list(gathered), of_this_rank)
            ranks = gathered.tolist()
        tokens, samples, flops, _ = map(sum, zip(*ranks, strict=True))
        memory = max(rank[-1] for rank in ranks)
        self.reset()
        rates = {"samples_per_second": round(samples / seconds, 3)}
        if self.flops is not None:
            rates = {"tokens_per_second": round(tokens / seconds, 1)} | rates
        if self.flops is not None and self.peak is not None:
            rates["mfu"] = round(flops / seconds / (self.peak * len(ranks)), 4)
        if memory:
            rates["peak_memory_gib"] = round(memory, 2)
        return rates
