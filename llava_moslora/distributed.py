"""The ranks of a process group, and plain Python values exchanged between them; without one there is one rank, 0.

torch is not imported here: where nobody has, no group was joined.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
MARGIN = timedelta(seconds=30)  # by which a collective waits longer than the watchdog, which can name the rank


def _group() -> ModuleType | None:
    """``torch.distributed``, if this process joined a group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_initialized() else None


def rank() -> int:
    return group.get_rank() if (group := _group()) else 0


def world_size() -> int:
    return group.get_world_size() if (group := _group()) else 1


def cpu_group(timeout: float) -> Any:
    """A new ProcessGroup of all ranks, on the CPU: what it exchanges neither waits for a GPU nor mixes with other
    collectives. Collective; None where there is one rank.

    Args:
        timeout: seconds, --ddp_timeout; torch's own would be 30 minutes whatever the run's is.
    """
    if (group := _group()) is None or world_size() == 1:
        return None
    return group.new_group(backend="gloo", timeout=timedelta(seconds=timeout) + MARGIN)


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
