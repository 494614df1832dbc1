"""--output_dir: never a mixture of two runs, never a surprise about the disk; an old run is resumed where it was."""

import os
import shutil
import sys
from collections import namedtuple
from dataclasses import replace

import pytest

from llava_moslora.config import LOSS_AVERAGES, AdapterSettings
from llava_moslora.errors import Refusal, defect
from llava_moslora.files import disk
from llava_moslora.runs.checkpoints import checkpoints, lock_run, model_checkpoint, newest_checkpoint, prune
from llava_moslora.runs.folder import (
    TRAINING,
    changes,
    check_shared,
    check_space,
    checkpoint_bytes,
    only_differing,
)
from llava_moslora.runs.output_dir import has_begun
from llava_moslora.runs.record import BEFORE, RUN, SDXL, RunRecord, read_run, write_run
from llava_moslora.sdxl_settings import SdxlAdapterSettings, SdxlSettings, SubjectSettings
from support.run_folders import FACTS, FILE, begin, check, content, edit_record, open_new, reopen, save, settings


def test_the_newest_checkpoint_is_chosen(run):
    assert reopen(run).name == "checkpoint-2"


def test_a_damaged_checkpoint_is_skipped_and_named(run, capsys):
    (run / "checkpoint-2" / FILE).write_bytes(b"Weights")
    assert reopen(run).name == "checkpoint-1"
    said = capsys.readouterr().out
    assert said.startswith("skipped: error[K-HASH]") and f"checkpoint-2/{FILE}" in said
    assert (run / "checkpoint-2").is_dir()


DAMAGES = {
    "a byte": lambda folder: (folder / FILE).write_bytes(b"Weights"),
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "a newer version's": lambda folder: (folder / "MANIFEST.json").write_text('{"schema": 3, "files": {}}'),
    "emptied": lambda folder: [path.unlink() for path in folder.iterdir()],
}


# K3: a flipped bit
@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_valid_checkpoint_nothing_is_resumed_and_nothing_touched(run, damage):
    """To begin at step 1 would write over the metrics and, one by one, over the checkpoints."""
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for step in (1, 2):
        DAMAGES[damage](run / f"checkpoint-{step}")
    before = content(run)
    with pytest.raises(Refusal, match=r"no checkpoint of this run is valid.*found error\[K-.*; error\[K-.*") as refusal:
        reopen(run)
    assert refusal.value.code == "K-NONE" and refusal.value.exit_status == 3
    assert content(run) == before
    lock_run(run, patience=0).release()


# K6: decoys, and what a kill left
def test_a_checkpoint_under_another_step_is_refused(run):
    (run / "checkpoint-2").rename(run / "checkpoint-6")
    for opens in (reopen, newest_checkpoint):  # a resume; an export, a chat
        with pytest.raises(Refusal, match=r"K-STEP.*found step 2.*expected step 6"):
            opens(run)


# K6: decoys, and what a kill left
def test_a_checkpoint_of_another_seed_is_refused(run):
    save(run, 3, seed=7)
    for opens in (reopen, newest_checkpoint):
        with pytest.raises(Refusal, match=r"K-SEED.*checkpoint-3: .*found seed 7; expected seed 42"):
            opens(run)


def test_a_seed_that_was_allowed_to_change_is_the_runs_own(run):
    changed = settings(seed=7)
    assert reopen(run, changed, allow=["seed"]).name == "checkpoint-2"
    write_run(run, changed)  # and killed before its next checkpoint
    assert reopen(run, changed).name == "checkpoint-2"
    save(run, 3, seed=7)
    assert reopen(run, changed).name == "checkpoint-3"


