"""A rank that stands still (SIGSTOP): the others name it within the timeout instead of waiting for ever."""

import signal

import pytest

from support.campaign import Campaign

pytestmark = pytest.mark.faults
SECONDS = 8
SLEEP = 12.0


# R11: a rank that stands still
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
    assert "error[P-RANK] the run hangs" in said and "--ddp_timeout" in said
    if stopped:
        assert f"no heartbeat for {SECONDS} s from rank 1 (process " in said
    else:
        assert "the store, which rank 0 or the launcher serves, has not answered" in said
    assert life.outlived < 4 * SECONDS
    assert campaign.live("run", 1).ended_well  # and the run goes on
    assert campaign.state_of(tmp_path / "run") == campaign.final


# R11: a rank that stands still
@pytest.mark.parametrize(("stage", "step"), [(2, 5), (3, 6)])
def test_a_suspended_run_goes_on(lives, parts, tmp_path, stage, step):
    """All ranks stopped for longer than the timeout and woken, as a scheduler suspends a job: nobody stood still."""
    campaign = Campaign("suspended", lives, parts, tmp_path, world=2, zero=stage)
    arguments = [*campaign.arguments(tmp_path / "run"), "--ddp_timeout", "4"]
    life = lives.live(
        arguments, tmp_path / "life", world=2, limit=100, signal=int(signal.SIGSTOP), at_step=step, wake=SLEEP,
    )  # fmt: skip
    assert life.ended_well, life.said(0)[-2000:] + life.said(1)[-2000:]
    assert life.seconds > SLEEP
    assert campaign.state_of(tmp_path / "run") == campaign.final
