"""What an export may replace, and that nothing but an export is ever deleted."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava_moslora.errors import Refusal, known_failure
from llava_moslora.export import export as export_module
from llava_moslora.export import output_folder, verify
from llava_moslora.export.export import export
from llava_moslora.files.manifest import verify_manifest
from llava_moslora.runs.hyper_parameters import hyper_parameters
from llava_moslora.runs.record import read_run
from support.export_runs import newer, probe_here, trained_run


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "run"
    trained_run(folder, parts.llm, parts.clip, parts.projector)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("exported") / "out", prove=False)["hf"]


@pytest.fixture
def out(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "out")


def everything(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(run, output_folder, match: str, watched=None, **settings) -> None:
    """Refused, and every file of ``watched`` (the folder above) is as it was."""
    watched = watched or output_folder.parent
    before = everything(watched)
    with pytest.raises(Refusal, match=match):
        export(run, output_folder, overwrite=True, prove=False, **settings)
    assert everything(watched) == before


def test_an_old_export_stays_until_the_new_one_is_whole(run, out, monkeypatch):
    before = everything(out)

    def interrupted(*_, **__):
        raise Refusal("K-PROOF", "not today")

    monkeypatch.setattr(verify, "prove", interrupted)
    with pytest.raises(Refusal, match="not today"):
        export(run, out, overwrite=True)
    assert everything(out) == before
    export(run, out, dtype=torch.bfloat16, overwrite=True, prove=False)
    assert [p.name for p in out.parent.iterdir()] == ["out"] and verify_manifest(out)
    assert load_file(out / "model.safetensors")["language_model.lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["notes.md", "results/answers.json", ".hidden"])
def test_files_added_to_an_export_are_not_deleted(run, out, name):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    refused(run, out, rf"C-OUTPUT\] .*out:--output_dir: files that no export wrote are not deleted; found {name}")


def test_an_edited_card_is_not_deleted(run, out):
    (out / "README.md").write_text("my own words")
    refused(run, out, r"C-OUTPUT\] .*files that changed since the export are not deleted; found README\.md")


def test_a_foreign_export_json_makes_no_export(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text(json.dumps({"project": "my other tool"}))
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    refused(run, tmp_path / "out", r"C-OUTPUT\] .*not an export: nothing is deleted here; expected export\.json in it")


def test_files_that_come_while_the_export_runs_are_kept(run, out, monkeypatch):
    def comes(*_, **__):
        (out / "notes.md").write_text("mine")
        return {"proof": "passed"}

    monkeypatch.setattr(verify, "prove", comes)
    monkeypatch.setattr(export_module, "proof_in_one_line", str)
    monkeypatch.setattr(export_module, "write_card", lambda *_: None)
    with pytest.raises(Refusal, match=r"files that no export wrote are not deleted; found notes\.md"):
        export(run, out, overwrite=True)
    assert (out / "notes.md").read_text() == "mine" and verify_manifest(out)


@pytest.mark.parametrize("part", [".", "base"])
def test_its_own_base_is_not_replaced(run, parts, tmp_path, part):
    """A run that began from an export, or from a part of one, and is exported onto it."""
    if part == ".":
        base = export(run, tmp_path / "base", prove=False)["hf"]
        trained_run(tmp_path / "run", base, base, base)
    else:
        base = export(run, tmp_path / "base", ["peft"], with_base=True, prove=False)["peft"]
        trained_run(tmp_path / "run", base / part, base / part, base / part)
    match = r"C-OUTPUT\] .*base:--output_dir: an input of this export is in that folder; found .*base"
    refused(tmp_path / "run", base, match)
    elsewhere = shutil.copytree(base / part, tmp_path / "elsewhere")
    moved = {"llm": elsewhere, "vision_tower": str(elsewhere)}
    refused(tmp_path / "run", base, match, **moved)  # the run's base, although another is given


@pytest.mark.parametrize("place", [".", "merged", "checkpoint-1/merged"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_written_into_the_run(run, place, overwrite):
    before = sorted(run.rglob("*"))
    message = r"C-OUTPUT\] .*--output_dir: the output folder is inside the run folder; found .*; expected a folder out"
    with pytest.raises(Refusal, match=message):
        export(run, run / place, prove=False, overwrite=overwrite)
    assert sorted(run.rglob("*")) == before


def test_the_run_is_not_replaced(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    refused(copy, copy, r"C-OUTPUT\] .*run:--output_dir: ")
    (copy / "export.json").write_text('{"format": "hf"}')
    refused(copy, copy, r"C-OUTPUT\] .*run:--output_dir: ")
    refused(copy, tmp_path, r"C-OUTPUT\] .*--output_dir: ")  # the folder above it


def test_through_a_link_the_target_is_replaced(run, out, tmp_path):
    (tmp_path / "link").symlink_to(out)
    export(run, tmp_path / "link", dtype=torch.bfloat16, overwrite=True, prove=False)
    assert (tmp_path / "link").readlink() == out and sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]
    assert load_file(out / "model.safetensors")["language_model.lm_head.weight"].dtype == torch.bfloat16


def test_a_foreign_staging_folder_is_not_deleted(run, tmp_path):
    staging = tmp_path / ".out.staging"
    staging.mkdir()
    (staging / "mine.txt").write_text("mine")
    refused(run, tmp_path / "out", r"C-OUTPUT\] .*\.out\.staging.*not an export's staging folder.*found mine\.txt")


def test_the_current_folder_is_not_replaced(run, out, monkeypatch):
    monkeypatch.chdir(out)
    refused(run, ".", r"C-OUTPUT\] .*out:--output_dir: the current folder is not replaced", watched=out)
    with pytest.raises(Refusal, match="the current folder is not replaced"):  # and not: try --overwrite
        export(run, ".", prove=False)


@pytest.mark.parametrize(("name", "formats"), [("dangling", ["hf"]), ("dangling/out", ["hf"]), (".", ["hf", "peft"])])
def test_a_link_that_leads_nowhere_is_refused(run, tmp_path, name, formats):
    """The disk behind it is not mounted: the export would land on another one."""
    for link in ("dangling", "peft"):
        (tmp_path / link).symlink_to(tmp_path / "not mounted")
    message = r"C-OUTPUT\] .*/(dangling|peft):--output_dir: a link to a place that is not there; found .*not mounted"
    refused(run, tmp_path / name, message, watched=tmp_path, formats=formats)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "peft"]


@pytest.mark.parametrize(("number", "line"), [
    (errno.EIO, r"E-DISK\] .*\.out\.lock: the disk cannot be read or written"),
    (errno.EMFILE, r"E-FILES\] .*too many open files"),
    (errno.ENAMETOOLONG, r"C-OUTPUT\] .*--output_dir: cannot be written to"),
])  # fmt: skip
def test_a_lock_that_cannot_be_made(run, tmp_path, monkeypatch, number, line):
    """Another folder helps only where the folder is the reason."""

    def fails(file):
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr(output_folder, "_lock", fails)
    with pytest.raises((Refusal, OSError)) as raised:
        export(run, tmp_path / "out", prove=False)
    assert re.search(line, known_failure(raised.value).line())


def test_two_exports_into_one_folder(run, tmp_path, monkeypatch):
    """The second begins while the first is verified."""

    def meanwhile(*_, **__):
        with pytest.raises(Refusal, match=r"C-LOCKED\] .*out:--output_dir: another process is exporting"):
            export(run, tmp_path / "out", prove=False)
        assert (tmp_path / ".out.staging" / "model.safetensors").is_file()
        raise Refusal("K-PROOF", "the first continued")

    monkeypatch.setattr(verify, "prove", meanwhile)
    with pytest.raises(Refusal, match="the first continued"):
        export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.staging"]
    export(run, tmp_path / "out", prove=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("killed", ["before the new one had its name", "while the old one was deleted"])
def test_a_killed_replacement_is_finished(run, out, killed):
    old = out.with_name(".out.old")
    if killed.startswith("before"):
        os.rename(out, old)
    else:
        shutil.copytree(out, old)
        (old / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="already exists"):
        export(run, out, prove=False)
    assert verify_manifest(out)
    export(run, out, overwrite=True, prove=False)
    assert verify_manifest(out) and [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["hf", "peft"])
def test_a_checkpoint_that_is_pruned_meanwhile(run, tmp_path, monkeypatch, target):
    """The export and its proof are of one checkpoint, the newest when it began."""
    copy = shutil.copytree(run, tmp_path / "run")
    write = export_module.write_weights

    def later(*arguments):
        newer(copy, 2)
        write(*arguments)

    monkeypatch.setattr(export_module, "write_weights", later)
    probe_here(monkeypatch)
    folder = export(copy, tmp_path / "out", [target])[target]
    facts = json.loads((folder / "export.json").read_text())
    assert facts["checkpoint"] == "checkpoint-1" and facts["adapter"]["mixer_init"] == "kaiming_uniform"
    assert facts["training"] == hyper_parameters(read_run(run)) and facts["training"]["lora_plus_ratio"] == 1
    monkeypatch.setattr(export_module, "write_weights", write)
    expected = export(run, tmp_path / "expected", [target], prove=False)[target]
    for file in expected.rglob("*.safetensors"):
        assert file.read_bytes() == (folder / file.relative_to(expected)).read_bytes()


def test_a_checkpoint_that_is_pruned_while_it_is_read(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    link, seen = output_folder._link, []

    def pruned_before_the_second_file(file, other):
        seen.append(file.name)
        if len(seen) == 2:
            newer(copy, 2)
        link(file, other)

    monkeypatch.setattr(output_folder, "_link", pruned_before_the_second_file)
    folder = export(copy, tmp_path / "out", prove=False)["hf"]
    assert json.loads((folder / "export.json").read_text())["checkpoint"] == "checkpoint-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
