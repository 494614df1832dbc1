"""Flags that do not go together are refused in one line, before any weight is read."""

import importlib.util
import json

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.training.arguments import parse
from llava_moslora.training.checks import check, check_launch

PARTS = "--model_name_or_path llm --vision_tower clip --data_path d.json --image_folder i".split()

ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def asked(tmp_path):
    """The checks on a command line; ``deepspeed`` is the content of its file."""

    def ask(*more: str, deepspeed: dict | None = None) -> None:
        words = [*PARTS]
        words += ["--output_dir", str(tmp_path / "run")]
        if deepspeed is not None:
            (tmp_path / "ds.json").write_text(json.dumps(deepspeed))
            words += ["--deepspeed", str(tmp_path / "ds.json")]
        model_args, _, adapter_args, args = parse([*words, *more])
        check(model_args, adapter_args, args)

    return ask


def test_the_defaults_pass(asked):
    asked()
    asked("--bf16", "True", deepspeed={"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning_rate 0", r"--learning_rate: out of range; found 0.0; expected above 0"),
        ("--learning_rate nan", r"--learning_rate: out of range; found nan"),
        ("--vision_lr -1", r"--vision_lr: out of range; found -1.0; expected above 0"),
        ("--weight_decay -0.1", r"--weight_decay: out of range; found -0.1; expected at least 0"),
        ("--per_device_train_batch_size 0", r"--per_device_train_batch_size: out of range; found 0"),
        ("--gradient_accumulation_steps 0", r"--gradient_accumulation_steps: out of range; found 0"),
        ("--num_train_epochs 0", r"--num_train_epochs: nothing to train; found 0.0; expected above 0"),
        ("--warmup_steps -1", r"warmup_steps = -1.0"),
        ("--loss_average batch", r"--loss_average: unknown average; found batch; expected tokens or micro_batch"),
        ("--lora_r -4", r"--lora_r: out of range; found -4; expected at least 0"),
        ("--vision_lora_alpha 0", r"--vision_lora_alpha: out of range; found 0.0; expected above 0"),
        ("--lora_alpha nan", r"--lora_alpha: out of range; found nan"),
        ("--lora_dropout 1", r"--lora_dropout: out of range; found 1.0; expected a probability below 1"),
        ("--bf16 True", r"--bf16: without DeepSpeed there are no float32 masters.*zero2.json"),
        ("--sample_steps 0", r"--sample_steps: out of range"),
        (
            "--dataloader_num_workers 1 --dataloader_prefetch_factor 0",
            r"C-FLAG\] --dataloader_prefetch_factor: out of range; found 0; expected at least 1",
        ),
    ],
)
def test_values_out_of_range(asked, flags, message):
    with pytest.raises(Refusal, match=message):
        asked(*flags.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_a_cpu_cannot_do(asked):
    with pytest.raises(Refusal, match=r"--fp16: float16 cannot be trained on a CPU; fix: --bf16 True"):
        asked("--fp16", "True")


def test_both_precisions_at_once(asked):
    with pytest.raises(Refusal, match=r"C-FLAG\] .*fp16.*bf16|C-FLAG\] .*bf16.*fp16"):
        asked("--fp16", "True", "--bf16", "True")


@pytest.mark.parametrize(
    ("flags", "package", "message"),
    [
        ("--bits 4", "bitsandbytes", r"E-MISSING\] --bits 4: needs bitsandbytes.*pip install 'llava_moslora\[quant\]'"),
        ("--use_liger_kernel True", "liger_kernel", r"--use_liger_kernel: needs liger_kernel, which is not installed"),
        ("--report_to wandb", "wandb", r"--report_to wandb: needs wandb, which is not .*; fix: pip install wandb"),
    ],
)
def test_packages_that_are_missing(asked, monkeypatch, flags, package, message):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(Refusal, match=message):
        asked(*flags.split())


def test_what_liger_cannot_do(asked, monkeypatch):
    """Its fused loss would ignore an adapted head; its kernels need a GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: True)
    with pytest.raises(Refusal, match=r"would ignore the adapter on it; fix: leave one of the two out"):
        asked("--use_liger_kernel", "True", "--lora_target_modules", "q_proj", "lm_head")
    if not torch.cuda.is_available():
        with pytest.raises(Refusal, match="Liger's kernels need a GPU"):
            asked("--use_liger_kernel", "True", "--lora_target_modules", "q_proj")
    else:
        asked("--use_liger_kernel", "True", "--lora_target_modules", "q_proj")


def test_deepspeeds_file_against_the_flags_every_difference_at_once(asked):
    file = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 64,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    with pytest.raises(Refusal, match=r"ds.json:--deepspeed: the file and the flags disagree") as refused:
        asked("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", deepspeed=file)
    line = str(refused.value)
    assert "train_micro_batch_size_per_gpu 4 against 8 (--per_device_train_batch_size)" in line
    assert "train_batch_size 64 against 16 = 8 per device × 2 accumulated × 1 ranks" in line
    assert "gradient_clipping 0.5 against 1.0 (--max_grad_norm)" in line
    assert "bf16.enabled True against False (--bf16)" in line


@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, [], r"zero_optimization.stage: unknown stage; found 4; expected 0 to 3"),
        (
            {"optimizer": {"type": "AdamW"}, **ZERO_2},
            [],
            r"ds.json:optimizer: would replace the optimizer .* rate per part",
        ),
        ({"scheduler": {"type": "WarmupLR"}, **ZERO_2}, [], r"ds.json:scheduler: would replace"),
        ({"zero_optimization": {"stage": 3}}, ["--sample_questions", "q.json"], "under ZeRO-3 no rank holds"),
    ],
)
def test_deepspeed_files_that_cannot_work(asked, file, more, message):
    with pytest.raises(Refusal, match=message):
        asked(*more, deepspeed=file)


def test_deepspeed_needs_a_launcher(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    words = [*PARTS]
    words += ["--output_dir", str(tmp_path / "run"), "--deepspeed", str(tmp_path / "ds.json")]
    monkeypatch.delenv("RANK", raising=False)
    *_, args = parse(words)
    with pytest.raises(Refusal, match=r"E-LAUNCH\] --deepspeed: DeepSpeed needs a launcher; fix: deepspeed scripts/"):
        check_launch(args)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(Refusal, match="more processes than GPUs on this host; found process 3; expected 2"):
        check_launch(args)


def test_yaml_with_aliases_is_not_read(tmp_path):
    """Ten lines of aliases can stand for a billion values."""
    (tmp_path / "c.yaml").write_text("lora_target_modules: &a [q_proj, q_proj]\nvision_lora_target_modules: *a\n")
    with pytest.raises(Refusal, match=r"neither YAML nor JSON; found an alias, \*a"):
        parse(["--config", str(tmp_path / "c.yaml")])
