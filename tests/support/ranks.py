"""Hooks of :mod:`support.warm_server` that make one rank differ from the others."""

import os
import signal
import sys

from llava_moslora.adapters import kernel, linear
from llava_moslora.data import prepare


def other_flag(rank: int, flag: str, value: str) -> None:
    """This rank was started with another value of ``flag``."""
    if os.environ["RANK"] == str(rank):
        sys.argv[sys.argv.index(flag) + 1] = value


def stop_while_building() -> None:
    """The rank that builds the data cache is stopped in the middle of it, as on a lost host."""
    prepare._build = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)


def note_masks() -> None:
    """Print the seed of every dropout mask of this rank."""
    for module in (kernel, linear):
        module.draw_seed = _noting(module.draw_seed)


def _noting(draw_seed):
    def draw(dropout: float):
        drop, seed = draw_seed(dropout)
        if seed is not None:
            print(f"mask {seed.item()}", flush=True)
        return drop, seed

    return draw