# K6: decoys, and what a kill left
def test_the_best_checkpoint_is_the_model_of_a_run_that_asks_for_it(run):
    """Once one is known; of a run of an older version the newest is."""
    assert model_checkpoint(run).name == newest_checkpoint(run).name == "checkpoint-2"
    with pytest.raises(Refusal, match=r"C-FLAG.*--checkpoint: no checkpoint of this run was evaluated; found best"):
        model_checkpoint(run, "best")
    edit_record(run, lambda record: record["settings"]["training"].update(load_best_model_at_end=True))
    assert model_checkpoint(run).name == "checkpoint-2"
    save(run, 4, best={"step": 2, "metric": "eval_loss", "value": 1.5})
    assert model_checkpoint(run).name == model_checkpoint(run, "best").name == "checkpoint-2"
    assert model_checkpoint(run, "newest").name == model_checkpoint(run, "checkpoint-4").name == "checkpoint-4"
    with pytest.raises(Refusal, match=r"C-FLAG.*no such checkpoint; found checkpoint-3; expected checkpoint-4 checkp"):
        model_checkpoint(run, "3")
    (run / "checkpoint-2" / FILE).write_bytes(b"x")
    with pytest.raises(Refusal, match=r"K-SIZE.*checkpoint-2"):
        model_checkpoint(run)
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(Refusal, match=r"K-NONE.*found checkpoint-2; .*fix: one of these, or newest"):
        model_checkpoint(run)


def test_leftovers_and_decoys_do_not_hinder(run):
    (run / "checkpoint-999999").mkdir()
    (run / ".checkpoint-3.0badcafe.staging").mkdir()
    assert reopen(run).name == "checkpoint-2"
    assert not (run / ".checkpoint-3.0badcafe.staging").exists()


# R9: clocks that jump
def test_nothing_in_it_uses_file_times(run):
    for name, time in (("checkpoint-1", 2e9), ("checkpoint-2", 0)):  # the clock jumped back in between
        os.utime(run / name, (time, time))
    assert reopen(run).name == "checkpoint-2"
    for step in (3, 4):
        save(run, step)
        os.utime(run / f"checkpoint-{step}", (0, 0))
    prune(run, keep=2)
    assert [p.name for p in checkpoints(run)] == ["checkpoint-4", "checkpoint-3"]


@pytest.mark.parametrize("folder", ["missing", "empty", "killed before run.json"])
def test_a_run_that_had_not_begun_begins(tmp_path, folder):
    run = tmp_path / "run"
    if folder != "missing":
        run.mkdir()
    if folder == "killed before run.json":
        (run / ".lock").touch()
        (run / f".{RUN}.unfinished").write_text('{"half')
    assert reopen(run) is None


CHANGED = {
    "setting": ({"now": settings(learning_rate=1.0)}, "learning_rate", "found learning_rate 1.0; expected .* 0.001"),
    "seed": ({"now": settings(seed=1)}, "seed", "found seed 1; expected seed 42"),
    "other base": ({"facts": FACTS | {"llm": {"config.json": "cc"}}}, "llm", "'cc'.*expected llm .*'aa'"),
    "global batch": (
        {"now": replace(settings(), global_batch_size=8)},
        "global_batch_size",
        "found global_batch_size 8",
    ),
    "tokens of each rank": (
        {"now": settings(average_tokens_across_devices=False)},  # the record is older than the setting
        "average_tokens_across_devices",
        "found average_tokens_across_devices False; expected average_tokens_across_devices True",
    ),
}


# K10: resumed with another configuration
@pytest.mark.parametrize("case", CHANGED)
def test_what_changed_is_refused_unless_allowed(run, case):
    changes, name, message = CHANGED[case]
    with pytest.raises(Refusal, match=message) as refusal:
        reopen(run, **changes)
    assert refusal.value.code == "K-CHANGED" and refusal.value.exit_status == 3
    assert f"--allow_change {name}" in str(refusal.value)
    assert reopen(run, **changes, allow=[name]).name == "checkpoint-2"


