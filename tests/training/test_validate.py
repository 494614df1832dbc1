"""Flags that do not go together are refused in one line, before any weight is read."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.training import validate
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.command_line import parse
from llava_moslora.training.validate import check
from scripts import prepare_data
from support.launching import ROOT
from support.training_runs import train

PARTS = "--model_name_or_path llm --vision_tower clip --data_path d.json --image_folder i".split()

SPLIT = "--validation_split 0.1"
ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def asked(tmp_path):
    """The checks on a command line; ``deepspeed`` is the content of its file."""

    def ask(*more: str, deepspeed: dict | None = None, whole: object = None) -> None:
        words = [*PARTS]
        words += ["--output_dir", str(tmp_path / "run")]
        if deepspeed is not None:
            whole = {"train_micro_batch_size_per_gpu": "auto"} | deepspeed
        if whole is not None:
            (tmp_path / "ds.json").write_text(json.dumps(whole))
            words += ["--deepspeed", str(tmp_path / "ds.json")]
        model, data, adapter, training = parse([*words, *more])
        check(model, data, adapter, TrainingArguments(**training))

    return ask


def test_the_defaults_pass(asked):
    asked()
    asked("--bf16", "True", deepspeed={"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}})


def test_riemannian_gradients_need_whole_gradients(asked):
    asked("--method", "lora", "--riemannian", "True")
    with pytest.raises(Refusal, match="--riemannian: DeepSpeed partitions or frees the gradients"):
        asked("--method", "lora", "--riemannian", "True", "--bf16", "True", deepspeed=ZERO_2)


# C2: an impossible rank
# C3: alpha 0 or NaN
# C11: rates out of range
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
        ("--loss_average batch", r"--loss_average: invalid choice: .*batch.*tokens.*micro_batch"),
        ("--lora_r -4", r"--lora_r: out of range; found -4; expected at least 0"),
        ("--vision_lora_alpha 0", r"--vision_lora_alpha: out of range; found 0.0; expected above 0"),
        ("--lora_alpha nan", r"--lora_alpha: out of range; found nan"),
        ("--lora_dropout 1", r"--lora_dropout: out of range; found 1.0; expected a probability below 1"),
        ("--bf16 True", r"--bf16: without DeepSpeed there are no float32 master weights.*zero2.json"),
        ("--attn_implementation flash", r"--attn_implementation: invalid choice: 'flash' .*sdpa.*eager"),
        ("--sample_steps 0", r"--sample_steps: out of range"),
        ("--adam_beta1 2", r"--adam_beta1: out of range; found 2.0; expected below 1"),
        ("--adam_epsilon -1", r"--adam_epsilon: out of range; found -1.0; expected above 0"),
        ("--seed -1", r"--seed: out of range; found -1; expected at least 0"),
        ("--seed 4294967296", r"--seed: out of range; found 4294967296; expected below 4294967296"),
        ("--neftune_noise_alpha nan", r"--neftune_noise_alpha: out of range; found nan"),
        ("--per_device_eval_batch_size 0", r"--per_device_eval_batch_size: out of range; found 0; expected at least 1"),
        ("--prediction_loss_only True", r"--prediction_loss_only: evaluations compute loss and token accuracy"),
        ("--label_smoothing_factor 0.1", r"--label_smoothing_factor: the loss has no label smoothing; found 0.1"),
        ("--report_to banana", r"--report_to: unknown reporter; found banana; expected .*tensorboard.*, or none"),
        ("--save_steps inf", r"inconsistent training arguments"),
        (
            "--max_steps 0",
            r"--max_steps: nothing to train; found 0; expected at least 1, or -1 for as many as --num_tr",
        ),
        (
            "--lr_scheduler_type cosine_with_min_lr",
            r"--lr_scheduler_kwargs: does not fit .*cosine_with_min_lr; found .*min",
        ),
        ('--lr_scheduler_kwargs {"foo":1}', r"--lr_scheduler_kwargs: does not fit --lr_scheduler_type cosine; .*foo"),
        ("--lr_scheduler_kwargs foo", r"--lr_scheduler_kwargs: does not fit --lr_scheduler_type cosine"),
        ("--optim sgd --optim_args momentum", r"--optim_args: cannot be used; found momentum"),
        (
            "--optim sgd --optim_args momentum=0.9,momentun=1",
            r"--optim_args: .*found momentun=1, which has no effect",
        ),
        ("--max_steps -5", r"--max_steps: nothing to train; found -5"),
        ("--resume_from_checkpoint runs/a/checkpoint-2", r"--resume_from_checkpoint: .*; fix: use --resume True"),
        (
            "--dataloader_num_workers 1 --dataloader_prefetch_factor 0",
            r"C-FLAG\] --dataloader_prefetch_factor: out of range; found 0; expected at least 1",
        ),
    ],
)
def test_values_out_of_range(asked, flags, message):
    with pytest.raises(Refusal, match=message):
        asked(*flags.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eval_strategy steps", r"--eval_strategy steps: there is no validation data; fix: --validation_split 0.01"),
        ("--eval_on_start True", r"--eval_on_start: there is no validation data; fix: "),
        ("--validation_split 0.1", r"--validation_split: validation data that would never be evaluated; fix: --eval_s"),
        ("--eval_data_path v.json", r"--eval_data_path: validation data that would never be evaluated"),
        ("--eval_on_start True --validation_split 1.5", r"--validation_split: out of range; found 1.5; expected a sh"),
        ("--eval_on_start True --eval_data_path a/v.json b/v.json", r"duplicate validation set name; found a/v.json"),
        ("--load_best_model_at_end True", r"--load_best_model_at_end: needs evaluations, and --eval_strategy is no; f"),
        ("--early_stopping_patience 3", r"--early_stopping_patience: needs evaluations, .*found 3; fix: --eval_strat"),
        ("--early_stopping_threshold 0.1", r"--early_stopping_threshold: needs --early_stopping_patience"),
        ("--metric_for_best_model loss", r"--metric_for_best_model: needs evaluations"),
        ("--eval_steps 5", r"--eval_steps: needs evaluations, and --eval_strategy is no; found 5"),
        ("--save_strategy best", r"--save_strategy: there is no best checkpoint without evaluations"),
        (f"{SPLIT} --eval_strategy epoch --eval_steps 5", r"--eval_steps: has no effect with --eval_strategy epoch"),
        (f"{SPLIT} --eval_strategy steps --eval_steps 0", r"--eval_steps: out of range; found 0"),
        (f"{SPLIT} --eval_strategy steps --metric_for_best_model f1", r"unknown metric; found f1; expected loss . tok"),
        (f"{SPLIT} --eval_strategy steps --eval_data_path v.json --metric_for_best_model eval_w_loss",
         r"found w_loss; expected loss . token_accuracy . d_loss . d_token_accuracy . v_loss . v_token_accuracy"),
        (f"{SPLIT} --eval_strategy epoch --load_best_model_at_end True", r"found --eval_strategy epoch, --save_strat"
         "egy steps; fix: --save_strategy epoch"),
        (f"{SPLIT} --eval_strategy steps --eval_steps 40 --save_steps 50 --load_best_model_at_end True",
         r"--load_best_model_at_end: checkpoints would be saved that were not evaluated; found --eval_steps 40, "
         "--save_steps 50; expected .* multiple of --eval_steps; fix: --save_steps 40"),
        (f"{SPLIT} --eval_strategy steps --eval_steps 0.1 --save_steps 50 --load_best_model_at_end True",
         r"found --eval_steps 0.1, --save_steps 50"),
        (f"{SPLIT} --eval_strategy steps --lr_scheduler_type reduce_lr_on_plateau",
         r"--lr_scheduler_type: invalid choice: 'reduce_lr"),
    ],
)  # fmt: skip
def test_evaluations_that_make_no_sense(asked, flags, message):
    with pytest.raises(Refusal, match=r"C-FLAG\] .*" + message):
        asked(*flags.split())


def test_evaluations_that_make_sense(asked):
    for flags in (
        "--eval_on_start True",
        "--eval_strategy steps --load_best_model_at_end True",  # evaluated when saved, by default
        "--eval_strategy steps --eval_steps 0.1 --save_steps 0.3 --load_best_model_at_end True",
        "--eval_strategy steps --eval_steps 7 --save_strategy best --load_best_model_at_end True",
        "--eval_strategy epoch --metric_for_best_model eval_token_accuracy --early_stopping_patience 2",
    ):
        asked(*SPLIT.split(), *flags.split())


def test_float16_needs_a_stage_that_saves_its_loss_scale(asked, monkeypatch):
    monkeypatch.setattr(validate, "_check_precision", lambda args: None)  # a CPU has no float16
    with pytest.raises(Refusal, match=r"C-FLAG\] --fp16: DeepSpeed's stage 0 .*; fix: --bf16 True, or .*zero1.json"):
        asked("--fp16", "True", deepspeed={"zero_optimization": {"stage": 0}})


# C6: two precisions, or float16 on a CPU
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_a_cpu_cannot_do(asked):
    with pytest.raises(Refusal, match=r"--fp16: float16 cannot be trained on a CPU; fix: --bf16 True"):
        asked("--fp16", "True")


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("name", "zero", "message"),
    [
        ("galore_adamw", None, r"this optimizer's state cannot be saved; found galore_adamw; expected adamw_torch, .*"),
        ("adagrad", {"stage": 0}, "this optimizer's state cannot be saved; found adagrad"),
        (
            "adamw_bnb_8bit",
            {"stage": 2},
            r"cannot partition this optimizer's state; found adamw_bnb_8bit; .*; fix: zero_configs/zero0.json",
        ),
        (
            "adafactor",
            {"stage": 3},
            r"cannot partition this optimizer's state; found adafactor; expected adamw_torch, .*, sgd",
        ),
        (
            "sgd",
            OFFLOAD,
            r"replaces an offloaded optimizer by its Adam; found sgd; expected adamw_torch, adamw_torch_fused; "
            "fix: --optim",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_saved_is_refused(asked, name, zero, message):
    with pytest.raises(Refusal, match=r"C-FLAG\] --optim: .*" + message):
        asked("--optim", name, deepspeed=None if zero is None else {"zero_optimization": zero})


def test_optimizers_that_can_be_saved(asked):
    asked("--optim", "adafactor")
    asked("--optim", "sgd", deepspeed=ZERO_2)
    asked("--optim", "adafactor", deepspeed={"zero_optimization": {"stage": 0}})
    asked("--optim", "adamw_torch", deepspeed={"zero_optimization": OFFLOAD})


# C6: two precisions, or float16 on a CPU
def test_both_precisions_at_once(asked):
    with pytest.raises(Refusal, match=r"C-FLAG\] .*fp16.*bf16|C-FLAG\] .*bf16.*fp16"):
        asked("--fp16", "True", "--bf16", "True")


@pytest.mark.parametrize(
    ("flags", "package", "message"),
    [
        ("--optim lion_8bit", "bitsandbytes", r"E-MISSING\] --optim lion_8bit: needs bitsandbytes, which is not"),
        ("--bits 4", "bitsandbytes", r"E-MISSING\] --bits 4: needs bitsandbytes.*pip install 'llava_moslora\[quant\]'"),
        (
            "--attn_implementation flash_attention_2",
            "flash_attn",
            r"E-MISSING\] --attn_implementation flash_attention_2: needs flash_attn, which.*pip install flash-attn, or",
        ),
        (
            "--attn_implementation flash_attention_3",
            "flash_attn_interface",
            r"--attn_implementation flash_attention_3: needs flash_attn_interface, which is not installed.*hopper",
        ),
        ("--use_liger_kernel True", "liger_kernel", r"--use_liger_kernel: needs liger_kernel, which is not installed"),
        ("--report_to wandb", "wandb", r"--report_to wandb: needs wandb, which is not .*; fix: pip install wandb"),
        ("--report_to mlflow", "mlflow", r"E-MISSING\] --report_to mlflow: needs mlflow.*; fix: pip install mlflow"),
        ("--report_to trackio", "trackio", r"E-MISSING\] --report_to trackio: needs.*; fix: pip install trackio"),
    ],
)
def test_packages_that_are_missing(asked, monkeypatch, flags, package, message):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a))
    with pytest.raises(Refusal, match=message):
        asked(*flags.split())


def test_flash_attention_needs_a_gpu_and_16_bits(asked, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: True)
    words = ["--attn_implementation", "flash_attention_2"]
    found, half = ("float32", "; fix: .* sdpa, or --bf16 True") if torch.cuda.is_available() else ("a CPU", "; fix: .*")
    with pytest.raises(Refusal, match=f"flash attention needs 16-bit weights on a GPU; found {found}{half}"):
        asked(*words)
    asked("--attn_implementation", "eager")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"train_batch_size": "auto", "zero_optimization": True}, r"zero_optimization: not a mapping; found True"),
        (
            {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_sze": 5}},
            r"C-DEEPSPEED\] .*:zero_optimization.reduce_bucket_sze: extra inputs are not permitted; found 5; fix: ",
        ),
        (
            {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "allgather_bucket_size": -5}},
            r"zero_optimization.allgather_bucket_size: input should be greater than or equal to 0; found -5",
        ),
        ({"train_batch_size": "auto", "bf16": True}, r"bf16: not a mapping; found True"),
        ([], r"--deepspeed: not a mapping; found \[\]"),
        ({"train_batch_size": "auto", "data_types": "fp32"}, r"data_types: not a mapping; found fp32"),
        (
            {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            r"offload_optimizer: not a mapping; found cpu; expected \{…\}",
        ),
        ({"train_batch_size": "auto", "zero_optimization": {"stage": True}}, r"stage: unknown stage; found True"),
        ({"train_batch_size": "auto", "zero_optimization": {"stage": [2]}}, r"stage: unknown stage; found \[2\]"),
        *(
            (
                {"train_batch_size": "auto", "zero_optimization": {"stage": 3, "reduce_bucket_size": size}},
                r"C-DEEPSPEED\] .*reduce_bucket_size: not a number of elements; .*expected 0 or more, or \"auto\"",
            )
            for size in (-1, True, "5e8", [5])
        ),
    ],
    ids=str,
)
def test_deepspeed_files_that_cannot_be(asked, file, message):
    with pytest.raises(Refusal, match=message):
        asked(whole=file)


def test_what_torch_compile_decides_itself(asked):
    with pytest.raises(Refusal, match=r"--torch_compile, --recompute selective: torch.compile itself decides"):
        asked("--torch_compile", "True", "--recompute", "selective")
    asked("--torch_compile", "True", "--recompute", "full")


def test_what_liger_cannot_do(asked, monkeypatch):
    """Its kernels need a GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: True)
    if not torch.cuda.is_available():
        with pytest.raises(Refusal, match="Liger's kernels need a GPU"):
            asked("--use_liger_kernel", "True", "--lora_target_modules", "q_proj")
    else:
        asked("--use_liger_kernel", "True", "--lora_target_modules", "q_proj")


