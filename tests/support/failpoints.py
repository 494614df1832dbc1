"""A hook for :mod:`support.warm_server`: dies at a chosen operation inside a save, like a power cut at that moment."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path


def arm(*, nth: int, when: str, save: int = 2, record: str | None = None) -> None:
    """Kill this process at its ``nth`` file operation (from 0) inside its ``save``-th save.

    Args:
        when: ``before`` or ``after`` the operation, or ``within``: after the first half of what it writes.
        record: a file that gets one line per operation of rank 0 instead, to count them; nothing dies.
    """
    from llava_moslora.training import checkpoint, trainer

    state = {"saves": 0, "inside": False, "operations": 0}

    def watched(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def operation(*arguments, **named):
            if not state["inside"]:
                return original(*arguments, **named)
            here = state["operations"] == nth and record is None
            state["operations"] += 1
            if record is not None and os.environ.get("RANK", "0") == "0":
                with open(record, "a") as file:
                    file.write(f"{name}\n")
            if here and when == "before":
                _die()
            if here and when == "within" and name == "write_text":
                arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2])
            result = original(*arguments, **named)
            if here:
                _die()
            return result

        setattr(owner, name, operation)

    for owner, name in [(os, "fsync"), (os, "rename"), (Path, "mkdir"), (Path, "write_text"), (shutil, "rmtree")]:
        watched(owner, name)
    watched(checkpoint, "save_tensors")
    save_all = trainer.publish_checkpoint
    prune = trainer.prune

    def publishing(*arguments, **named):
        state["saves"] += 1
        state["inside"] = state["saves"] == save
        save_all(*arguments, **named)
        state["inside"] = False

    def pruning(*arguments, **named):
        state["inside"] = state["saves"] == save
        prune(*arguments, **named)
        state["inside"] = False

    trainer.publish_checkpoint, trainer.prune = publishing, pruning


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
