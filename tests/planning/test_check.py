"""The plan that a training makes of itself before it loads: on a GPU that is only described here."""

from types import SimpleNamespace

import pytest
import torch

from llava_moslora.config import DataSettings
from llava_moslora.data.prepare import prepare
from llava_moslora.devices import GIB
from llava_moslora.errors import Refusal
from llava_moslora.planning.check import check_plan, plan_of_training
from llava_moslora.text.tokenizer import load_tokenizer
from support.planned import TINY_ADAPTERS
from support.settings import parts_of

TRAINING = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": True, "recompute": "none"}
TRAINING |= {"max_steps": 5, "optim": "adamw_torch_fused", "dataloader_num_workers": 0}


@pytest.fixture
def plan_on(parts, tmp_path, monkeypatch):
    def make(name: str, gib: float):
        described = SimpleNamespace(name=name, total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: described)
        data = DataSettings(
            [str(parts.data)], image_folder=str(parts.images), model_max_length=256, data_cache=str(tmp_path)
        )
        tokenizer = load_tokenizer(parts.llm)
        dataset = prepare(data, tokenizer=tokenizer, template="chatml", tokens_per_image=16)
        return plan_of_training(
            parts_of(parts.llm, parts.clip), data, TINY_ADAPTERS, TRAINING, dataset, gpus=1,
            device=torch.device("cuda"), deepspeed={"zero_optimization": {"stage": 1}},
        ), max(dataset["length"][:])  # fmt: skip

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


def test_an_unknown_gpu_has_no_plan(plan_on):
    plan, _ = plan_on("a GPU of next year", 80)
    assert plan is None
