"""What may lie in --output_dir, and what is never deleted there."""

import errno
import os

import pytest

from llava_moslora.errors import Refusal, known_failure
from support.run_folders import check, open_new, reopen


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


def test_resume_begins_beside_files_that_are_no_runs(tmp_path):
    """The recipes always pass it."""
    (tmp_path / "recipe.yaml").touch()
    assert reopen(tmp_path) is None
    with pytest.raises(Refusal, match=r"the folder is not empty; found recipe.yaml; fix: choose another folder"):
        check(tmp_path)


def test_a_data_cache_in_the_run_folder_is_refused(tmp_path):
    for cache in (tmp_path / "run" / "cache", tmp_path / "run", tmp_path / "x" / ".." / "run" / "cache"):
        with pytest.raises(Refusal, match=r"--data_cache: the data cache is in the run folder"):
            check(tmp_path / "run", resume=True, data_cache=cache)
    check(tmp_path / "run", resume=True, data_cache=tmp_path / "runcache")


INPUTS = ["llm", "checkpoint-2/projector", "sub/data.json", "mix/*.tar", "."]


@pytest.mark.parametrize("place", INPUTS)
def test_an_input_inside_the_run_is_not_deleted(run, place):
    inputs = [("--model_name_or_path", run.parent), ("--data_path", run / place)]
    with pytest.raises(Refusal, match=r"--data_path: an input is in the run folder that is to be replaced"):
        check(run, overwrite=True, inputs=inputs)
    check(run, resume=True, inputs=inputs)  # nothing is deleted


def test_an_input_reached_by_a_link_is_not_deleted(run):
    (run.parent / "link").symlink_to(run)
    with pytest.raises(Refusal, match=r"--image_folder: an input is in"):
        check(run, overwrite=True, inputs=[("--image_folder", run.parent / "link" / "images")])


# C12: an output folder that is not empty
@pytest.mark.parametrize(
    "file", ["checkpoint-2/notes.md", "tokenizer/mine.txt", "data/train.json", "tensorboard/a.png"]
)
def test_a_file_among_a_runs_own_is_named_and_kept(run, file):
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).touch()
    with pytest.raises(
        Refusal, match=f"the run to be deleted contains files that no run writes; found {file}; fix: move"
    ):
        open_new(run, overwrite=True)
    assert (run / file).is_file()


# C13: an output folder that cannot be written
def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match=r"C-OUTPUT.*not a folder"):
        open_new(tmp_path / "file")
    with pytest.raises(Refusal, match=r"C-OUTPUT.*cannot be written to; found Not a directory"):
        open_new(tmp_path / "file" / "run")


# C13: an output folder that cannot be written
@pytest.mark.parametrize("name", ["dangling", "dangling/run", "dangling/a/run", "deep/link/../../dangling/run"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, name):
    """The disk behind it is not mounted: its content would be written to another one."""
    (tmp_path / "deep" / "link").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("/nowhere/disk")
    before = sorted(tmp_path.rglob("*"))
    message = r"C-OUTPUT\] .*dangling:--output_dir: a link to a place that is not there; found /nowhere/disk; fix: "
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(Refusal, match=message):
            check(tmp_path / name, **flags)
    assert sorted(tmp_path.rglob("*")) == before


# C13: an output folder that cannot be written
@pytest.mark.parametrize(("name", "message"), [
    ("spare/../file", "not a folder"),  # there is no spare
    ("/proc/x", "cannot be written to; found No such file or directory"),
    ("/proc/self/fdinfo/x/y", "cannot be written to; found "),
    ("x" * 300, "cannot be written to; found File name too long"),
    ("a/" + "x" * 300, "cannot be written to; found File name too long"),
])  # fmt: skip
def test_what_making_the_folder_would_raise_is_refused_before(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match=rf"C-OUTPUT\] .*:--output_dir: {message}"):
        check(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_can_be_made_is_not_made_by_the_check(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for name in ("run", "a/b/run", "link/run", "link", "a/../run"):
        check(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "link"]


def test_a_full_disk_is_no_wrong_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(OSError) as raised:
        check(tmp_path / "run")
    assert known_failure(raised.value).line().startswith(f"error[E-DISK] {tmp_path}: the disk is full")


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
