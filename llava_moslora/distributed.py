"""Plain Python values exchanged between the ranks of a process group; without one there is a single rank, 0."""

from __future__ import annotations

from torch import distributed


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def from_rank_0(value: object) -> object:
    """Rank 0's ``value``, on every rank. Collective."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: object) -> list:
    """Every rank's ``value``, in the order of the ranks, on every rank. Collective."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
