"""Each flag of the Trainer does what it says, or is refused: the table, and what it names as tests."""

import ast
import logging
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import transformers.trainer
import transformers.training_args
from accelerate import Accelerator
from transformers import HfArgumentParser, Trainer
from transformers import TrainingArguments as HfTrainingArguments
from transformers.integrations import integration_utils
from transformers.utils import logging as hf_logging

import scripts.train_vit_llm as script
from llava_moslora.config import LR_SCHEDULES
from llava_moslora.errors import Refusal
from llava_moslora.flags import NOT_KNOWN, ScriptParser
from llava_moslora.training import checkpoint as checkpoint_module
from llava_moslora.training import trainer as trainer_module
from llava_moslora.training import trainer_flags
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.command_line import parse
from llava_moslora.training.compatible import PER_PARAMETER, PER_WEIGHT
from llava_moslora.training.flag_texts import more_help, table
from llava_moslora.training.trainer_fields import trainer_fields
from llava_moslora.training.trainer_flags import FLAGS, FORMER, WITH_ARGS, Honoured, Refused, check_flags
from support.training_runs import rows, train

ROOT = Path(__file__).parents[2]
HERE = "tests/training/test_trainer_flags.py"
REFUSED = [name for name, rule in FLAGS.items() if isinstance(rule, Refused)]


# ---- the table ----


def test_every_flag_of_this_transformers_is_in_the_table():
    assert {f.name for f in fields(HfTrainingArguments) if f.init} == set(FLAGS)


def test_each_named_test_exists():
    for rule in FLAGS.values():
        if isinstance(rule, Honoured):
            file, _, name = rule.test.rpartition("::") if "/" in rule.test else (HERE, "", rule.test)
            file = file or rule.test
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert "::" not in rule.test or name in names, rule.test
            assert "/" in rule.test or name in names, rule.test


def test_the_page_is_the_table():
    """Made by ``python -m llava_moslora.training.flag_texts > docs/flags.md``."""
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == table()


def test_help_all_has_every_flag():
    text = more_help()
    shown = {flag.name for flag in trainer_flags.flags() if flag.group} | {"output_dir"}
    assert {name for name in FLAGS if not re.search(rf"^  --{name}\b", text, re.M)} == shown


# ---- reading the flags without importing transformers ----


def test_fields_are_read_as_they_are_imported():
    for f in fields(HfTrainingArguments):
        read = trainer_fields()[f.name]
        default = f.default_factory() if callable(f.default_factory) else f.default
        assert read.default is NOT_KNOWN or read.default == default, f.name
    computed = {name for name, flag in trainer_fields().items() if flag.default is NOT_KNOWN}
    assert computed == {"optim"}  # it depends on torch's version


WORDS = {"int": "3", "float": "0.5", "bool": "False", "list": "a b", "str": "text"}


@pytest.mark.parametrize("name", [name for name in FLAGS if name not in REFUSED])
def test_words_are_converted_as_by_transformers(name):
    flag = trainer_fields()[name]
    if flag.annotation == "dict[str, bool] | None":
        pytest.skip("transformers' parser cannot read it from a command line")
    kinds = [kind for kind in WORDS if flag.annotation.startswith((kind, f"None | {kind}"))]
    choices = ("error",) if name.startswith("log_level") else flag.choices or ()
    words = [*map(str, choices)] or WORDS[kinds[0] if kinds else "str"].split()
    own = ScriptParser("")
    flag.add_to(own)
    theirs = HfArgumentParser(HfTrainingArguments)
    word_lists = [words] if "list" in kinds else [[word] for word in words]
    for given in word_lists:
        argv = [f"--{name}", *given]
        expected = getattr(
            theirs.parse_known_args([*argv, "--output_dir", "x"] if name != "output_dir" else argv)[0], name
        )
        assert getattr(own.parse_args(argv), name) == expected


# ---- refused ----


def another(flag) -> object:
    """A value that is not the default."""
    if flag.choices:
        return next(choice for choice in flag.choices if choice != flag.default)
    kind = {"bool": not flag.default, "int": 7, "float": 0.5}
    first = flag.annotation.split(" ")[0]
    return kind.get(first, ["x"] if first.startswith("list") else "x")


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_without_effect_is_refused_by_name(name):
    flag = next(flag for flag in trainer_flags.flags() if flag.name == name)
    with pytest.raises(Refusal, match=rf"C-FLAG\] --{name}: .*; found .*; fix: ") as refused:
        check_flags({name: another(flag)})
    assert FLAGS[name].why in refused.value.line()
    check_flags({name: flag.default})


