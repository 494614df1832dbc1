"""Which launch this process belongs to, and whether the ``deepspeed`` command that started it has died.

That command's signals do not reach the ranks: SIGTERM to it alone ends only itself. The process that it has started on
this host, which starts the ranks, goes on without it.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import psutil

LAUNCH = "deepspeed.launcher.launch"  # the module that starts the ranks of one host
COMMAND = "deepspeed"


def job() -> str:
    """Names the launch that this process belongs to, alike on all its ranks of this host; "" where neither DeepSpeed's
    launcher nor Slurm started it."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent is not None and LAUNCH in parent.cmdline():
            return f"the launcher {parent.pid}"
    step = [os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in os.environ]
    return f"Slurm's step {'.'.join(step)}" if len(step) == 2 else ""


class LauncherWatch:
    """Notes this process's parent and that one's, where they are DeepSpeed's; elsewhere it watches nothing."""

    def __init__(self):
        self.launch: psutil.Process | None = None
        self.command = 0  # its process number
        if not sys.platform.startswith("linux"):  # elsewhere an orphan may keep its parent's number
            return
        try:
            launch = psutil.Process().parent()
            command = launch.parent() if launch and LAUNCH in launch.cmdline() else None
            if command is not None and any(COMMAND in os.path.basename(word) for word in command.cmdline()[:2]):
                self.launch, self.command = launch, command.pid
        except psutil.Error:  # one of them ends now, or belongs to another user
            return

    def died(self) -> bool:
        """Takes some ten microseconds."""
        if self.launch is None:
            return False
        try:
            return self.launch.ppid() != self.command  # an orphan has another parent
        except psutil.NoSuchProcess:
            return True
