"""The plan that a training makes of itself before it loads: on a GPU that is only described here."""

import pytest
import torch

from llava_moslora.config import DataSettings
from llava_moslora.data.prepare import prepare
from llava_moslora.devices import GIB
from llava_moslora.errors import Refusal
from llava_moslora.planning import check
from llava_moslora.planning.check import check_plan, plan_of_training, smallest_memory
from llava_moslora.text.tokenizer import load_tokenizer
from support.described_gpus import described
from support.planned import TINY_ADAPTERS
from support.settings import parts_of

TRAINING = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": True, "recompute": "none"}
TRAINING |= {"max_steps": 5, "optim": "adamw_torch_fused", "dataloader_num_workers": 0}


@pytest.fixture
def plan_on(parts, tmp_path):
    def make(name: str, gib: float):
        data = DataSettings(
            [str(parts.data)], image_folder=str(parts.images), model_max_length=256, data_cache=str(tmp_path)
        )
        tokenizer = load_tokenizer(parts.llm)
        dataset = prepare(data, tokenizer=tokenizer, template="chatml", tokens_per_image=16)
        settings = (parts_of(parts.llm, parts.clip), data, TINY_ADAPTERS, TRAINING, dataset)
        device, zero1 = torch.device("cuda"), {"zero_optimization": {"stage": 1}}
        with described(gib, name):
            memory = smallest_memory(device)
            plan = plan_of_training(*settings, gpus=1, device=device, memory=memory, deepspeed=zero1)
        return plan, max(dataset["length"][:])

    return make


def test_the_first_line_is_of_the_real_records(plan_on):
    plan, longest = plan_on("NVIDIA A100-SXM4-80GB", 80)
    assert check_plan(plan).startswith("plan: fits on 1 × A100 with 80.0 GiB: ")
    assert plan.request.batch(plan.request.choice).tokens == longest


def test_a_training_that_cannot_fit_is_refused(plan_on):
    plan, _ = plan_on("NVIDIA A100-SXM4-80GB", 0.25)
    with pytest.raises(Refusal, match=r"the GPU's memory is not enough.*found 0.2 GiB.*--no_plan_check") as refused:
        check_plan(plan)
    assert refused.value.exit_status == 6


def test_of_an_unknown_gpu_the_memory_is_planned(plan_on):
    """As that of an H100 of its size; a time is not said."""
    plan, _ = plan_on("a GPU of next year", 80)
    known, _ = plan_on("NVIDIA H100 80GB HBM3", 80)
    line = check_plan(plan)
    assert plan.memory == known.memory
    assert line.startswith("plan: fits on 1 × a GPU of next year with 80.0 GiB: ") and line.endswith("speed unknown")
    with pytest.raises(Refusal, match=r"the GPU's memory is not enough.*found 0.2 GiB"):
        check_plan(plan_on("a GPU of next year", 0.25)[0])


def test_the_smallest_gpu_of_all_ranks_counts(monkeypatch):
    monkeypatch.setattr(check, "from_all_ranks", lambda mine: [mine, 24 * GIB, 80 * GIB])
    with described(40):
        assert smallest_memory(torch.device("cuda")) == 24 * GIB
    assert smallest_memory(torch.device("cpu")) is None
