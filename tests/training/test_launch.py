"""What a launcher has set is looked at before a process joins the others."""

import re
from contextlib import nullcontext

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.training.command_line import check_places, parse
from llava_moslora.training.launch import SWITCHES, check_launch

TRAINING = {"deepspeed": "zero_configs/zero2.json", "bf16": True, "fp16": False}
FLOAT32 = {"deepspeed": None, "bf16": False, "fp16": False}
RANK_1 = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of rank 1 of 2, changed; None takes one away."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    none = dict.fromkeys(("ACCELERATE_MIXED_PRECISION", *SWITCHES))

    def launch(**changes: str | None) -> None:
        for name, value in (none | RANK_1 | changes).items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    return launch


def test_ordinary_launches_pass(launched):
    launched()
    check_launch(TRAINING)
    launched(ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_FSDP="false")  # accelerate launch
    check_launch(TRAINING)
    launched(ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_USE_DEEPSPEED="true")  # the same twice
    check_launch(TRAINING)
    launched(MASTER_PORT=None)
    check_launch(FLOAT32)  # accelerate has a default
    launched(**dict.fromkeys(RANK_1), ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_DEEPSPEED="false")
    check_launch(FLOAT32)


def test_deepspeed_needs_a_launcher(launched, monkeypatch):
    launched(**dict.fromkeys(RANK_1))
    with pytest.raises(Refusal, match=r"E-LAUNCH\] --deepspeed: DeepSpeed needs a launcher; fix: deepspeed scripts/"):
        check_launch(TRAINING)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launched(RANK="2", LOCAL_RANK="2", WORLD_SIZE="3")
    with pytest.raises(Refusal, match="more processes than GPUs on this host; found process 3; expected 2"):
        check_launch(TRAINING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT: no number in the environment; found nothing; expected 0 or more; fix: "),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT: no number in the environment; found 'abc'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: no port; found 0; expected 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: no port; found 99999"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE: no number in the environment; found nothing"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: no number in the environment; found ''"),
        ({"RANK": "-1"}, "RANK: no number in the environment; found '-1'"),
        ({"RANK": "7"}, "RANK: there is no such rank; found 7; expected below WORLD_SIZE 2; fix: deepspeed scripts/"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK: no number in the environment; found 'one'"),
    ],
    ids=str,
)
def test_variables_that_are_no_place_among_the_ranks(launched, changes, message):
    launched(**changes)
    with pytest.raises(Refusal, match=rf"E-LAUNCH\] {re.escape(message)}") as refused:
        check_launch(TRAINING)
    assert "WORLD_SIZE, MASTER_ADDR and MASTER_PORT" in refused.value.fix


@pytest.mark.parametrize(
    ("training", "changes", "message"),
    [
        (FLOAT32, {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED: DeepSpeed is switched on beside the "
         "flags; fix: --deepspeed zero_configs/zero2.json in place of --use_deepspeed"),
        (TRAINING, {"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP: FSDP is switched on"),
        (FLOAT32, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM: Megatron-LM is switched on"),
        (FLOAT32, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION: another precision than the flags"
         " say; found bf16; expected no; fix: --bf16 True with --deepspeed in place of accelerate's --mixed_precision"),
        (TRAINING, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "found fp16; expected bf16; fix: --fp16 True"),
        (TRAINING, {"ACCELERATE_MIXED_PRECISION": "fp8"}, "found fp8; expected bf16; fix: leave out accelerate's"),
    ],
    ids=str,
)  # fmt: skip
def test_what_accelerates_launcher_switches_on_past_the_flags(launched, training, changes, message):
    launched(**changes)
    with pytest.raises(Refusal, match=rf"E-LAUNCH\] .*{re.escape(message)}"):
        check_launch(training)


@pytest.mark.parametrize(
    ("environment", "looks"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "4"}, False),
    ],
)
def test_the_run_folder_is_refused_early_where_no_other_host_waits(launched, tmp_path, environment, looks):
    """With other hosts after all ranks have met: they would wait for rank 0 until --ddp_timeout."""
    launched(**dict.fromkeys((*RANK_1, "LOCAL_SIZE")) | environment)
    (tmp_path / "notes.md").touch()
    given = parse(["--model_name_or_path", str(tmp_path), "--data_path", "d", "--output_dir", str(tmp_path)])
    with pytest.raises(Refusal, match=r"C-OUTPUT.*the folder is not empty") if looks else nullcontext():
        check_places(*given)
