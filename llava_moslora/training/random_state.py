"""This process's random generators: their start on each rank, and their states for a checkpoint."""

from __future__ import annotations

import base64
import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed


def seed_rank(seed: int, rank: int) -> None:
    """Start the generators of a rank above 0 from ``seed`` and the rank: all ranks would draw the same dropout masks.
    Rank 0 goes on, as one process alone does. To be called when the model is built, which draws the same on all."""
    if rank > 0:  # a hash: with seed + rank, rank 1 would draw what rank 0 does in a run of the next seed
        set_seed(int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:4], "little"))


def random_state() -> dict:
    """Of Python, NumPy, and torch on the CPU and on this rank's CUDA device."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict) -> None:
    """Set what :func:`random_state` returned, or JSON made of it, also of an earlier version of this package."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and torch.cuda.is_available() and (cuda := _own_device(state["cuda"])):
        torch.cuda.set_rng_state(_decode(cuda))


def _own_device(cuda: str | list[str]) -> str | None:
    """This rank's, of one state or of a list: earlier versions saved those of every device that the rank saw then. A
    device that is not in the list stays as it was seeded, which is said."""
    if isinstance(cuda, str):
        return cuda
    if (own := int(os.environ.get("LOCAL_RANK", "0"))) < len(cuda):
        return cuda[own]
    print(f"the checkpoint has random states of {len(cuda)} GPUs, none of GPU {own}: it goes on as seeded", flush=True)
    return None


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the generators at the end of the block."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