def test_a_flag_that_is_not_in_the_table_is_refused(monkeypatch):
    monkeypatch.setitem(FLAGS, "weight_decay", None)
    del FLAGS["weight_decay"]
    check_flags({"weight_decay": 0.0})
    with pytest.raises(Refusal, match=r"--weight_decay: this version of transformers has it, but its effect"):
        check_flags({"weight_decay": 0.1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run_name": "a"}, r"--run_name: no effect without --report_to; found a; expected --report_to wandb \| mlfl"),
        ({"run_name": "a", "report_to": ["tensorboard", "wandb"]}, None),
        ({"project": "a", "report_to": ["wandb"]}, "--project: no effect without --report_to"),
        ({"optim_args": "momentum=0.9"}, r"--optim_args: no effect without --optim; .*expected --optim sgd \|"),
        ({"optim_args": "momentum=0.9", "optim": "sgd"}, None),
        ({"liger_kernel_config": {"rms_norm": False}}, "no effect without --use_liger_kernel"),
        ({"ddp_bucket_cap_mb": 1, "deepspeed": "a.json"}, "--ddp_bucket_cap_mb: no effect with --deepspeed"),
        ({"ddp_bucket_cap_mb": 1, "deepspeed": None}, None),
    ],
)
def test_a_flag_that_needs_another(given, message):
    if message is None:
        check_flags(given)
    else:
        with pytest.raises(Refusal, match=message):
            check_flags(given)


@pytest.mark.parametrize("name", FORMER)
def test_former_names_are_answered_with_what_does_the_same(name, required):
    assert name not in FLAGS
    with pytest.raises(Refusal, match=rf"--{name}: unknown flag; fix: {FORMER[name][:12]}"):
        parse([*required, f"--{name}", "1"])


