"""--suggest against a search of the whole grid, and what it may not change."""

import itertools
from dataclasses import replace

import pytest

from llava_moslora.config import AUTO
from llava_moslora.devices import GIB
from llava_moslora.planning import duration
from llava_moslora.planning.plan import Request, make_plan
from llava_moslora.planning.records import assumed
from llava_moslora.planning.report import as_json, chosen, text
from llava_moslora.planning.suggest import (
    RECOMPUTE,
    as_flags,
    fastest_recompute,
    largest_micro_batch,
    micro_batches,
    suggest,
)
from support.planned import choice, large_model, tiny_model, zero

ZEROS = tuple((f"zero_configs/{name}.json", zero(name)) for name in ("zero1", "zero2_offload", "zero3"))
GLOBAL_BATCH, GPUS = 8, 2
TIGHT = 1.8 + 0.07  # GiB that a process has on a GPU at most, and cuBLAS's workspaces; the tiny model's steps are MiB
MODEL = tiny_model()  # one object: what was measured for it is kept


def request(gib: float, **changes) -> Request:
    small_buckets = tuple((file, replace(z, bucket=10_000, live=20_000, prefetch=1_000)) for file, z in ZEROS)
    now = choice(micro_batch=2, accumulation=2, zero_file=small_buckets[0][0])
    settings = {
        "model": MODEL,
        "choice": replace(now, zero=small_buckets[0][1]),
        "records": assumed(256, 1000, 200, 1, 40, 16),
        "device_name": "H100",
        "gpus": GPUS,
        "zeros": small_buckets,
        "gib": gib,
    }
    return Request(**(settings | changes))


def grid(asked: Request, bits: int):
    """Every setting with the same global batch that fits, the fastest first."""
    for (file, z), recompute, n in itertools.product(asked.zeros, RECOMPUTE, micro_batches(GLOBAL_BATCH, GPUS)):
        if bits == 4 and z.stage == 3:
            continue
        tried = replace(
            asked.choice, micro_batch=n, accumulation=GLOBAL_BATCH // GPUS // n, recompute=recompute, zero=z,
            zero_file=file, bits=bits,
        )  # fmt: skip
        if asked.fits(tried):
            yield asked.duration(tried).step, tried


@pytest.mark.parametrize("mib", [0, 2, 4, 8, 20, 100])
def test_it_is_never_beaten_by_the_whole_grid(mib):
    asked = request(TIGHT + mib / 1024)
    found = make_plan(asked, with_suggestions=True).suggestions
    for bits in (16, 4):
        if best := sorted(grid(asked, bits), key=lambda pair: pair[0]):
            assert found[0].seconds == best[0][0] and asked.fits(found[0].choice)
            assert found[0].choice.bits == bits
            return
    assert not found


def test_the_global_batch_stays():
    asked = request(TIGHT + 0.02)
    for candidate in make_plan(asked, with_suggestions=True).suggestions:
        assert candidate.choice.micro_batch * candidate.choice.accumulation * GPUS == GLOBAL_BATCH


def test_nf4_only_where_nothing_fits_in_16_bits():
    now = choice(micro_batch=2, accumulation=2)
    sixteen = suggest(now, ZEROS[:1], 1, fits=lambda c: True, seconds=lambda c: 1.0 if c.bits == 16 else 0.5)
    assert {c.choice.bits for c in sixteen} == {16}
    four = suggest(now, ZEROS[:1], 1, fits=lambda c: c.bits == 4, seconds=lambda c: 1.0)
    assert {c.choice.bits for c in four} == {4}
    assert suggest(now, ZEROS, 1, fits=lambda c: False, seconds=lambda c: 1.0) == []
    assert suggest(now, ZEROS, 1, fits=lambda c: c.bits == 4, seconds=lambda c: 1.0, nf4=False) == []


def test_of_equally_fast_settings_the_first_file_and_the_smaller_micro_batch():
    now = choice(micro_batch=4, accumulation=1)
    (best, *_) = suggest(now, ZEROS, 1, fits=lambda c: True, seconds=lambda c: 1.0)
    assert (best.choice.micro_batch, best.choice.zero_file) == (1, ZEROS[0][0])


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100])
def test_the_largest_micro_batch(limit):
    assert largest_micro_batch(choice(), lambda c: c.micro_batch <= limit) == limit


def test_flags_are_ready_to_paste(parts):
    from llava_moslora.training.command_line import parse

    flags = as_flags(choice(micro_batch=4, accumulation=2, recompute="every:2", bits=4)).split()
    given = ["--model_name_or_path", "x", "--data_path", "y", "--output_dir", "z", *flags]
    model, _, _, training = parse(given)
    assert (model.bits, training["recompute"], training["per_device_train_batch_size"]) == (4, "every:2", 4)
    assert training["gradient_accumulation_steps"] == 2


