"""scripts/train_sdxl.py killed at random times: every run resumes, and ends in the bytes of an uninterrupted one."""

import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_moslora.files.manifest import sha256
from support.sdxl import IMPORTS, STATE, flags, losses, needs_diffusers, write_pictures, write_sdxl
from support.stops import counted
from support.warm_server import WarmServer

pytestmark = [pytest.mark.faults, needs_diffusers]
STEPS = 8
KILLS = int(os.environ.get("KILLS", "10"))  # fewer while developing


def test_killed_at_random_times(tmp_path):
    parts = SimpleNamespace(sdxl=write_sdxl(tmp_path / "sdxl"), pictures=write_pictures(tmp_path / "pictures"))
    chance = random.Random(6)
    with WarmServer(modules=IMPORTS) as server:

        def launch(run: str, **how):
            changes = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 2, "resume": True}
            arguments = flags(parts, tmp_path / run, **changes)
            return server.launch(arguments, tmp_path / f"{run}-log", main="train_sdxl:main", limit=300, **how)

        whole = launch("whole")
        assert whole.succeeded, whole.printed()[-2000:]
        kills, number = 0, 0
        while kills < KILLS:
            run, done = f"run{number}", False
            while not done:
                kill = {} if kills == KILLS else {"kill": chance.uniform(0.1, whole.seconds)}
                attempt = launch(run, **kill)
                assert attempt.status[0] in (0, -9), attempt.printed()[-2000:]
                kills += attempt.status[0] == -9
                done = attempt.succeeded
            assert state_of(tmp_path / run) == state_of(tmp_path / "whole")
            assert losses(tmp_path / run) == losses(tmp_path / "whole")
            assert not [*(tmp_path / run).glob(".*.staging"), *(tmp_path / run).glob(".*.trash")]
            number += 1
    print(f"SDXL: {kills} kills in {number} runs, all to the same bytes")


# R1: SIGTERM and SIGINT
def test_a_signal_at_any_operation(tmp_path):
    """Before the first step the run ends at once, later it is paused; both go on to the same bytes."""
    parts = SimpleNamespace(sdxl=write_sdxl(tmp_path / "sdxl"), pictures=write_pictures(tmp_path / "pictures"))
    chance, state = random.Random(7), tmp_path / "state"
    with WarmServer(modules=IMPORTS) as server:

        def launch(run: str, name: str, number: int = -1, kind: int = 0):
            arguments = flags(parts, tmp_path / run, max_steps=STEPS, save_steps=4, save_total_limit=2, resume=True)
            hooks = [["support.stops:at", {"state": str(state), "number": number, "name": int(kind)}]]
            return server.launch(arguments, tmp_path / name, main="train_sdxl:main", hooks=hooks, limit=300)

        whole = launch("whole", "whole-log")
        assert whole.succeeded, whole.printed()[-2000:]
        operations, _ = counted(state)
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for k, number in enumerate(sorted(chance.sample(range(operations), 2))):
                run, where = f"{kind.name}{k}", f"{kind.name} at operation {number} of {operations}"
                stopped = launch(run, f"{run}-log", number, kind)
                printed = where + stopped.printed()[-3000:]
                lines = [line for line in stopped.printed().splitlines() if line.startswith("error[")]
                assert stopped.status[0] in (0, 75) and "Traceback" not in printed, printed
                assert len(lines) <= 1 and all(line.startswith("error[P-") for line in lines), printed
                assert stopped.succeeded or lines or "exiting at once" in printed, printed
                again = launch(run, f"{run}-again")
                assert again.succeeded and state_of(tmp_path / run) == state_of(tmp_path / "whole"), again.printed()


def state_of(run: Path) -> list[str]:
    return [sha256(run / f"checkpoint-{STEPS}" / name) for name in STATE]
