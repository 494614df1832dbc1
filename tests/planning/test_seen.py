"""plan.json: planned beside seen after a run's first steps, and what later plans make of it."""

import json
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.planning import seen
from llava_moslora.planning.plan import Request, make_plan
from llava_moslora.planning.records import assumed
from llava_moslora.planning.seen import PLAN, PLANNER, STEPS, WARM_UP, SeenSteps, read_pair
from llava_moslora.planning.setting import Pair
from support.launching import ROOT
from support.planned import choice, tiny_model
from support.training_runs import train

GIB = 2**30
MODEL = tiny_model()


def plan_on(name: str = "H100", **changes):
    records = assumed(256, 1000, 200, 1, 40, 16)
    return make_plan(Request(MODEL, choice(2, **changes), records, name, gpus=1), with_largest=False)


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """``run_of(plan, device)``: a run folder after ``STEPS`` steps of 2 s, the first ones and one that saved slower."""

    def make(plan, device: str, *, steps: int = STEPS, rank_0: bool = True):
        clock = [0.0]
        monkeypatch.setattr(seen.time, "monotonic", lambda: clock[0])
        on_gpu = {"get_device_name": "NVIDIA H100 80GB HBM3", "mem_get_info": (60 * GIB, 80 * GIB)}
        on_gpu |= {"max_memory_allocated": 17 * GIB, "max_memory_reserved": 18 * GIB, "memory_reserved": 19 * GIB}
        for name, value in on_gpu.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
        watch = SeenSteps(tmp_path, plan)
        args = SimpleNamespace(device=torch.device(device))
        watch.on_train_begin(args, None, None)
        for step in range(1, steps + 1):
            clock[0] += 60 if step <= WARM_UP or step == 10 else 2
            watch.on_step_end(args, SimpleNamespace(global_step=step, is_world_process_zero=rank_0), None)
        return tmp_path

    return make


def test_planned_beside_seen(run_of, capsys):
    plan = plan_on()
    found = json.loads((run_of(plan, "cuda") / PLAN).read_text())
    assert found["planned"]["peak"] == plan.memory.peak and found["planned"]["step_seconds"] == plan.duration.step
    assert found["seen"]["step_seconds"] == 2 and found["seen"]["peak_allocated"] == 17 * GIB
    assert found["seen"]["outside"] == GIB and found["steps"] == [1, STEPS]
    said = capsys.readouterr().out
    assert f"after {STEPS} steps: 2.00 s a step (planned {plan.duration.step:.2f}), peak 17.0 GiB (planned" in said


@pytest.mark.parametrize("how", [{"steps": STEPS - 1}, {"rank_0": False}])
def test_nothing_is_kept_of_fewer_steps_or_on_another_rank(run_of, how):
    run = run_of(plan_on(), "cuda", **how)
    assert not (run / PLAN).exists() and read_pair(run) is None


def test_a_later_plan_has_the_range_that_was_seen(run_of):
    plan = plan_on()
    pair = read_pair(run_of(plan, "cuda"))
    assert pair.memory == 18 * GIB / plan.memory.peak and pair.time == 2 / plan.duration.step
    again = make_plan(replace(plan.request, pairs=(pair,)), with_largest=False)
    assert again.memory.low < 19 * GIB < again.memory.high < 1.04 * 18 * GIB + GIB
    low, high = (again.duration.step * factor for factor in again.duration.factors)
    assert (low, high) == pytest.approx((1.8, 2.2))


def test_a_plan_of_another_version_is_no_measure(run_of):
    run = run_of(plan_on(), "cuda")
    found = json.loads((run / PLAN).read_text())
    assert found["planned"]["planner"] == PLANNER
    for version in ({"planner": PLANNER - 1}, {}):
        said = {name: value for name, value in found["planned"].items() if name != "planner"} | version
        (run / PLAN).write_text(json.dumps(found | {"planned": said}))
        assert read_pair(run) is None


def test_runs_that_recompute_alike_count_before_others():
    full = Pair("a", "H100", "full", 16, memory=1, outside=0, time=3.0)
    request = replace(plan_on(recompute="none").request, pairs=(full, replace(full, recompute="none", time=1.0)))
    assert request.duration(request.choice).factors == pytest.approx((0.9, 1.1))
    request = replace(request, pairs=(full,))
    assert request.duration(request.choice).factors == pytest.approx((2.7, 3.3))


@pytest.mark.parametrize(
    "content", [f'{{"planned": {{"planner": {PLANNER}}}, "seen": {{"peak_reserved": 1}}}}', '{"seen": {}}', "[]"]
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / PLAN).write_text(content)
    with pytest.raises(Refusal, match=r"K-JSON.*plan\.json"):
        read_pair(tmp_path)


def test_a_run_on_a_cpu_keeps_its_speed(parts, tmp_path, capsys):
    train(parts, tmp_path / "run", max_steps=STEPS, save_strategy="no")
    found = json.loads((tmp_path / "run" / PLAN).read_text())
    assert found["planned"] is None and found["seen"].keys() == {"device", "step_seconds"}
    assert found["seen"]["device"] == "cpu" and found["seen"]["step_seconds"] > 0
    assert "a cpu has no memory statistics" in capsys.readouterr().out
    assert read_pair(tmp_path / "run") is None


def test_the_script_refuses_a_folder_without(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--gpu", "h100-80", "--seen", str(tmp_path)])
    script = runpy.run_path(str(ROOT / "scripts" / "plan.py"))
    own, _ = script["own_parser"]().parse_known_args()
    with pytest.raises(Refusal, match="--seen: no such file"):
        script["seen_pairs"](own, "H100")