def test_what_is_suggested_fits_where_the_setting_does_not():
    asked = request(TIGHT + 0.02)
    large = replace(asked, choice=replace(asked.choice, micro_batch=4, accumulation=1, recompute="none"))
    plan = make_plan(large, with_suggestions=True)
    assert plan.memory.high > plan.request.gib * GIB or plan.fits is True
    assert all(asked.fits(candidate.choice) for candidate in plan.suggestions)


# ---- --recompute auto ----

LARGE = large_model()


def automatic(gib: float, device: str = "H100", **changes):
    """The plan of LLaMA-3-8B on four such GPUs, micro-batch 8 of 2,048 tokens."""
    now = choice(8, AUTO, stage="zero2", **changes)
    request = Request(LARGE, now, assumed(2048, 665_298, None, None, None, 576), device, 4, gib=gib)
    return make_plan(request, with_largest=False)


@pytest.mark.parametrize("device", ["H100", "A100", "RTX 4090"])
@pytest.mark.parametrize("gib", [20, 31, 66, 77, 84, 110])
def test_auto_is_the_fastest_way_that_certainly_fits(gib, device):
    """Against every way by itself; what is not chosen does not fit or is not faster."""
    plan = automatic(gib, device)
    ways = {way: make_plan(replace(plan.request, choice=replace(plan.request.choice, recompute=way)),
                           with_largest=False) for way in RECOMPUTE}  # fmt: skip
    fitting = {way: other.duration.step for way, other in ways.items() if other.fits is True}
    way = plan.request.choice.recompute
    assert plan.auto and (fitting.get(way) == min(fitting.values()) if fitting else way == "full")
    faster = {other for other, p in ways.items() if p.duration.step < ways[way].duration.step}
    if plan.faster is None:
        assert not faster
    else:
        assert not plan.request.fits(plan.faster) and faster <= {*ways} - {*fitting}
        assert plan.request.duration(plan.faster).step <= plan.duration.step
    assert plan.memory == ways[way].memory and plan.duration == ways[way].duration


def test_auto_differs_by_the_gpus_memory_and_its_speed(monkeypatch):
    ways = [automatic(gib).request.choice.recompute for gib in (20, 31, 66, 77, 84, 110)]
    assert ways == ["full", "full", "every:2", "selective", "selective", "none"]
    monkeypatch.setitem(duration.PYTHON_SINCE, "selective", 1)  # a GPU that waits for Python
    assert automatic(77).request.choice.recompute == "every:2"
    assert automatic(77, "A100").request.choice.recompute == "selective"  # no product twice: the slower GPU's best


def test_what_auto_says():
    plan = automatic(66)
    memory = rf"planned {plan.memory.low / GIB:.1f} to {plan.memory.high / GIB:.1f} GiB of the GPU's 66.0 GiB"
    faster = plan.request.memory(plan.faster)
    needs = f"{faster.low / GIB:.1f} to {faster.high / GIB:.1f} GiB"
    line = f"--recompute auto: every:2, {memory}; every:4, the next faster, does not fit: {needs}"
    assert chosen(plan) == line == text(plan, suggested=False).splitlines()[1] == as_json(plan)["chosen"]
    assert as_json(plan)["recompute"] == "every:2"
    assert ", the next faster, may not fit: " in chosen(automatic(76))
    assert chosen(automatic(110)).endswith("; no mode is faster")
    assert chosen(automatic(20)).startswith("--recompute auto: full, because no mode certainly fits; planned ")
    assert as_json(make_plan(request(TIGHT), with_largest=False))["chosen"] is None


def test_of_equally_fast_ways_the_one_that_recomputes_least():
    now = choice(recompute=AUTO)
    best, faster = fastest_recompute(now, fits=lambda c: True, seconds=lambda c: 1.0)
    assert best == replace(now, recompute="none") and faster is None
    best, faster = fastest_recompute(now, fits=lambda c: c.recompute == "selective", seconds=lambda c: 1.0)
    assert best.recompute == "selective" and faster is None  # what is as fast is not faster
    best, faster = fastest_recompute(
        now, fits=lambda c: c.recompute == "selective", seconds=lambda c: RECOMPUTE.index(c.recompute)
    )
    assert (best.recompute, faster.recompute) == ("selective", "every:2")
    none, _ = fastest_recompute(now, fits=lambda c: False, seconds=lambda c: len(c.recompute))
    assert none.recompute == "full"
