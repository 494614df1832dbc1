"""A training that runs out of memory names the flags with which the planner would go on."""

from dataclasses import replace

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.planning.advice import LESS, advice_where_memory_ends, less_memory
from llava_moslora.planning.plan import Request, make_plan
from llava_moslora.planning.records import assumed
from llava_moslora.training.nonfinite import out_of_memory
from llava_moslora.training.trainer import MosLoraTrainer
from support.planned import choice, large_model
from support.training_runs import train


def plan_of(**changes):
    now = choice(8, "none", **{"accumulation": 2} | changes)
    records = assumed(2048, 1000, None, None, None, 576)
    request = Request(MODEL, now, records, "H100", gpus=1, zeros=((now.zero_file, now.zero),))
    return make_plan(request, with_largest=False)


MODEL = large_model()


def flags_in(text: str) -> dict[str, str]:
    words = text.split(" (")[0].split()
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_advice_needs_clearly_less_and_keeps_the_global_batch():
    plan = plan_of()
    flags = flags_in(less_memory(plan))
    micro, steps = (int(flags[f"--{n}"]) for n in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert micro * steps == 16 and flags["--bits"] == "16"
    advised = replace(plan.request.choice, micro_batch=micro, accumulation=steps, recompute=flags["--recompute"])
    assert plan.request.memory(advised).peak <= LESS * plan.memory.peak and plan.request.fits(advised)


def test_where_nothing_needs_less_it_says_so():
    plan = plan_of()
    nothing = replace(plan, request=replace(plan.request, gib=1.0))
    assert less_memory(nothing).startswith("no equivalent setting needs less")


def test_only_lost_memory_is_advised_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**30))
    asked = []
    with pytest.raises(Refusal, match="R-NAN") as other, advice_where_memory_ends(lambda: asked.append(1)):
        raise Refusal("R-NAN", "another refusal")
    assert not asked and other.value.code == "R-NAN"
    with pytest.raises(Refusal, match="lower --per_device_train_batch_size"), advice_where_memory_ends(lambda: None):
        raise out_of_memory(8) from torch.OutOfMemoryError("CUDA out of memory")
    plan = plan_of()
    with pytest.raises(Refusal, match=r"E-MEMORY.*fix: --per_device_train_batch_size") as refused:  # noqa: SIM117
        with advice_where_memory_ends(lambda: plan):
            raise out_of_memory(8) from torch.OutOfMemoryError("CUDA out of memory")
    assert isinstance(refused.value.__cause__, torch.OutOfMemoryError) and refused.value.exit_status == 4


def test_a_training_that_runs_out_of_memory_ends_with_the_advice(parts, tmp_path, monkeypatch):
    import scripts.train_vit_llm as script

    plan = plan_of()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**30))
    monkeypatch.setattr(script, "make_plan", lambda *_: plan)
    monkeypatch.setattr(MosLoraTrainer, "compute_loss", _no_memory)
    with pytest.raises(Refusal, match=r"E-MEMORY.*--recompute .*planned .* GiB, now"):
        train(parts, tmp_path / "run", max_steps=1, no_plan_check=[])


def _no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
