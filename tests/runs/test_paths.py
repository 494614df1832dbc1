"""A run that was started in one folder and is resumed, exported or asked from another."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_moslora.config import DataSettings, ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.export.export import export
from llava_moslora.inference.load import load_run
from llava_moslora.runs.paths import located, same_paths
from llava_moslora.runs.record import RUN, read_run
from support.export_runs import trained_run
from support.run_folders import begin, edit_record, reopen, save, settings
from support.tiny import write_clip, write_llm, write_projector


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The folder that the run was started in, which is also the current one at first, and another."""
    for name in ("started", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "started")
    return SimpleNamespace(started=tmp_path / "started", elsewhere=tmp_path / "elsewhere")


@pytest.fixture
def started(places):
    """A run of settings with relative paths."""
    run = places.started / "run"
    begin(run)
    save(run, 1)
    return run


@pytest.mark.parametrize("exists", [True, False])
def test_a_resume_takes_the_same_file_by_any_name(places, started, monkeypatch, exists):
    if exists:
        (places.started / "a.json").write_text("[]")
    monkeypatch.chdir(places.elsewhere)
    (places.elsewhere / "link").symlink_to(places.started)
    names = [str(places.started / "a.json"), str(Path("..", "started", "a.json")), "link/a.json"]
    for name in [*names, "a.json"]:  # the last: the same command in a copy of the project
        now = settings()
        now.data.data_path = [name]
        assert reopen(started, now).name == "checkpoint-1"
    now.data.data_path = ["link/b.json"]
    with pytest.raises(Refusal, match=r"K-CHANGED.*found data_path .*b\.json.*; expected data_path \['a\.json'\]"):
        reopen(started, now)


def test_an_earlier_versions_record_is_from_the_current_folder(places, started, monkeypatch):
    edit_record(started, lambda record: record.pop("folder"))
    (places.elsewhere / "llm").mkdir()
    assert read_run(started).located.model.model_name_or_path == str(places.started / "llm")
    monkeypatch.chdir(places.elsewhere)
    assert read_run(started).located.model.model_name_or_path == str(places.elsewhere / "llm")


def test_a_project_that_was_moved(places, started, monkeypatch):
    (places.started / "llm").mkdir()
    moved = places.started.rename(places.started.with_name("moved"))
    monkeypatch.chdir(moved)
    base = read_run(moved / "run").located.model
    assert base.model_name_or_path == str(moved / "llm")
    assert base.vision_tower == str(places.started / "clip")  # it is nowhere: the refusal names where it was


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("vision_tower", "open_clip:ViT-B-32@tower.bin", "open_clip:ViT-B-32@{}/tower.bin"),
        ("vision_tower", "open_clip:tower.bin", "open_clip:{}/tower.bin"),
        ("vision_tower", "open_clip:ViT-B-32@laion2b", "open_clip:ViT-B-32@laion2b"),
        ("vision_tower", "open_clip:ViT-B-32@openai", "open_clip:ViT-B-32@openai"),  # also below a folder of that name
        ("vision_tower", "user@host/clip", "{}/user@host/clip"),
        ("data_path", ["hub:a/b", "s3://a/x.tar", "part=1/*.tar"], ["hub:a/b", "s3://a/x.tar", "{}/part=1/*.tar"]),
        ("eval_data_path", ["held=a.json", "b.json", "/c.json"], ["held={}/a.json", "{}/b.json", "/c.json"]),
        ("image_folder", None, None),
    ],
)  # fmt: skip
def test_what_is_a_path(places, monkeypatch, name, value, expected):
    (places.started / "tower.bin").touch()
    (places.started / "openai").mkdir()
    monkeypatch.chdir(places.elsewhere)
    kind = ModelSettings("llm", "clip") if name == "vision_tower" else DataSettings(["a.json"])
    setattr(kind, name, value)
    found = located(kind, str(places.started))
    whole = json.loads(json.dumps(expected).replace("{}", str(places.started)))
    assert getattr(found, name) == whole and getattr(kind, name) == value
    if expected is not None and whole != value:  # the same files by other words, and other files
        monkeypatch.chdir(places.started)
        assert name in same_paths(found, located(kind, None))
        monkeypatch.chdir(places.elsewhere)
        assert name not in same_paths(found, located(kind, None))


def test_exported_and_asked_from_elsewhere(places, monkeypatch):
    write_llm(places.started / "llm")
    write_clip(places.started / "clip")
    write_projector(places.started / "projector.safetensors")
    trained_run(places.started / "run", "llm", "clip", "projector.safetensors")
    assert json.loads((places.started / "run" / RUN).read_text())["folder"] == str(places.started)
    here = export("run", "here", ["peft_with_base"], prove=False)
    monkeypatch.chdir(places.elsewhere)
    there = export(places.started / "run", "there", ["peft_with_base"], prove=False)
    for form in here:
        for file in (places.started / here[form]).rglob("*.safetensors"):
            other = there[form] / file.relative_to(places.started / here[form])
            assert file.read_bytes() == other.read_bytes()
    load_run(places.started / "run")
    (places.started / "llm").rename(places.elsewhere / "llm2")
    for command in (load_run, lambda run: export(run, "x", prove=False)):
        with pytest.raises(Refusal, match=rf"C-PATH\] {places.started}/llm:--model_name_or_path: no such folder"):
            command(places.started / "run")
