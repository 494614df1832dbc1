"""--output_dir: never a mixture of two runs, never a surprise about the disk; a run that began goes on where it was."""

import json
import os
import shutil
from collections import namedtuple

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.runs import publish
from llava_moslora.runs.record import RUN, fingerprint, read_run, write_run
from llava_moslora.training.run_folder import (
    check_output,
    check_shared,
    check_space,
    checkpoint_bytes,
    open_run,
    reopen_run,
)

FACTS = {"llm": {"config.json": "aa"}, "data": {"data.json": "bb"}}


def settings(**training) -> dict:
    return {
        "model": {"bits": 16},
        "data": {"data_path": "a.json", "data_cache": "here"},
        "adapter": {"lora_r": 4},
        "training": {"seed": 42, "learning_rate": 1e-3} | training,
        "global_batch_size": 4,
    }


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1 and 2, whose process has ended."""
    folder = tmp_path / "run"
    open_run(folder, overwrite=False).release()
    write_run(folder, settings())
    for step in (1, 2):
        save(folder, step)
    return folder


def save(folder, step, **facts):
    def write(staging):
        (staging / "w.bin").write_bytes(b"weights")

    publish.publish(folder / f"checkpoint-{step}", write, lambda: {"step": step, "seed": 42, **FACTS, **facts})


def reopen(run, now=None, facts=FACTS, allow=()):
    lock, checkpoint = reopen_run(run, now or settings(), facts, list(allow))
    lock.release()
    return checkpoint


def test_the_newest_checkpoint_is_chosen(run):
    assert reopen(run).name == "checkpoint-2"


def test_a_damaged_checkpoint_is_passed_over_and_named(run, capsys):
    (run / "checkpoint-2" / "w.bin").write_bytes(b"Weights")
    assert reopen(run).name == "checkpoint-1"
    said = capsys.readouterr().out
    assert said.startswith("passed over: error[K-HASH]") and "checkpoint-2/w.bin" in said
    assert (run / "checkpoint-2").is_dir()


def test_leftovers_and_decoys_do_not_hinder(run):
    (run / "checkpoint-999999").mkdir()
    (run / ".checkpoint-3.0badcafe.staging").mkdir()
    assert reopen(run).name == "checkpoint-2"
    assert not (run / ".checkpoint-3.0badcafe.staging").exists()


def test_nothing_in_it_uses_file_times(run):
    for name, time in (("checkpoint-1", 2e9), ("checkpoint-2", 0)):  # the clock jumped back in between
        os.utime(run / name, (time, time))
    assert reopen(run).name == "checkpoint-2"
    for step in (3, 4):
        save(run, step)
        os.utime(run / f"checkpoint-{step}", (0, 0))
    publish.prune(run, keep=2)
    assert [p.name for p in publish.checkpoints(run)] == ["checkpoint-4", "checkpoint-3"]


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
    "global batch": ({"now": settings() | {"global_batch_size": 8}}, "global_batch_size", "found global_batch_size 8"),
}


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
    now["data"]["data_cache"] = "there"
    assert reopen(run, now).name == "checkpoint-2"


def test_no_run_to_resume(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(Refusal, match="not a run: nothing to resume"):
        reopen(tmp_path)


def test_a_damaged_record_of_the_run_is_named(run):
    (run / RUN).write_text('{"settings": ')
    with pytest.raises(Refusal, match=rf"K-RUN.*{RUN}: not JSON: damaged"):
        read_run(run)


def test_the_record_is_replaced_at_once(run, monkeypatch):
    """A kill while it is written leaves the old one."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_run(run, {"settings": "new"})
    assert read_run(run)["settings"] == settings()


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


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match=r"C-OUTPUT.*not a folder"):
        open_run(tmp_path / "file", overwrite=False)
    with pytest.raises(Refusal, match=r"C-OUTPUT.*cannot be written to"):
        open_run(tmp_path / "file" / "run", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Refusal, match=r"C-OUTPUT.*cannot be written to"):
        check_output(tmp_path / "run", resume=False, overwrite=False)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("flags", [{"resume": False, "overwrite": True}, {"resume": True, "overwrite": False}])
def test_what_is_no_run_is_never_deleted(tmp_path, flags):
    """Such as the folder of the pictures, given by mistake."""
    (tmp_path / "picture.jpg").touch()
    (tmp_path / "more").mkdir()
    with pytest.raises(Refusal, match=r"--output_dir: not a run: .*found more, picture.jpg; expected run.json in it"):
        check_output(tmp_path, **flags)
    with pytest.raises(Refusal, match="not a run"):
        open_run(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"picture.jpg", "more"}


def test_a_run_is_deleted_where_it_is_asked_for(tmp_path):
    for name in ("run.json", "metrics.jsonl", "checkpoint-2/MANIFEST.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(Refusal, match=r"the folder is not empty.*--resume True to go on.*--overwrite True to delete"):
        check_output(tmp_path, resume=False, overwrite=False)
    open_run(tmp_path, overwrite=True).release()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_one_process_sees_its_own_folder(tmp_path):
    check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sees_another_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "from_all_ranks", lambda value: [value, False])
    with pytest.raises(Refusal, match=r"C-SHARED.*not every process sees this folder; found nothing on ranks 1"):
        check_shared(tmp_path, patience=0)


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