# C9: a DeepSpeed file that contradicts the flags
# C10: batch sizes that do not multiply
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


# C8: a DeepSpeed file that is missing or broken
@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, [], r"zero_optimization.stage: unknown stage; found 4; expected 0 to 3"),
        (
            {"optimizer": {"type": "AdamW"}, **ZERO_2},
            [],
            r"ds.json:optimizer: would replace the optimizer .* learning rate per part",
        ),
        ({"scheduler": {"type": "WarmupLR"}, **ZERO_2}, [], r"ds.json:scheduler: would replace"),
        (
            {"zero_optimization": {"stage": 3}},
            ["--sample_questions", "q.json"],
            "under ZeRO-3, generation would gather",
        ),
    ],
)
def test_deepspeed_files_that_cannot_work(asked, file, more, message):
    with pytest.raises(Refusal, match=message):
        asked(*more, deepspeed=file)


ZERO_3 = {"stage": 3, "sub_group_size": 2000}
ELASTIC = {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1, 2]}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (ZERO_2 | {"gradient_cliping": 1.0}, r"gradient_cliping: unknown key.*; fix: did you mean gradient_clipping\?"),
        (ZERO_2 | {"x-ours": 1}, r"x-ours: unknown key, which DeepSpeed would ignore; fix: remove it"),
        (ZERO_2 | {"bfloat16": {"enabled": True}}, r"bfloat16: is an old name of bf16; .* write .*auto"),
        (ZERO_2 | {"elasticity": ELASTIC}, r"elasticity: DeepSpeed has removed this; fix: remove elasticity from"),
        (ZERO_2 | {"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop: DeepSpeed has removed"),
        (ZERO_2 | {"curriculum_learning": {"enabled": True}}, "curriculum_learning: DeepSpeed has removed"),
        (ZERO_2 | {"amp": {"enabled": False}}, "amp: DeepSpeed has removed"),
        (ZERO_2 | {"torch_autocast": {"enabled": True}}, r"torch_autocast: trains in another precision.* --bf16 True"),
        (ZERO_2 | {"data_efficiency": {"enabled": True}}, r"data_efficiency: would change the order of the records"),
        (ZERO_2 | {"prescale_gradients": True}, r"prescale_gradients: .*found True; expected False; fix: remove it"),
        (ZERO_2 | {"gradient_predivide_factor": 2.0}, r"gradient_predivide_factor: .*found 2.0; expected 1"),
        (ZERO_2 | {"communication_data_type": "fp17"}, r"--deepspeed: DeepSpeed cannot read it; found "
         r"ValueError: Invalid communication_data_type. Supported data types: \['fp16', 'bf16', 'fp32'\]. Got: fp17"),
        (ZERO_2 | {"checkpoint": {"tag_validation": "maybe"}}, "found DeepSpeedConfigError: .*tag_validation"),
        (ZERO_2 | {"steps_per_print": "often", "timers": 5}, "DeepSpeed cannot read it"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, r'cpu_offload: is an old name.*"offload_optimizer"'),
        ({"zero_optimization": {"stage": 2, "cpu_offload": False}}, "cpu_offload: is an old name.*; found False"),
        (
            {"zero_optimization": ZERO_3 | dict.fromkeys(
                ("stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"), True)},
            "DeepSpeed cannot read it; found AssertionError: Cannot provide deprecated parameter",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow: its optimizer state cannot"),
        ({"zero_optimization": ZERO_3 | {"zero_hpz_partition_size": 2}}, r"zero_hpz_partition_size: .*; expected 1"),
        (
            {"zero_optimization": ZERO_3 | {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"offload_optimizer.ratio: .*no learning-rate schedule.*not be saved; found 0.5; expected 1; fix: ",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_deepspeed_would_ignore_or_refuse_late(asked, file, message):
    with pytest.raises(Refusal, match=r"C-DEEPSPEED\] .*ds.json:.*" + message):
        asked(deepspeed=file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_deepspeed_cannot_do_on_a_cpu(asked):
    with pytest.raises(Refusal, match=r"zero_quantized_weights: DeepSpeed has no kernels for this on a CPU"):
        asked(deepspeed={"zero_optimization": ZERO_3 | {"zero_quantized_weights": True}})


def test_what_is_switched_off_or_on_purpose_passes(asked):
    off = {name: {"enabled": False} for name in ("torch_autocast", "data_efficiency", "autotuning", "flops_profiler")}
    asked(deepspeed=ZERO_2 | off | {"prescale_gradients": False, "gradient_clipping": 1.0, "steps_per_print": 10})
    offload = {"device": "cpu", "ratio": 1.0, "pin_memory": True}
    sizes = {"reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": "auto"}
    asked(deepspeed={"zero_optimization": ZERO_3 | sizes | {"offload_optimizer": offload}})
    for file in sorted((ROOT / "zero_configs").iterdir()):
        asked("--bf16", "True", whole=json.loads(file.read_text()))


@pytest.mark.parametrize("given", [{}, {"train_batch_size": 6}, {"train_micro_batch_size_per_gpu": "auto"}], ids=str)
def test_missing_keys_are_the_flags(given, tmp_path):
    """The Trainer fills "auto", but adds nothing: without this the gradient would not be clipped."""
    (tmp_path / "ds.json").write_text(json.dumps(ZERO_2 | {"bf16": {"check_grad_overflow": False}} | given))
    words = "--max_grad_norm 0.5 --bf16 True --per_device_train_batch_size 3 --gradient_accumulation_steps 2".split()
    words += ["--output_dir", str(tmp_path / "run"), "--deepspeed", str(tmp_path / "ds.json")]
    *_, training = parse([*PARTS, *words])
    args = TrainingArguments(**training)
    filled = args.hf_deepspeed_config.config
    del filled["steps_per_print"]  # accelerate's
    assert filled == {
        "train_batch_size": 6, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5, "bf16": {"enabled": True, "check_grad_overflow": False}, "fp16": {"enabled": False},
        **ZERO_2,
    }  # fmt: skip
    assert args.deepspeed == str(tmp_path / "ds.json")


# C16: YAML that builds objects
def test_yaml_with_aliases_is_not_read(tmp_path):
    """Ten lines of aliases can stand for a billion values."""
    (tmp_path / "c.yaml").write_text("lora_target_modules: &a [q_proj, q_proj]\nvision_lora_target_modules: *a\n")
    with pytest.raises(Refusal, match=r"neither YAML nor JSON; found an alias, \*a"):
        parse(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("limit", "expected"), [(-1, "above 16, .*one image"), (16, "above 16"), (2049, "at most 2048")]
)
def test_lengths_that_cannot_be(parts, tmp_path, monkeypatch, limit, expected):
    """Refused before the data are read: neither a cache nor a run folder is made."""
    message = rf"C-FLAG\] --model_max_length: .*; found {limit}; expected {expected}"
    with pytest.raises(Refusal, match=message):
        train(parts, tmp_path / "run", model_max_length=limit)
    words = ["--model_name_or_path", parts.llm, "--vision_tower", parts.clip, "--data_path", parts.data]
    words += ["--image_folder", parts.images, "--data_cache", tmp_path / "cache", "--model_max_length", limit]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
    with pytest.raises(Refusal, match=message):
        prepare_data.main()
    assert not list(tmp_path.iterdir())


def test_image_settings_are_refused_before_the_data_are_read(parts, tmp_path):
    tower = shutil.copytree(parts.clip, tmp_path / "clip")
    file = tower / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_rescale": False}))
    with pytest.raises(Refusal, match=r"preprocessor_config.json:do_rescale: not usable; found False; expected true"):
        train(parts, tmp_path / "run", vision_tower=tower)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