@pytest.mark.parametrize("average", LOSS_AVERAGES)
def test_the_micro_batch_counts_where_the_loss_is_its_mean(tmp_path, average):
    """At one global batch: an average over all tokens does not depend on how the batch is split."""
    run = tmp_path / "run"
    begin(run, loss_average=average, per_device_train_batch_size=2)
    save(run, 2)
    now = settings(loss_average=average, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    if average == "tokens":
        assert reopen(run, now).name == "checkpoint-2"
        return
    with pytest.raises(Refusal, match=r"K-CHANGED.*found per_device_train_batch_size 1; expected per_dev\w+ 2; fix"):
        reopen(run, now)
    assert reopen(run, now, allow=["per_device_train_batch_size"]).name == "checkpoint-2"


def test_pictures_of_one_size_may_be_split_otherwise(tmp_path):
    """The loss of SDXL is a mean over pictures, whose micro-batches are all of one size."""
    groups = SdxlSettings("sdxl"), SubjectSettings("pictures", "a cat"), SdxlAdapterSettings()
    then, now = (
        RunRecord(*groups, {"loss_average": "micro_batch", "per_device_train_batch_size": n}, {}, 4, kind=SDXL)
        for n in (2, 1)
    )
    assert changes(then, now) == {}


MASKS = "dropout_masks"


@pytest.mark.parametrize(
    ("adapter", "compared"),
    [
        ({}, True),
        ({"lora_dropout": 0.0}, True),  # the tower's are drawn
        ({"lora_dropout": 0.0, "vision_lora_dropout": 0.0}, False),
        ({"lora_dropout": 0.0, "vision_lora_r": 0}, False),
        ({"tune_mm_mlp_adapter": True}, False),
    ],
)
def test_masks_that_nobody_draws_may_be_others(adapter, compared):
    """Such a run of a version with other masks is resumed as it is."""
    now = settings()
    now.adapter = AdapterSettings(**adapter)
    then, now = (RunRecord(**vars(now) | {"training": now.training | {MASKS: name}}) for name in ("a", "b"))
    assert changes(then, now) == ({MASKS: ("a", "b")} if compared else {})


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_masks_of_pictures_that_nobody_draws_may_be_others(dropout):
    groups = SdxlSettings("sdxl"), SubjectSettings("pictures", "a cat"), SdxlAdapterSettings(lora_dropout=dropout)
    then, now = (RunRecord(*groups, {MASKS: name}, {}, 4, kind=SDXL) for name in ("a", "b"))
    assert changes(then, now) == ({MASKS: ("a", "b")} if dropout else {})


def test_what_may_change_does(run):
    now = settings(save_steps=7, logging_steps=5)
    now.data.data_cache = "there"
    now.model = replace(now.model, model_name_or_path="moved/llm", vision_tower="moved/clip")
    assert reopen(run, now).name == "checkpoint-2"


# setting → what runs did that were begun before there was one


def test_the_report_of_a_defect_does_not_hinder_a_run(run, tmp_path, monkeypatch):
    new = tmp_path / "new"
    new.mkdir()
    for folder in (run, new):
        monkeypatch.setattr(sys, "argv", ["train_vit_llm.py", "--output_dir", str(folder)])
        defect(KeyError("exp_avg"))
    assert reopen(run).name == "checkpoint-2"
    open_new(new).release()
    open_new(run, overwrite=True).release()
    begin(run)
    assert all(len(list(folder.glob(".defect-*.txt"))) == 1 for folder in (run, new))


def test_a_run_that_never_took_a_step_can_be_begun_again(tmp_path):
    """Such as one that ran out of memory at once: its corrected settings are not compared."""
    run = tmp_path / "run"
    begin(run)
    (run / "metrics.jsonl").write_text('{"unfinished')
    check(run)
    open_new(run).release()
    assert reopen(run, settings(learning_rate=1.0)) is None
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert has_begun(run)
    with pytest.raises(Refusal, match="the folder is not empty"):
        check(run)
    with pytest.raises(Refusal, match="K-CHANGED"):
        reopen(run, settings(learning_rate=1.0))


def test_a_run_is_replaced_at_the_end(run):
    (run / "tokenizer").mkdir()
    (run / "notes.md").write_text("mine")
    (run / "eval").mkdir()
    (run / "eval" / "results.csv").write_text("mine")
    check(run, overwrite=True)
    begin(run, learning_rate=1.0)
    names = {path.name for path in run.iterdir()} - {".lock", ".locked_by"}
    assert names == {"run.json", "tokenizer", "data", "notes.md", "eval"}
    assert (run / "eval" / "results.csv").read_text() == "mine" == (run / "notes.md").read_text()
    assert read_run(run).training["learning_rate"] == 1.0


def test_a_run_that_cannot_be_replaced_is_put_back(run):
    before = content(run)
    with pytest.raises(OSError, match="disk full"):
        begin(run, fail=True, learning_rate=1.0)
    assert content(run) == before


@pytest.mark.parametrize("when", ["while it is set aside", "while the new one is written"])
def test_a_kill_while_a_run_is_replaced_loses_nothing(run, monkeypatch, when):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    before = content(run)
    rename, calls = os.rename, []
    monkeypatch.setattr("llava_moslora.runs.folder._put_back", kill)  # nobody tidies up after a kill
    if when == "while it is set aside":
        monkeypatch.setattr(
            os, "rename", lambda *paths: rename(*paths) if not calls.append(1) and len(calls) < 3 else kill()
        )
    else:
        monkeypatch.setattr(disk, "delete", kill)
    with pytest.raises((Killed, OSError)):
        begin(run, fail=True, learning_rate=1.0)
    monkeypatch.undo()
    assert content(run) != before
    open_new(run, overwrite=True).release()
    assert content(run) == before


# C14: a disk that is too small
@pytest.mark.parametrize(("checkpoints", "free"), [(2, 2), (1, 1)])
def test_too_little_disk_is_refused_before_the_start(tmp_path, monkeypatch, checkpoints, free):
    usage = namedtuple("usage", "total used free")
    enough = free * checkpoint_bytes(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, enough))
    check_space(tmp_path / "new" / "run", 1000, checkpoints)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, enough - 1))
    with pytest.raises(Refusal, match=rf"found {enough - 1:,} bytes free; expected {enough:,} bytes") as refusal:
        check_space(tmp_path / "new" / "run", 1000, checkpoints)
    assert refusal.value.code == "E-DISK" and refusal.value.exit_status == 4
    assert not (tmp_path / "new").exists()


