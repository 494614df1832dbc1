"""A rank that stands still (SIGSTOP): the others name it within the timeout instead of waiting for ever."""

import signal

import pytest
from faults.campaign import Campaign

pytestmark = pytest.mark.faults
SECONDS = 8


@pytest.mark.parametrize(("stage", "stopped"), [(2, 1), (3, 1), (2, 0)])
def test_a_stopped_rank_is_named(lives, parts, tmp_path, stage, stopped):
    campaign = Campaign("stopped", lives, parts, tmp_path, world=2, zero=stage)
    arguments = [*campaign.arguments(tmp_path / "run"), "--ddp_timeout", str(SECONDS)]
    life = lives.live(
        arguments, tmp_path / "life", world=2, limit=60,
        signal=int(signal.SIGSTOP), ranks=[stopped], at_step=5, bury=True,
    )  # fmt: skip
    alive = 1 - stopped
    assert life.status[alive] == 75, life.said(alive)[-2000:]
    assert life.status[stopped] == -9  # by the test: a stopped process cannot end itself
    said = life.said(alive)
    assert "error[P-RANK] the run stands still" in said and "--ddp_timeout" in said
    if stopped:
        assert f"no sign of life for {SECONDS} s from rank 1 (process " in said
    else:
        assert "the store, which rank 0 or the launcher serves, has not answered" in said
    assert life.outlived < 4 * SECONDS
    assert campaign.live("run", 1).ended_well  # and the run goes on
    assert campaign.state_of(tmp_path / "run") == campaign.final
