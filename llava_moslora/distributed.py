"""The ranks of a process group, and plain Python values exchanged between them; without one there is one rank, 0."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

from torch import distributed

T = TypeVar("T")
MARGIN = timedelta(seconds=30)  # by which a collective waits longer than the watchdog, which can name the rank


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def cpu_group(timeout: float) -> distributed.ProcessGroup | None:
    """A new group of all ranks, on the CPU: what it exchanges neither waits for a GPU nor mixes with other collectives.
    Collective; None where there is one rank.

    Args:
        timeout: seconds, --ddp_timeout; torch's own would be 30 minutes whatever the run's is.
    """
    if world_size() == 1:
        return None
    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout) + MARGIN)


def from_rank_0(value: T) -> T:
    """Rank 0's ``value``, on every rank. Collective."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: T) -> list[T]:
    """Every rank's ``value``, in the order of the ranks, on every rank. Collective."""
    if not distributed.is_initialized():
        return [value]
    values: list = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values
