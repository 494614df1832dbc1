"""SIGTERM and SIGINT at any time: at most the step under way is lost, and the status says that it can go on."""

import signal

import pytest

from support.campaign import Campaign

pytestmark = pytest.mark.faults


# R1: SIGTERM and SIGINT
@pytest.mark.parametrize("world", [0, 2])
def test_a_signal_pauses_and_the_next_life_goes_on(lives, parts, tmp_path, world):
    """At start-up, while training, towards the end; on two ranks, only one of them hears it."""
    campaign = Campaign("signals", lives, parts, tmp_path, world=world, zero=2 if world else None)
    start = campaign.whole.watched()[0]["time"] - campaign.whole.began  # seconds until the first micro-batch
    for number, share in enumerate([0.3, 0.6, 1.1, 1.4, 1.8]):
        run = f"run{number}"
        kind = signal.SIGTERM if number % 2 else signal.SIGINT
        ranks = [0] if share < 1 else [campaign.ranks - 1]
        first = campaign.live(run, 0, kill=share * start, signal=int(kind), ranks=ranks)
        if first.ended_well:
            continue  # it was at its end already
        if share > 1 and first.watched():
            assert set(first.status) == {75}, first.said()[-2000:]
            assert "P-PAUSED" in first.said() and "--resume True" in first.said()
        else:
            assert first.status[ranks[0]] == 75, first.said(ranks[0])[-2000:]  # the one that heard it
        second = campaign.live(run, 1)
        assert second.ended_well, second.said()[-2000:]
        before = [row["step"] for row in first.watched()]
        if before and set(first.status) == {75}:
            assert second.watched()[0]["step"] == max(before) + 1  # nothing is computed twice
        assert campaign.state_of(tmp_path / run) == campaign.final


def test_a_finished_run_started_again_does_nothing(lives, parts, tmp_path):
    campaign = Campaign("again", lives, parts, tmp_path)
    again = campaign.live("whole", 1)
    assert again.ended_well and again.watched() == []
    assert campaign.state_of(tmp_path / "whole") == campaign.final
