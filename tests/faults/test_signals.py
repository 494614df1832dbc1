"""SIGTERM and SIGINT at any time: at most the current step is lost, and the exit status asks for a resume."""

import signal

import pytest

from support.campaign import Campaign

pytestmark = pytest.mark.faults


# R1: SIGTERM and SIGINT
@pytest.mark.parametrize("world", [0, 2])
def test_a_signal_pauses_and_the_next_launch_resumes(warm_server, parts, tmp_path, world):
    """At start-up, while training, towards the end; on two ranks, only one of them gets the signal."""
    campaign = Campaign("signals", warm_server, parts, tmp_path, world=world, zero=2 if world else None)
    uninterrupted = campaign.uninterrupted
    start = uninterrupted.micro_batches()[0]["time"] - uninterrupted.began  # seconds until the first micro-batch
    for number, share in enumerate([0.3, 0.6, 1.1, 1.4, 1.8]):
        run = f"run{number}"
        kind = signal.SIGTERM if number % 2 else signal.SIGINT
        ranks = [0] if share < 1 else [campaign.ranks - 1]
        first = campaign.launch(run, 0, kill=share * start, signal=int(kind), ranks=ranks)
        if first.succeeded:
            continue  # it was at its end already
        if share > 1 and first.micro_batches():
            assert set(first.status) == {75}, first.printed()[-2000:]
            assert "P-PAUSED" in first.printed() and "--resume True" in first.printed()
        else:
            assert first.status[ranks[0]] == 75, first.printed(ranks[0])[-2000:]  # the one that got the signal
        second = campaign.launch(run, 1)
        assert second.succeeded, second.printed()[-2000:]
        before = [row["step"] for row in first.micro_batches()]
        if before and set(first.status) == {75}:
            assert second.micro_batches()[0]["step"] == max(before) + 1  # nothing is computed twice
        assert campaign.state_of(tmp_path / run) == campaign.final


def test_a_finished_run_started_again_does_nothing(warm_server, parts, tmp_path):
    campaign = Campaign("again", warm_server, parts, tmp_path)
    again = campaign.launch("uninterrupted", 1)
    assert again.succeeded and again.micro_batches() == []
    assert campaign.state_of(tmp_path / "uninterrupted") == campaign.final
