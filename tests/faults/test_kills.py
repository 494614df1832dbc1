"""Kills at random times, inside saves and inside validations: every run resumes, and ends in the bits of an
uninterrupted one.

``KILLS`` in the environment is the number of kills of all campaigns together. With ``KILLS_RECORD``, a JSON file, their
results are kept there after each run, and a later call goes on where the last one ended::

    KILLS=500 KILLS_RECORD=kills.json pytest -m faults tests/faults/test_kills.py

With ``FIGURES=1`` the losses of a killed run are drawn to ``benchmarks/results/kills.png``, with matplotlib, which
nothing else here needs.
"""

import os
import platform
from pathlib import Path

import pytest

from support.campaign import BATCH, RECORDS, Campaign, Record, Tally
from support.launching import ROOT
from support.text_runs import text_flags, write_alpaca
from support.tiny import write_data

pytestmark = pytest.mark.faults
SEED = 6
KILLS = int(os.environ.get("KILLS", "150"))
FACTS = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "seed": SEED}
RECORD = Record(Path(os.environ["KILLS_RECORD"]) if "KILLS_RECORD" in os.environ else None, FACTS)

# Campaign → its share of the kills, in 500, and how it trains: ranks (0: no launcher), a file of zero_configs/, flags.
ANYWHERE: dict[str, tuple[int, int, str | None, dict]] = {
    "one process": (45, 0, None, {}),
    "ZeRO-0": (25, 1, "0", {}),
    "ZeRO-1": (25, 1, "1", {}),
    "ZeRO-2 on two ranks": (45, 2, "2", {}),
    "ZeRO-2, offloaded": (35, 1, "2_offload", {}),
    "ZeRO-3 on two ranks": (40, 2, "3", {}),
    "ZeRO-3 on two ranks, offloaded": (30, 2, "3_offload", {}),
    "adamw_bnb_8bit": (30, 0, None, {"optim": "adamw_bnb_8bit"}),
    "paged_adamw_8bit, ZeRO-0 on two ranks": (25, 2, "0", {"optim": "paged_adamw_8bit"}),
    "adafactor": (25, 0, None, {"optim": "adafactor"}),
    "sgd": (20, 0, None, {"optim": "sgd"}),
    "lion_32bit": (25, 0, None, {"optim": "lion_32bit"}),
}
TEXT_ALONE, IN_SAVE, IN_SAVE_OF_RANKS, IN_VALIDATION = (
    "text alone", "inside a save", "inside a save of two ranks, ZeRO-3", "inside a validation",
)  # fmt: skip
OTHERS = {TEXT_ALONE: 30, IN_SAVE: 50, IN_SAVE_OF_RANKS: 20, IN_VALIDATION: 30}


def kills_of(name: str) -> int:
    share = OTHERS[name] if name in OTHERS else ANYWHERE[name][0]
    return max(1, round(KILLS * share / 500))


def campaign(name: str, *fixed, **how) -> Campaign:
    return Campaign(name, *fixed, tally=RECORD.tallies.get(name), **how)


def finish(campaign: Campaign, **how) -> Tally:
    """The rest of a campaign's kills; nothing may have gone wrong in any call."""
    kills = kills_of(campaign.tally.name)
    tally = campaign.run(kills, SEED, keep=RECORD.keep, **how)
    RECORD.keep(tally)
    print(tally.line())
    assert tally.clean and tally.kills >= kills, f"{tally.line()}\n{tally.trouble}"
    return tally


def done(name: str) -> bool:
    tally = RECORD.tallies.get(name)
    return tally is not None and tally.clean and tally.kills >= kills_of(name)


def test_the_shares_are_of_500():
    assert sum(row[0] for row in ANYWHERE.values()) + sum(OTHERS.values()) == 500


# R2: one rank killed
@pytest.mark.parametrize("name", ANYWHERE)
def test_anywhere(warm_server, parts, tmp_path, name):
    if done(name):
        return
    _, world, zero, changes = ANYWHERE[name]
    tally = finish(campaign(name, warm_server, parts, tmp_path, world=world, zero=zero, changes=changes))
    assert tally.survivors_exit_max_s < 10


