"""--output_dir: never a mixture of two runs, never a surprise about the disk; a run that began goes on where it was."""

import json
import os
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import fields, replace

import pytest

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings, TrainingSettings
from llava_moslora.errors import Refusal, defect
from llava_moslora.files import disk
from llava_moslora.inference.load import newest_checkpoint
from llava_moslora.runs.checkpoints import checkpoints, lock_run, prune, publish_checkpoint
from llava_moslora.runs.fingerprint import fingerprint
from llava_moslora.runs.record import RUN, RunSettings, read_run, write_run
from llava_moslora.training.output_dir import check_output, has_begun
from llava_moslora.training.run_folder import (
    begin_run,
    check_shared,
    check_space,
    checkpoint_bytes,
    only_differing,
    open_run,
)

FILE = "optimizer.safetensors"
FACTS = {"llm": {"config.json": "aa"}, "data": {"data.json": "bb"}}


def settings(**training) -> RunSettings:
    return RunSettings(
        ModelSettings("llm", "clip", version="chatml"),
        DataSettings(["a.json"], data_cache="here"),
        AdapterSettings(lora_r=4, vision_lora_r=2),
        {"seed": 42, "learning_rate": 1e-3} | training,
        global_batch_size=4,
    )


def check(run, inputs=(), data_cache=None, **flags) -> None:
    data = None if data_cache is None else DataSettings(["a.json"], data_cache=str(data_cache))
    check_output(TrainingSettings(output_dir=str(run), **flags), inputs, data)


