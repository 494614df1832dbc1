"""--recompute auto in a training: decided once for all ranks, recorded, said, and free to differ after a resume."""

import json
import re
import shutil
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import scripts.train_vit_llm as script
from llava_moslora.config import AUTO
from llava_moslora.errors import Refusal
from support.described_gpus import H100, described, plan_as_on
from support.launching import flags, run
from support.training_runs import adapter, losses, train
from support.zero_runs import run_successfully, settings

LARGE, SMALL = 80, 0.25  # GiB: everything of a tiny model fits, nothing does


def recorded(run) -> str:
    return json.loads((run / "run.json").read_text())["settings"]["training"]["recompute"]


def said(text: str) -> list[str]:
    return [line for line in text.splitlines() if "--recompute auto" in line]


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """What the models of this test's trainings were set to."""
    seen, set_recompute = [], script.set_recompute
    monkeypatch.setattr(script, "set_recompute", lambda model, way: (seen.append(way), set_recompute(model, way)))
    return seen


@pytest.fixture
def train_on(parts, monkeypatch):
    """``train_on(gib, folder)``: a training with its plan made as on such a GPU."""

    def start(gib: float, run, name: str = H100, **changes) -> None:
        with monkeypatch.context() as patched:
            plan_as_on(script, gib, name, patched.setattr)
            train(parts, run, recompute="auto", **changes)

    return start


def test_on_a_cpu_nothing_is_recomputed(parts, tmp_path, ways, capsys):
    train(parts, tmp_path / "run", recompute="auto")
    assert ways == ["none"] and recorded(tmp_path / "run") == "none"
    assert said(capsys.readouterr().out) == ["--recompute auto: none; the memory of a cpu is not planned"]


def test_a_resumed_run_may_choose_otherwise(train_on, tmp_path, ways, capsys):
    """The adapter ends in the same bits."""
    run, again = tmp_path / "whole" / "run", tmp_path / "again" / "run"
    train_on(LARGE, run, max_steps=2, save_steps=1)
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-2")
    capsys.readouterr()
    train_on(SMALL, again, max_steps=2, save_steps=1, resume=True, data_cache=run.parent / "cache", no_plan_check=[])
    out = capsys.readouterr().out
    assert ways == ["none", "full"] and (recorded(run), recorded(again)) == ("none", "full")
    assert "resuming from" in out and len(said(out)) == 1
    assert said(out)[0].startswith("--recompute auto: full, because no mode certainly fits; planned ")
    one, other = adapter(run, 2), adapter(again, 2)
    assert all(torch.equal(one[name], other[name]) for name in one) and losses(again) == losses(run)


def test_what_cannot_fit_at_all_is_refused_with_the_plan_of_full(train_on, tmp_path, ways, capsys):
    with pytest.raises(Refusal, match=r"the GPU's memory is not enough.*found 0.2 GiB") as refused:
        train_on(SMALL, tmp_path / "run")
    assert refused.value.exit_status == 6 and ways == [] and not (tmp_path / "run").exists()
    (line,) = said(capsys.readouterr().out)
    assert line.startswith("--recompute auto: full, ") and "does not fit" in line


def test_an_unknown_gpu_is_planned_by_its_memory(train_on, tmp_path, ways, capsys):
    train_on(LARGE, tmp_path / "run", name="a GPU of next year", max_steps=1)
    out = capsys.readouterr().out
    assert ways == ["none"] and "; no mode is faster" in said(out)[0]
    assert "plan: fits on 1 × a GPU of next year with 80.0 GiB: " in out and "speed unknown" in out


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ({"use_liger_kernel": True}, "--use_liger_kernel: not supported by the planner: what Liger's kernels save"),
        ({"torch_compile": True}, "--torch_compile: not supported by the planner: torch.compile itself decides"),
        ({}, "'NoneType'"),  # as any defect of the planner, of which a report is saved
    ],
)
def test_where_the_planner_cannot_say_all_is_recomputed(flag, why, capsys, tmp_path, monkeypatch):
    """In one line, with the reason."""
    monkeypatch.chdir(tmp_path)
    given = {"recompute": AUTO, "device": torch.device("cuda"), "deepspeed": None, "world_size": 1, "process_index": 0}
    given |= {"plan_check": True, "run_folder": None, "gradient_accumulation_steps": 1} | flag
    given |= {"per_device_train_batch_size": 1}
    args = SimpleNamespace(**given)
    with described(LARGE):
        planned = cache(partial(script.make_plan, None, None, None, args, None, None, LARGE))  # no settings: a defect
        script.check_and_decide(planned, args)
    assert args.recompute == "full" and planned() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--recompute auto: full; no plan of the memory: ") and why in line
    saved = re.search(r"; a bug in this package: report it with (.*)", line)
    assert bool(saved) == (not flag) and (saved is None or "Traceback" in Path(saved[1]).read_text())


@pytest.mark.gpu
def test_on_a_gpu_everything_of_a_tiny_model_fits(parts, tmp_path):
    words = flags(parts, tmp_path / "run", recompute="auto", dataloader_num_workers=0)
    done = run([sys.executable, "scripts/train_vit_llm.py", *words])
    assert done.returncode == 0, done.stderr[-2000:]
    assert recorded(tmp_path / "run") == "none" and "; no mode is faster" in said(done.stdout)[0]


def test_another_rank_takes_what_rank_0_has_sent(monkeypatch, capsys):
    monkeypatch.setattr(script, "from_rank_0", lambda value: "every:2" if value is None else value)
    args = SimpleNamespace(
        recompute=AUTO, device=torch.device("cuda"), process_index=1, plan_check=True, run_folder=None
    )
    with described(LARGE):
        script.check_and_decide(lambda: pytest.fail("only rank 0 plans"), args)
    assert args.recompute == "every:2" and not capsys.readouterr().out


@pytest.mark.slow
def test_the_smallest_gpu_decides_for_all_ranks(warm_server, parts, tmp_path):
    """Rank 0, which decides, has the larger one."""
    hooks = [["support.described_gpus:plan_on", {"gib": [LARGE, SMALL]}]]
    words = settings(parts, tmp_path / "run", recompute="auto", max_steps=1, save_steps=1, no_plan_check=[])
    launch = run_successfully(warm_server, words, tmp_path / "launch", world=2, hooks=hooks)
    for rank in (0, 1):
        assert "layers recompute: full" in launch.printed(rank).splitlines()
    assert "because no mode certainly fits" in said(launch.printed(0))[0] and not said(launch.printed(1))
    assert recorded(tmp_path / "run") == "full"
