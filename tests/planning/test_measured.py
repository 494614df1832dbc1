"""The planner against what was measured on GPUs: every row of this package in benchmarks/results."""

import json
import re

import pytest

from llava_moslora import recompute
from llava_moslora.devices import DEVICES, GIB, find_device
from llava_moslora.planning import activations, duration, on_meta
from llava_moslora.planning.memory import ABOVE, CONTEXT, memory
from llava_moslora.planning.plan import Request
from llava_moslora.planning.records import Records
from llava_moslora.planning.setting import Batch, Choice
from llava_moslora.planning.states import count, states
from support.launching import ROOT
from support.planned import large_model, zero

RESULTS = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("train-*.json")]
ROWS = [(result, row) for result in RESULTS for row in result["rows"] if row["row"].startswith("zero")]
NAMES = [f"{row['row']}@{row['batch']}" for _, row in ROWS]
TOKENS, LABELS = {"uniform": 2048, "text": 4096}, 200  # of a record (benchmarks/train_parts.py)
# Commits with rows from before selective recomputation kept less of the LLM (091f12b) and more of the tower, and from
# before quick GELU was one operation.
EARLIER = {"7784b1b"}


@pytest.fixture(scope="module")
def model():
    return large_model()


def planned(row: dict) -> tuple[Choice, Batch]:
    words = row["row"].split("+")
    (mode,) = [word for word in words if re.fullmatch(r"none|full|selective|every:\d+", word)]
    bits = 4 if "4bit" in words else 16
    batch = Batch(row["batch"], TOKENS[row["lengths"]], row["batch"], row["batch"] * LABELS)
    return Choice(row["batch"], 1, mode, bits, zero(words[0])), batch


@pytest.mark.parametrize(("result", "row"), ROWS, ids=NAMES)
def test_memory_is_not_below_and_little_above_the_measured_peak(model, result, row, monkeypatch):
    if result["commit"] in EARLIER:  # as the package of that commit computed
        monkeypatch.setattr(recompute, "LAST_LINEAR", {})
        for user in (recompute, activations):
            monkeypatch.setattr(user, "recomputes", lambda mode, n, i, *, in_tower: mode != "none" and i % n == 0)
        monkeypatch.setattr(on_meta, "QuickGELUActivation", type("None", (), {}))
    activations.activations.cache_clear()
    activations._small_model.cache_clear()
    wanted, batch = planned(row)
    device = find_device(result["device"])
    found = memory(model, wanted, batch, device, gpus=1)
    measured = row["peak_allocated_gib"] * GIB
    assert measured <= found.peak <= (1 + ABOVE) * measured
    reserved = row["peak_reserved_gib"] * GIB
    assert found.low <= reserved + CONTEXT[0] * GIB and reserved + CONTEXT[1] * GIB <= found.high
    assert found.fits(device.memory * GIB) is not False  # it ran
    activations.activations.cache_clear()
    activations._small_model.cache_clear()


@pytest.mark.parametrize(("result", "row"), ROWS, ids=NAMES)
def test_memory_at_rest_is_what_was_measured(model, result, row):
    """Before the first step: no optimizer state yet. bitsandbytes' small tensors round up to 512 bytes."""
    wanted, _ = planned(row)
    found = states(count(model.variant(wanted.bits, False)), wanted.zero, gpus=1)
    assert found.total - found.moments == pytest.approx(row["at_rest_gib"] * GIB, rel=5e-5)


@pytest.mark.parametrize(("result", "row"), ROWS, ids=NAMES)
def test_a_step_takes_as_long_as_was_measured(model, result, row, monkeypatch):
    if result["commit"] in EARLIER:
        monkeypatch.setattr(duration, "PYTHON_SINCE", dict.fromkeys(duration.PYTHON, 1))
    wanted, batch = planned(row)
    tokens = batch.tokens
    records = Records(None, tokens, tokens**2, LABELS, batch.images / batch.rows, tokens, LABELS, 1, "")
    name = next(name for name in DEVICES if name in result["device"])
    found = Request(model, wanted, records, name, gpus=1).duration(wanted)
    low, high = (found.step * factor for factor in found.factors)
    assert low <= row["ms_per_step"] / 1e3 <= high
    assert found.mfu == pytest.approx(row["mfu"], rel=0.05)


def test_the_constants_are_those_of_the_results():
    (rows,) = [
        {f"{row['row']}@{row['batch']}": row for row in result["rows"]}
        for result in RESULTS
        if "zero1+selective@8" in {f"{row['row']}@{row['batch']}" for row in result["rows"]}
    ]
    layers = 32 + 23
    for mode, row in [("none", "zero1+none@4"), ("selective", "zero1+selective@8"), ("full", "zero1+full@8")]:
        assert duration.PYTHON[mode] * layers == pytest.approx(rows[row]["ms_per_step"] / 1e3, rel=1e-4)
    slower = rows["zero1+full+4bit@8"]["ms_per_step"] / rows["zero1+full@8"]["ms_per_step"]
    assert pytest.approx(slower, rel=1e-4) == duration.NF4_SLOWER
    profile = (ROOT / "benchmarks/results/train-nvidia-h100-80gb-hbm3-profile.txt").read_text()
    kernels = float(re.search(r"zero1\+selective@8 .* a kernel runs in ([\d.]+) ms", profile)[1])
    work = rows["zero1+selective@8"]["model_tflop_per_step"] * 1e12
    assert pytest.approx(work / (kernels / 1e3) / DEVICES["H100"].flops, rel=1e-3) == duration.SHARE_OF_PEAK
    data = json.loads((ROOT / "benchmarks/results/data.json").read_text())["pictures"]
    assert duration.IMAGES_PER_SECOND["pil"] == pytest.approx(data["pad"]["ours_per_s"], rel=1e-3)
    assert duration.IMAGES_PER_SECOND["torch"] == pytest.approx(data["pad, torch"]["ours_per_s"], rel=1e-3)
