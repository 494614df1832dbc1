"""Hooks of :mod:`support.warm_server` that make one rank differ from the others."""

import os
import sys


def other_flag(rank: int, flag: str, value: str) -> None:
    """This rank was started with another value of ``flag``."""
    if os.environ["RANK"] == str(rank):
        sys.argv[sys.argv.index(flag) + 1] = value