def test_local_rank_is_the_launchers(required, monkeypatch):
    """DeepSpeed's launcher passes it besides LOCAL_RANK."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    parse([*required, "--local_rank=0"])
    with pytest.raises(Refusal, match="--local_rank: the launcher sets it; found 1; expected 0"):
        parse([*required, "--local_rank=1"])


# ---- honoured: flags that only change TrainingArguments or the Trainer's construction ----


@pytest.fixture
def required(tmp_path) -> list[str]:
    words = "--model_name_or_path llm --vision_tower clip --data_path d.json --image_folder i --output_dir"
    return [*words.split(), str(tmp_path / "run")]


@pytest.fixture
def arguments(required):
    return lambda *words: TrainingArguments(**parse([*required, *words])[-1])


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_name(arguments, name, recwarn):
    assert arguments(f"--{name}").recompute == arguments(f"--{name}", "True").recompute == "full"
    assert arguments(f"--{name}", "False").recompute == "none"
    assert arguments(f"--{name}", "True", "--recompute", "selective").recompute == "selective"
    assert arguments(f"--{name}", "False", "--recompute", "auto").recompute == "auto"
    for way in ("none", "auto"):
        with pytest.raises(Refusal, match=f"two flags that disagree; found True and {way}; fix: omit one"):
            arguments(f"--{name}", "True", "--recompute", way)
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_tf32(arguments, monkeypatch):
    asked = []
    monkeypatch.setattr(transformers.training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(transformers.training_args, "enable_tf32", asked.append)
    arguments("--tf32", "True"), arguments("--tf32", "False")
    assert asked == [True, False]


def test_use_cpu(arguments):
    assert arguments("--use_cpu", "True").device.type == "cpu"


def test_ligers_settings(arguments):
    words = ["--use_liger_kernel", "True", "--liger_kernel_config", '{"rms_norm": false, "rope": true}']
    config = arguments(*words).liger_kernel_config
    assert config["rms_norm"] is False and config["rope"] is False  # the latter is this package's own


def test_log_levels(arguments, monkeypatch, trained):
    before = hf_logging.get_verbosity()
    try:
        trained(log_level="error", max_steps=1)
        assert hf_logging.get_verbosity() == logging.ERROR
    finally:
        hf_logging.set_verbosity(before)
    monkeypatch.setattr(HfTrainingArguments, "should_log", property(lambda self: False))  # another rank
    assert arguments("--log_level_replica", "error").get_process_log_level() == logging.ERROR


def test_names_for_trackers(arguments, monkeypatch):
    asked = {}
    space = SimpleNamespace(get=lambda: None)
    fake = SimpleNamespace(
        __version__="1000", config={}, context_vars=SimpleNamespace(current_space_id=space),
        init=lambda **given: asked.update(given), freeze=lambda **given: asked.update(frozen=given["new_space_id"]),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    names = {"run_name": "a", "project": "b", "trackio_space_id": "c", "trackio_bucket_id": "d"}
    words = [word for name, value in names.items() for word in (f"--{name}", value)]
    args = arguments(*words, "--trackio_static_space_id", "e", "--report_to", "trackio")
    callback = integration_utils.TrackioCallback()
    monkeypatch.setattr(callback, "_trackio", SimpleNamespace(**{**vars(fake), "config": _Config()}))
    callback.setup(args, SimpleNamespace(is_world_process_zero=True), SimpleNamespace())
    callback._freeze_space(args, None)
    assert asked.items() >= {"name": "a", "project": "b", "space_id": "c", "bucket_id": "d", "frozen": "e"}.items()


class _Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)


# ---- honoured: flags that change a run ----


@pytest.fixture
def trained(parts, tmp_path, monkeypatch):
    """``trained(**flags)``: the trainer of a finished tiny run; ``trainer.records`` are those of each micro-batch."""
    runs = []

    class Kept(script.MosLoraTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.records = []
            runs.append(self)

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            def noted():
                for batch in epoch_iterator:
                    self.records.append(batch["record"].tolist())
                    yield batch

            return super().get_batch_samples(noted(), num_batches, device)

    monkeypatch.setattr(script, "MosLoraTrainer", Kept)

    def run(**flags):
        train(parts, tmp_path / f"run{len(runs)}", health_steps=0, data_cache=tmp_path / "cache", **flags)
        return runs[-1]

    return run


def losses(trainer) -> list[float]:
    """Of the first two steps."""
    return [row["loss"] for row in rows(trainer.args.run_folder)[:2]]


def test_settings_of_a_step(trained, monkeypatch):
    cleared = []
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda: cleared.append(None))
    small = {"per_device_train_batch_size": 1, "save_strategy": "no", "data_order": "shuffle", "warmup_steps": 0}
    a = trained(seed=1, data_seed=2, torch_empty_cache_steps=2, max_steps=3, **small)
    assert len(cleared) == 2  # before steps 1 and 3
    assert a.state.global_step == 3 and [len(records) for records in a.records[:3]] == [1, 1, 1]
    b = trained(seed=3, data_seed=2, max_steps=2, **small)
    # The first loss is of the base model: every B is 0
    assert a.records[:2] == b.records[:2] and losses(a) != losses(b)
    c = trained(seed=1, data_seed=4, max_steps=1, **small)
    assert a.records[0] != c.records[0]


def test_epochs(trained):
    trainer = trained(max_steps=None, num_train_epochs=2, save_strategy="no")
    assert trainer.state.global_step == 2 * trainer.sampler.global_batches


def test_the_optimizers_settings(trained, monkeypatch):
    cut, clip = [], Accelerator.clip_grad_norm_

    def noted(self, parameters, max_norm, norm_type=2):
        cut.append(max_norm)
        return clip(self, parameters, max_norm, norm_type)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", noted)
    trainer = trained(
        learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, optim="adamw_torch",
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr": 1e-4}', warmup_steps=1,
        max_grad_norm=0.5, max_steps=4, save_strategy="no",
    )  # fmt: skip
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.8, 0.9, 1e-6)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    rates = [row["learning_rate"] for row in rows(trainer.args.run_folder)]
    assert rates[:2] == [0.0, pytest.approx(1e-3)]
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([1e-4] * len(optimizer.param_groups))
    assert cut == [0.5] * 4


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_schedule_is_restored_from_its_step_alone(name):
    needed = {"cosine_with_min_lr": {"min_lr": 0.1}, "cosine_warmup_with_min_lr": {"min_lr": 0.1},
              "warmup_stable_decay": {"num_decay_steps": 2}}.get(name)  # fmt: skip

    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return transformers.get_scheduler(name, optimizer, 2, 9, scheduler_specific_kwargs=needed)

    one, other = made(), made()
    for _ in range(5):
        one.optimizer.step()
        one.step()
    checkpoint_module.set_scheduler_step(other, 5)
    assert other.get_last_lr() == one.get_last_lr()


def test_arguments_of_an_optimizer(trained):
    trainer = trained(optim="sgd", optim_args="momentum=0.25", max_steps=1, save_strategy="no")
    assert trainer.optimizer.optimizer.defaults["momentum"] == 0.25


def test_which_optimizers_read_their_arguments():
    def settings(optim: str, optim_args: str | None) -> dict:
        args = HfTrainingArguments("x", optim=optim, optim_args=optim_args, use_cpu=True)
        return Trainer.get_optimizer_cls_and_kwargs(args)[1]

    names = [*PER_WEIGHT, *PER_PARAMETER]
    assert {n for n in names if settings(n, None) != settings(n, "momentum=0.5,beta1=0.1")} == set(WITH_ARGS)


def test_neftune_changes_the_embeddings(trained):
    same = {"max_steps": 1, "save_strategy": "no", "lora_dropout": 0, "vision_lora_dropout": 0}
    without, again, noisy = trained(**same), trained(**same), trained(neftune_noise_alpha=50, **same)
    assert losses(without) == losses(again) != losses(noisy)


def test_full_determinism(trained, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # it sets these for good
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "")
    try:
        trained(full_determinism=True, max_steps=1, save_strategy="no")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_progress_bar(trained, capsys):
    trained(max_steps=1, save_strategy="no")
    assert "1/1" in capsys.readouterr().err
    trained(max_steps=1, save_strategy="no", disable_tqdm=True)
    assert "1/1 [" not in "".join(line for line in capsys.readouterr().err.splitlines() if "step/s" in line)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"logging_steps": 2, "logging_first_step": True}, [1, 2, 4]),
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 0.4}, [2, 4]),
        ({"logging_strategy": "epoch", "max_steps": None, "num_train_epochs": 1}, [8]),
        ({"logging_strategy": "no"}, []),
    ],
    ids=str,
)
def test_what_is_logged(trained, flags, steps):
    trainer = trained(**{"max_steps": 5, "save_strategy": "no"} | flags)
    file = trainer.args.run_folder / "metrics.jsonl"
    assert [row["step"] for row in rows(trainer.args.run_folder)] == steps if file.exists() else not steps


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"save_steps": 2}, {2, 4, 5}),
        ({"save_steps": 0.4}, {2, 4, 5}),
        ({"save_steps": 2, "save_total_limit": 2}, {4, 5}),
        ({"save_strategy": "epoch", "max_steps": None, "num_train_epochs": 1}, {8}),
        ({"save_strategy": "no"}, set()),
    ],
    ids=str,
)
def test_what_is_saved(trained, flags, steps):
    trainer = trained(**{"max_steps": 5} | flags)
    assert {int(folder.name.split("-")[1]) for folder in trainer.args.run_folder.glob("checkpoint-*")} == steps


def test_the_data_loaders_settings(trained, monkeypatch):
    asked, loader = [], trainer_module.TrainDataLoader

    def noted(*args, **settings):
        asked.append(settings)
        return loader(*args, **settings)

    monkeypatch.setattr(trainer_module, "TrainDataLoader", noted)
    trainer = trained(
        dataloader_num_workers=2, dataloader_prefetch_factor=3, dataloader_persistent_workers=False, max_steps=1,
        save_strategy="no",
    )  # fmt: skip
    assert asked[0].items() >= {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": False}.items()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trainer_module, "TrainDataLoader", lambda *_, **settings: settings)
    for pinned in (True, False):
        trainer.args.dataloader_pin_memory = pinned
        assert trainer.get_train_dataloader()["pin_memory"] is pinned
    trainer.data_loader = None


def test_tokens_of_all_ranks(trained, monkeypatch):
    trainer, batches = trained(max_steps=1, save_strategy="no"), [{"label_positions": torch.zeros(3)}] * 2
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    monkeypatch.setattr(trainer_module.distributed, "all_reduce", lambda total: total.add_(100))
    assert trainer._get_num_items_in_batch(batches, "cpu") == 106
    trainer.args.average_tokens_across_devices = False
    assert trainer._get_num_items_in_batch(batches, "cpu") == 6


def test_ranks_without_deepspeed(trained):
    flags = {"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False}
    handler = trained(**flags, ddp_static_graph=True, max_steps=1, save_strategy="no").accelerator.ddp_handler
    assert (handler.find_unused_parameters, handler.bucket_cap_mb) == (False, 7)
    assert (handler.broadcast_buffers, handler.static_graph) == (False, True)


@pytest.mark.slow
def test_torch_compile(trained, monkeypatch):
    """Each of the three flags alone; the result is compared in ``test_trainer.py``."""
    asked = []
    compile_ = torch.compile

    def noted(model, *args, **settings):
        asked.append((settings.get("backend"), settings.get("mode")))
        return compile_(model, backend="eager")

    monkeypatch.setattr(torch, "compile", noted)
    for flags in ({"torch_compile": True}, {"torch_compile_backend": "aot_eager"},
                  {"torch_compile_mode": "max-autotune"}):  # fmt: skip
        trained(max_steps=1, save_strategy="no", **flags)
    assert asked == [("inductor", None), ("aot_eager", None), ("inductor", "max-autotune")]
