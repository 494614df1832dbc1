"""Kills at random times and inside saves: every run resumes, and ends in the bits of an uninterrupted one.

The figures of all campaigns are printed; with ``FIGURES=1`` in the environment they are also written to
``benchmarks/results/kills.json`` and drawn in ``kills.png``, with matplotlib, which nothing else here needs.
"""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import pytest

from support.campaign import Campaign, Tally
from support.launching import ROOT

pytestmark = pytest.mark.faults
SEED = 6
KILLS = int(os.environ.get("KILLS", "50"))  # fewer while developing
TALLIES: list[Tally] = []


def clean(tally: Tally, kills: int) -> None:
    TALLIES.append(tally)
    print(tally.line())
    assert tally.clean and tally.kills == kills, f"{tally.line()}\n{tally.trouble}"


def test_one_process(warm_server, parts, tmp_path):
    clean(Campaign("one process", warm_server, parts, tmp_path).run(KILLS, SEED), KILLS)


# R2: one rank killed
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks(warm_server, parts, tmp_path, stage):
    kills = max(1, KILLS * 2 // 5)
    campaign = Campaign(f"ZeRO-{stage} on two ranks", warm_server, parts, tmp_path, world=2, zero=stage)
    tally = campaign.run(kills, SEED + stage)
    clean(tally, kills)
    assert tally.survivors_exit_max_s < 10


@pytest.mark.parametrize(("optim", "zero", "world"), [("adamw_bnb_8bit", None, 0), ("paged_adamw_8bit", 0, 2)])
def test_optimizers_of_eight_bits(warm_server, parts, tmp_path, optim, zero, world):
    kills = max(1, KILLS // 5)
    campaign = Campaign(
        f"{optim}, {world or 1} ranks", warm_server, parts, tmp_path, world=world, zero=zero, optim=optim
    )
    clean(campaign.run(kills, SEED), kills)


# R3: killed inside a save
def test_inside_a_save(warm_server, parts, tmp_path):
    """Before, after and within every file operation of a save that also prunes."""
    campaign = Campaign("inside a save", warm_server, parts, tmp_path)
    record = tmp_path / "operations"
    armed = {"nth": -1, "when": "before", "save": 4, "record": str(record)}
    counted = campaign.launch("counted", 0, hooks=[["support.failpoints:arm", armed]])
    assert counted.succeeded, counted.printed()[-2000:]
    operations = record.read_text().splitlines()
    assert len(operations) > 20 and operations.count("rename") == 2  # published, and pruned
    points = [
        {"nth": nth, "when": when, "save": 4}
        for nth, operation in enumerate(operations)
        for when in ("before", "after", *(["within"] if operation == "write_text" else []))
    ]
    if KILLS < 50:
        points = points[:: max(1, len(points) // KILLS)]
    clean(campaign.run(len(points), SEED, per_run=2, in_save=points), len(points))


MUTANTS = {
    "save_in_place": "stuck",
    "draw_the_order_from_the_global_stream": "divergent_steps",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(warm_server, parts, tmp_path, mutant):
    """The third, a manifest without hashes, is caught in test_fuzz_checkpoints.py."""
    campaign = Campaign(mutant, warm_server, parts, tmp_path, mutant=mutant)
    if mutant == "save_in_place":
        tally = campaign.run(6, SEED, in_save=[{"nth": 4, "when": "before", "save": 2}] * 6)
    else:
        tally = campaign.run(6, SEED, per_run=2)
    print(tally.line())
    assert getattr(tally, MUTANTS[mutant]) > 0, tally.line()


def test_figures(warm_server, parts, tmp_path):
    """The stock Trainer under the same kills, to compare. Its row is a measurement: nothing is required of it."""
    ours = {tally.name: tally for tally in TALLIES}
    if "one process" not in ours:
        pytest.skip("needs test_one_process in the same call")
    stock = Campaign("stock Trainer, one process", warm_server, parts, tmp_path, main="support.stock:main")
    theirs = stock.run(KILLS, SEED)
    print(theirs.line())
    assert theirs.kills >= KILLS
    if os.environ.get("FIGURES"):
        rows = [asdict(tally) for tally in [*TALLIES, theirs]]
        folder = ROOT / "benchmarks" / "results"
        machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "seed": SEED}
        lines = [tally.line() for tally in [*TALLIES, theirs]]
        for row in rows:
            row["curves"] = []
        (folder / "kills.json").write_text(json.dumps(machine | {"lines": lines, "rows": rows}, indent=1) + "\n")
        draw(ours["one process"], folder / "kills.png")


def draw(tally: Tally, file: Path) -> None:
    """The loss of the uninterrupted run, and over it every launch of a killed one, with a mark where it was killed."""
    from matplotlib import pyplot

    uninterrupted, *launches = tally.curves
    figure, axes = pyplot.subplots(figsize=(8, 4), dpi=120)
    axes.plot(uninterrupted["steps"], uninterrupted["losses"], color="0.75", linewidth=6, label="uninterrupted")
    for number, launch in enumerate(launches, start=1):
        axes.plot(launch["steps"], launch["losses"], linewidth=1.5, label=f"launch {number}")
        if number < len(launches):
            axes.plot(launch["steps"][-1], launch["losses"][-1], "kx", markersize=9)
    axes.set_xlabel("optimizer steps (two micro-batches each)")
    axes.set_ylabel("loss of the micro-batch")
    axes.set_title("kill -9 (x) and resumed: the same losses, bit for bit")
    axes.legend()
    figure.savefig(file, bbox_inches="tight")
