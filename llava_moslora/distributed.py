"""Plain Python values exchanged between the ranks of a process group; without one there is a single rank, 0.

torch is not imported here: where nobody has, no group was joined.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def _group() -> ModuleType | None:
    """``torch.distributed``, if this process joined a group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def rank() -> int:
    return group.get_rank() if (group := _group()) else 0


def world_size() -> int:
    return group.get_world_size() if (group := _group()) else 1


def from_rank_0(value: T) -> T:
    """Rank 0's ``value``, on every rank. Collective."""
    if (group := _group()) is None:
        return value
    box = [value]
    group.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: T) -> list[T]:
    """Every rank's ``value``, in the order of the ranks, on every rank. Collective."""
    if (group := _group()) is None:
        return [value]
    values: list = [None] * world_size()
    group.all_gather_object(values, value)
    return values