def test_text_alone(warm_server, parts, tmp_path):
    if done(TEXT_ALONE):
        return
    changes = text_flags(parts, write_alpaca(tmp_path / "alpaca.json", RECORDS))
    finish(campaign(TEXT_ALONE, warm_server, parts, tmp_path, changes=changes))


# R3: killed inside a save
@pytest.mark.parametrize("name", [IN_SAVE, IN_SAVE_OF_RANKS])
def test_inside_a_save(warm_server, parts, tmp_path, name):
    """Before, after and within every file operation of a save that also prunes."""
    if done(name):
        return
    how = {"world": 2, "zero": "3"} if name == IN_SAVE_OF_RANKS else {}
    saving = campaign(name, warm_server, parts, tmp_path, **how)
    record = tmp_path / "operations"
    armed = {"nth": -1, "when": "before", "save": 4, "record": str(record)}
    counted = saving.launch("counted", 0, hooks=[["support.failpoints:arm", armed]])
    assert counted.succeeded, counted.printed()[-2000:]
    operations = record.read_text().splitlines()
    assert len(operations) > 20 and operations.count("rename") == 2  # published, and pruned
    points = [
        ["support.failpoints:arm", {"nth": nth, "when": when, "save": 4}]
        for nth, operation in enumerate(operations)
        for when in ("before", "after", *(["within"] if operation == "write_text" else []))
    ]
    points = points[:: max(1, len(points) // kills_of(name))]
    finish(saving, per_run=2, points=points)


def test_inside_a_validation(warm_server, parts, tmp_path):
    """Before its first batch, in its middle, and after it, before the checkpoint that may become the best."""
    if done(IN_VALIDATION):
        return
    write_data(tmp_path / "held_out", BATCH + 2)
    changes = {"eval_data_path": tmp_path / "held_out" / "data.json", "eval_strategy": "steps", "eval_steps": 2}
    changes |= {"load_best_model_at_end": True}
    points = [
        ["support.validation_losses:kill_in_evaluation", {"evaluation": evaluation, "batch": batch}]
        for evaluation in (1, 3, 5)
        for batch in (0, 1, 99)
    ]
    finish(campaign(IN_VALIDATION, warm_server, parts, tmp_path, changes=changes), per_run=2, points=points)


MUTANTS = {
    "save_in_place": "stuck",
    "draw_the_order_from_the_global_stream": "divergent_steps",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(warm_server, parts, tmp_path, mutant):
    """The third, a manifest without hashes, is caught in test_fuzz_checkpoints.py."""
    broken = Campaign(mutant, warm_server, parts, tmp_path, mutant=mutant)
    if mutant == "save_in_place":
        tally = broken.run(6, SEED, points=[["support.failpoints:arm", {"nth": 4, "when": "before", "save": 2}]])
    else:
        tally = broken.run(6, SEED, per_run=2)
    print(tally.line())
    assert getattr(tally, MUTANTS[mutant]) > 0, tally.line()


def test_figures(warm_server, parts, tmp_path):
    """The stock Trainer under the same kills, to compare. Its row is a measurement: nothing is required of it."""
    name, kills = "stock Trainer, one process", kills_of("one process")
    stock = campaign(name, warm_server, parts, tmp_path, main="support.stock:main")
    theirs = stock.run(kills, SEED, keep=RECORD.keep)
    print(theirs.line())
    assert theirs.kills >= kills
    curves = RECORD.tallies["one process"].curves if "one process" in RECORD.tallies else []
    if curves and os.environ.get("FIGURES"):
        draw(curves, ROOT / "benchmarks" / "results" / "kills.png")


def draw(curves: list[dict], file: Path) -> None:
    """The loss of the uninterrupted run, and over it every launch of a killed one, with a mark where it was killed."""
    from matplotlib import pyplot

    uninterrupted, *launches = curves
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
