"""Hooks of :mod:`support.warm_server` that make one rank differ from the others."""

import os
import signal
import sys

from llava_moslora.data import prepare


def other_flag(rank: int, flag: str, value: str) -> None:
    """This rank was started with another value of ``flag``."""
    if os.environ["RANK"] == str(rank):
        sys.argv[sys.argv.index(flag) + 1] = value


def stop_while_building() -> None:
    """The rank that builds the data cache is stopped in the middle of it, as on a lost host."""
    prepare._build = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