def open_new(run, **flags):
    """The lock of a folder that a new run is to begin in."""
    lock, checkpoint = open_run(TrainingSettings(output_dir=str(run), **flags), settings(), FACTS)
    assert checkpoint is None
    return lock


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1 and 2, whose process has ended."""
    folder = tmp_path / "run"
    open_new(folder).release()
    write_run(folder, settings())
    for step in (1, 2):
        save(folder, step)
    return folder


def save(folder, step, **facts):
    def write(staging):
        (staging / FILE).write_bytes(b"weights")

    publish_checkpoint(folder / f"checkpoint-{step}", write, lambda: {"step": step, "seed": 42, **FACTS, **facts})


def reopen(run, now=None, facts=FACTS, allow=()):
    training = TrainingSettings(output_dir=str(run), resume=True, allow_change=list(allow))
    lock, checkpoint = open_run(training, now or settings(), facts)
    lock.release()
    return checkpoint


def test_the_newest_checkpoint_is_chosen(run):
    assert reopen(run).name == "checkpoint-2"


def test_a_damaged_checkpoint_is_skipped_and_named(run, capsys):
    (run / "checkpoint-2" / FILE).write_bytes(b"Weights")
    assert reopen(run).name == "checkpoint-1"
    said = capsys.readouterr().out
    assert said.startswith("skipped: error[K-HASH]") and f"checkpoint-2/{FILE}" in said
    assert (run / "checkpoint-2").is_dir()


def content(run):
    """Everything but the lock."""
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in (".lock", ".locked_by")}


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


def test_what_may_change_does(run):
    now = settings(save_steps=7, logging_steps=5)
    now.data.data_cache = "there"
    now.model = replace(now.model, model_name_or_path="moved/llm", vision_tower="moved/clip")
    assert reopen(run, now).name == "checkpoint-2"


# setting → what runs did that were begun before there was one
BEFORE = {
    "model.attn_implementation": ("sdpa", "eager"),
    "data.data_group": (50, 100),
    "data.image_engine": ("pil", "torch"),
    "data.data_weights": ([], [1.0]),
    "training.dropout_masks": ("cpu generator", "philox"),
    "training.loss_average": ("tokens", "micro_batch"),
    "training.packing": (False, True),
}


def with_value(settings: RunSettings, key: str, value: object) -> RunSettings:
    group, _, name = key.partition(".")
    group = getattr(settings, group)
    group.update({name: value}) if isinstance(group, dict) else setattr(group, name, value)
    return settings


@pytest.mark.parametrize("key", BEFORE)
def test_a_run_from_before_a_flag_is_resumed_with_what_it_did(run, key):
    """And read back so."""
    did, other = BEFORE[key]
    group, _, name = key.partition(".")
    edit_record(run, lambda record: record["settings"][group].pop(name, None))
    if group != "training":
        assert getattr(getattr(read_run(run), group), name) == did
    assert reopen(run, with_value(settings(), key, did)).name == "checkpoint-2"
    with pytest.raises(Refusal, match=re.escape(f"found {name} {other}; expected {name} {did}")):
        reopen(run, with_value(settings(), key, other))


def edit_record(run, edit) -> None:
    record = json.loads((run / RUN).read_text())
    edit(record)
    (run / RUN).write_text(json.dumps(record))


def test_one_data_file_as_the_first_versions_recorded_it(run):
    edit_record(run, lambda record: record["settings"]["data"].update(data_path="a.json"))
    assert read_run(run).data.data_path == ["a.json"] and reopen(run).name == "checkpoint-2"


def test_a_setting_of_a_later_version_is_not_ignored(run):
    edit_record(run, lambda record: record["settings"]["adapter"].update(mixer_blocks=4, mixer_note=None))
    assert read_run(run).unknown == {"mixer_blocks": 4, "mixer_note": None}  # exports and answers do without
    with pytest.raises(Refusal, match=r"K-CHANGED.*found mixer_blocks None; expected mixer_blocks 4"):
        reopen(run)


def test_a_value_of_a_later_version_is_refused(run):
    edit_record(run, lambda record: record["settings"]["model"].update(bits=8))
    with pytest.raises(Refusal, match=r"K-RUN.*run.json:--bits: .*found 8; expected 16 \| 4"):
        read_run(run)


def test_what_is_written_is_read_back(run):
    written = settings(bf16=True)
    written.preprocessor = {"size": {"shortest_edge": 32}, "image_mean": [0.5, 0.5, 0.5]}
    write_run(run, written)
    record = read_run(run)
    assert {f.name: getattr(record, f.name) for f in fields(written)} == vars(written)
    assert (record.seeds, record.command, record.unknown) == ([42], sys.argv, {})


@pytest.mark.parametrize("name", ["checkpoint-2", "tokenizer", "metrics.jsonl", "MANIFEST.json", "export.json"])
def test_no_run_to_resume(tmp_path, name):
    """What is left of a run, a checkpoint, an export."""
    (tmp_path / name).mkdir()
    with pytest.raises(Refusal, match=f"not a run: nothing to resume; found {name}; expected run.json in it"):
        reopen(tmp_path)


LOGS = ["slurm-123.out", "train.err", "log", "job.o4711", "logs/rank0.log"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_jobs_log_does_not_hinder_a_start(tmp_path, flags):
    for name in LOGS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check(tmp_path, **flags)
    if flags.get("resume"):
        assert reopen(tmp_path) is None
    else:
        open_new(tmp_path, **flags).release()
    assert all((tmp_path / name).is_file() for name in LOGS)


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


def test_resume_begins_beside_files_that_are_no_runs(tmp_path):
    """The recipes always pass it."""
    (tmp_path / "recipe.yaml").touch()
    assert reopen(tmp_path) is None
    with pytest.raises(Refusal, match=r"the folder is not empty; found recipe.yaml; fix: choose another folder"):
        check(tmp_path)


def test_a_data_cache_in_the_run_folder_is_refused(tmp_path):
    for cache in (tmp_path / "run" / "cache", tmp_path / "run", tmp_path / "x" / ".." / "run" / "cache"):
        with pytest.raises(Refusal, match=r"--data_cache: the data cache lies in the run folder"):
            check(tmp_path / "run", resume=True, data_cache=cache)
    check(tmp_path / "run", resume=True, data_cache=tmp_path / "runcache")


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


def begin(run, fail=False, **training):
    """As the script does it."""

    def report(folder):
        folder.mkdir()
        (folder / "report.html").write_text("new")

    def record(run):
        write_run(run, settings(**training))
        (run / "tokenizer").mkdir()
        if fail:
            raise OSError("disk full")

    run.mkdir(exist_ok=True)
    begin_run(run, record, report)


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
    monkeypatch.setattr("llava_moslora.training.run_folder._put_back", kill)  # nobody tidies up after a kill
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


INPUTS = ["llm", "checkpoint-2/projector", "sub/data.json", "mix/*.tar", "."]


@pytest.mark.parametrize("place", INPUTS)
def test_an_input_inside_the_run_is_not_deleted(run, place):
    inputs = [("--model_name_or_path", run.parent), ("--data_path", run / place)]
    with pytest.raises(Refusal, match=r"--data_path: an input lies in the run folder that is to be replaced"):
        check(run, overwrite=True, inputs=inputs)
    check(run, resume=True, inputs=inputs)  # nothing is deleted


def test_an_input_reached_by_a_link_is_not_deleted(run):
    (run.parent / "link").symlink_to(run)
    with pytest.raises(Refusal, match=r"--image_folder: an input lies in"):
        check(run, overwrite=True, inputs=[("--image_folder", run.parent / "link" / "images")])


# C12: an output folder that is not empty
@pytest.mark.parametrize(
    "file", ["checkpoint-2/notes.md", "tokenizer/mine.txt", "data/train.json", "tensorboard/a.png"]
)
def test_a_file_among_a_runs_own_is_named_and_kept(run, file):
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).touch()
    with pytest.raises(
        Refusal, match=f"files that no run writes lie among those to be deleted; found {file}; fix: move"
    ):
        open_new(run, overwrite=True)
    assert (run / file).is_file()


RECORDS = {
    "not a dict": lambda record: [],
    "another tool's": lambda record: {"project": "my other tool"},
    "no settings": lambda record: {k: v for k, v in record.items() if k != "settings"},
}
KEYS = ["settings.model", "settings.training", "settings.model.bits", "settings.data.image_aspect_ratio", "versions"]


@pytest.mark.parametrize("case", RECORDS)
def test_another_tools_record_is_no_run(run, case):
    (run / RUN).write_text(json.dumps(RECORDS[case](json.loads((run / RUN).read_text()))))
    with pytest.raises(Refusal, match=r"K-RUN.*run.json: not the record of a run of this package"):
        read_run(run)
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(Refusal, match=r"C-OUTPUT.*run.json is not the record of a run of this package"):
            check(run, **flags)


@pytest.mark.parametrize("value", ["missing", 5.5])
@pytest.mark.parametrize("key", KEYS)
def test_a_record_of_another_version_is_refused(run, key, value):
    record = json.loads((run / RUN).read_text()) | {"llava_moslora": "7.0"}
    *groups, name = key.split(".")
    group = record
    for part in groups:
        group = group[part]
    if value == "missing":
        del group[name]
    else:
        group[name] = value
    (run / RUN).write_text(json.dumps(record))
    found = "nothing" if value == "missing" else "5.5"
    with pytest.raises(
        Refusal, match=rf"K-RUN.*run.json:{key}: .*found {found}, written by version 7.0; expected (dict|int|str), as"
    ) as raised:
        reopen(run)
    assert raised.value.exit_status == 3


def test_a_damaged_record_of_the_run_is_named(run):
    (run / RUN).write_text('{"settings": ')
    with pytest.raises(Refusal, match=rf"K-RUN.*{RUN}: not JSON: damaged"):
        read_run(run)


def test_the_record_is_replaced_at_once(run, monkeypatch):
    """A kill while it is written leaves the old one."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_run(run, settings(learning_rate=1.0))
    assert read_run(run).training == settings().training


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