# C12: an output folder that is not empty
def test_a_run_is_deleted_where_it_is_asked_for(run):
    with pytest.raises(
        Refusal, match=r"the folder is not empty.*--resume True to continue.*--overwrite True to delete"
    ):
        check(run)
    before = content(run)
    open_new(run, overwrite=True).release()
    assert content(run) == before  # not yet
    begin(run)
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {"run.json", "tokenizer", "data"}
    assert not list(run.glob(".*.trash"))


def test_one_process_sees_its_own_folder(tmp_path):
    check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sees_another_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_moslora.runs.folder.from_all_ranks", lambda value: [value, False])
    with pytest.raises(Refusal, match=r"C-SHARED.*not every process sees this folder; found nothing on ranks 1"):
        check_shared(tmp_path, patience=0)


def test_of_a_changed_folder_only_the_changed_files_are_told():
    then = {"config.json": "1", "model.safetensors": "2", "old.json": "3"}
    now = {"config.json": "1", "model.safetensors": "4"}
    assert only_differing(then, now) == (
        {"model.safetensors": "2", "old.json": "3"},
        {"model.safetensors": "4", "old.json": "missing"},
    )
    assert only_differing(2, 3) == (2, 3) and only_differing(None, now) == (None, now)


def test_every_setting_that_later_versions_added_is_compared_on_resume():
    """What run.json lacks is taken from ``BEFORE``: it must not be possible to change it and say nothing."""
    free = {"load_best_model_at_end"}  # which checkpoint is exported
    assert set(BEFORE["training"]) - set(TRAINING) == free
