"""scripts/train_sdxl.py killed at random times: every run resumes, and ends in the bytes of an uninterrupted one."""

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_moslora.files.manifest import sha256
from support.sdxl import IMPORTS, STATE, flags, losses, needs_diffusers, write_pictures, write_sdxl
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


def state_of(run: Path) -> list[str]:
    return [sha256(run / f"checkpoint-{STEPS}" / name) for name in STATE]