# C13: an output folder that cannot be written
def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match=r"C-OUTPUT.*not a folder"):
        open_new(tmp_path / "file")
    with pytest.raises(Refusal, match=r"C-OUTPUT.*cannot be written to"):
        open_new(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Refusal, match=r"C-OUTPUT.*cannot be written to"):
        check(tmp_path / "run")
    tmp_path.chmod(0o700)


# C12: an output folder that is not empty
def test_what_is_no_run_is_never_deleted(tmp_path):
    """Such as the folder of the images, given by mistake."""
    (tmp_path / "image.jpg").touch()
    (tmp_path / "more").mkdir()
    with pytest.raises(Refusal, match=r"--output_dir: not a run: .*found image.jpg, more; expected run.json in it"):
        check(tmp_path, overwrite=True)
    with pytest.raises(Refusal, match="not a run"):
        open_new(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"image.jpg", "more"}


# C12: an output folder that is not empty
def test_a_run_is_deleted_where_it_is_asked_for(run):
    with pytest.raises(Refusal, match=r"the folder is not empty.*--resume True to go on.*--overwrite True to delete"):
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
    monkeypatch.setattr("llava_moslora.training.run_folder.from_all_ranks", lambda value: [value, False])
    with pytest.raises(Refusal, match=r"C-SHARED.*not every process sees this folder; found nothing on ranks 1"):
        check_shared(tmp_path, patience=0)


# K7: an adapter of another base
def test_models_of_one_shape_have_different_fingerprints(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(300_000))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "other")
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.seek(150_000)
        file.write(b"another")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")
    assert json.dumps(fingerprint(tmp_path / "one"))


@pytest.mark.parametrize("place", ["user@host/llm", "plain/llm", "open_clip@home/llm"])
def test_a_fingerprint_does_not_depend_on_the_path(tmp_path, place):
    """Homes below a path with @ are usual where accounts are user@domain."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    hashes = fingerprint(folder)
    assert list(hashes) == ["model.safetensors"]
    folder.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == hashes
    assert fingerprint(f"open_clip:{tmp_path / 'moved'}") == hashes
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"Weights")
    assert fingerprint(tmp_path / "moved") != hashes


def test_an_open_clip_tower_is_its_file(tmp_path):
    (tmp_path / "user@host").mkdir()
    file = tmp_path / "user@host" / "vit.safetensors"
    file.write_bytes(b"weights")
    hashes = fingerprint(f"open_clip:ViT-B-32@{file}")
    assert list(hashes) == ["vit.safetensors"] and hashes == fingerprint(file)
    assert fingerprint("open_clip:ViT-B-32@openai") == {"name": "open_clip:ViT-B-32@openai"}


def test_a_record_without_a_batch_size_is_another(run):
    edit_record(run, lambda record: record["settings"].pop("global_batch_size"))
    with pytest.raises(Refusal, match=r"K-CHANGED.*found global_batch_size 4; expected global_batch_size None"):
        reopen(run)


def test_of_a_changed_folder_only_the_changed_files_are_told():
    then = {"config.json": "1", "model.safetensors": "2", "old.json": "3"}
    now = {"config.json": "1", "model.safetensors": "4"}
    assert only_differing(then, now) == (
        {"model.safetensors": "2", "old.json": "3"},
        {"model.safetensors": "4", "old.json": "missing"},
    )
    assert only_differing(2, 3) == (2, 3) and only_differing(None, now) == (None, now)
