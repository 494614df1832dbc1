"""A rank that hangs (SIGSTOP): the others name it within the timeout instead of waiting for ever."""

import signal

import pytest

from support.campaign import Campaign

pytestmark = pytest.mark.faults
SECONDS = 8
SLEEP = 12.0


# R11: a rank that hangs
@pytest.mark.parametrize(("stage", "stopped"), [(2, 1), (3, 1), (2, 0)])
def test_a_stopped_rank_is_named(warm_server, parts, tmp_path, stage, stopped):
    campaign = Campaign("stopped", warm_server, parts, tmp_path, world=2, zero=stage)
    arguments = [*campaign.arguments(tmp_path / "run"), "--ddp_timeout", str(SECONDS)]
    launch = warm_server.launch(
        arguments, tmp_path / "launch", world=2, limit=60,
        signal=int(signal.SIGSTOP), ranks=[stopped], at_step=5, kill_stopped=True,
    )  # fmt: skip
    alive = 1 - stopped
    assert launch.status[alive] == 75, launch.printed(alive)[-2000:]
    assert launch.status[stopped] == -9  # by the test: a stopped process cannot end itself
    printed = launch.printed(alive)
    assert "error[P-RANK] the run hangs" in printed and "--ddp_timeout" in printed
    if stopped:
        assert f"no heartbeat for {SECONDS} s from rank 1 (process " in printed
    else:
        assert "the store, which rank 0 or the launcher serves, has not responded" in printed
    assert launch.survived < 4 * SECONDS
    assert campaign.launch("run", 1).succeeded  # and the run resumes
    assert campaign.state_of(tmp_path / "run") == campaign.final


# R11: a rank that hangs
@pytest.mark.parametrize(("stage", "step"), [(2, 5), (3, 6)])
def test_a_suspended_run_continues(warm_server, parts, tmp_path, stage, step):
    """All ranks stopped for longer than the timeout, then continued, as a scheduler suspends a job: no rank hung."""
    campaign = Campaign("suspended", warm_server, parts, tmp_path, world=2, zero=stage)
    arguments = [*campaign.arguments(tmp_path / "run"), "--ddp_timeout", "4"]
    launch = warm_server.launch(
        arguments, tmp_path / "launch", world=2, limit=100, signal=int(signal.SIGSTOP), at_step=step, cont_after=SLEEP,
    )  # fmt: skip
    assert launch.succeeded, launch.printed(0)[-2000:] + launch.printed(1)[-2000:]
    assert launch.seconds > SLEEP
    assert campaign.state_of(tmp_path / "run") == campaign.final
