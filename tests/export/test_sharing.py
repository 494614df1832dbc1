"""``--push_to_hub``, against a Hub on this machine: what is uploaded, and what is refused before anything is."""

import itertools
import json
import re
import shutil
import sys

import pytest
from huggingface_hub import constants

from llava_moslora.errors import Refusal
from llava_moslora.export.export import export
from llava_moslora.files.manifest import MANIFEST
from scripts.export import main
from support.export_runs import trained_run
from support.fake_hub import FakeHub
from support.launching import run as run_script

REPO = "me/llava-tuned"


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "run"
    trained_run(folder, parts.llm, parts.clip, parts.projector)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    return export(run, run.parent / "projector", ["projector"], prove=False)["projector"]


@pytest.fixture
def hub(monkeypatch):
    with FakeHub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS, which the Hub takes too
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server
        server.shutdown()


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/export.py", *map(str, words)])
    main()


def refused(monkeypatch, message: str, *words) -> Refusal:
    with pytest.raises(Refusal, match=message) as caught:
        call(monkeypatch, *words)
    assert "\n" not in caught.value.line() and "hf_test" not in caught.value.line()
    return caught.value


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_and_its_push_in_one_command(hub, run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    call(
        monkeypatch, run, "--output_dir", out, "--format", "projector", "--no_proof", "--push_to_hub", REPO, "--private"
    )
    repo = hub.repos[REPO]
    assert {name: data for name, data in repo["files"].items() if name != ".gitattributes"} == contents(out)
    assert repo["private"] and repo["titles"][0].startswith("llava_moslora")
    assert f"pushed: {hub.url}/{REPO}/commit/" in capsys.readouterr().out


def test_nothing_is_asked_of_the_hub_unless_it_is_wanted(hub, run, tmp_path, monkeypatch):
    call(monkeypatch, run, "--output_dir", tmp_path / "out", "--format", "projector", "--no_proof")
    assert hub.asked == []


def test_a_second_push_deletes_only_what_the_first_one_wrote(hub, exported, tmp_path, monkeypatch):
    call(monkeypatch, exported, "--push_to_hub", REPO)
    repo = hub.repos[REPO]
    repo["files"]["photo.png"] = b"added on the Hub"
    manifest = json.loads(repo["files"][MANIFEST])
    manifest["files"]["old.safetensors"] = {"size": 1, "sha256": "0"}
    repo["files"] |= {MANIFEST: json.dumps(manifest).encode(), "old.safetensors": b"0"}
    edited = shutil.copytree(exported, tmp_path / "edited")  # a card may be edited before it is shared
    (edited / "README.md").write_text("---\nlicense: other\n---\nmy own words")
    (edited / ".defect-1.txt").write_text("hidden")
    call(monkeypatch, edited, "--push_to_hub", REPO)
    assert repo["files"].keys() == contents(exported).keys() | {".gitattributes", "photo.png"}
    assert b"my own words" in repo["files"]["README.md"] and len(repo["titles"]) == 3


def test_a_failed_upload_keeps_the_export_and_says_how_to_go_on(hub, run, tmp_path, monkeypatch):
    hub.fails["/commit/"] = 500
    words = (run, "--output_dir", tmp_path / "out", "--format", "projector", "--no_proof", "--push_to_hub", REPO)
    refusal = refused(monkeypatch, r"E-HUB\] me/llava-tuned:--push_to_hub: the Hub request failed; .*500", *words)
    before = contents(tmp_path / "out")
    hub.fails.clear()
    command = re.search(r"python scripts/export\.py (.*)", refusal.fix)[1].split()
    call(monkeypatch, *command)
    assert contents(tmp_path / "out") == before
    assert hub.repos[REPO]["files"].keys() == before.keys() | {".gitattributes"}


def test_large_files_that_do_not_arrive(hub, exported, monkeypatch):
    hub.fails["^/lfs/"] = 403
    message = r"E-HUB.*Error while uploading 'model\.safetensors' to the Hub\.; HfHubHTTPError: .*403"
    refused(monkeypatch, message, exported, "--push_to_hub", REPO)
    assert hub.repos[REPO]["files"].keys() == {".gitattributes"}


@pytest.mark.slow
def test_as_a_user_does_it(hub, run, tmp_path):
    """In a process of its own, with the proof."""
    command = [sys.executable, "scripts/export.py", run, "--output_dir", tmp_path / "out", "--push_to_hub", REPO]
    there = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
    done = run_script(command, **there)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.index("verification of hf: passed") < done.stdout.index("exported:") < done.stdout.index("pushed:")
    )
    assert contents(tmp_path / "out").items() <= hub.repos[REPO]["files"].items()


@pytest.mark.parametrize("edit, message", [
    ({"files": {"model.bin": b"theirs"}}, "contains something other than an export of this package; found model.bin"),
    ({"files": {MANIFEST: b"{}"}}, "contains something other than an export of this package"),
    (None, "was changed since the last push; found the commit 'Update README.md'"),
])  # fmt: skip
def test_what_is_there_is_not_overwritten_unasked(hub, exported, monkeypatch, edit, message):
    if edit:
        hub.add(REPO, **edit)
    else:
        call(monkeypatch, exported, "--push_to_hub", REPO)
        hub.repos[REPO]["titles"].insert(0, "Update README.md")
    before = dict(hub.repos[REPO]["files"])
    refusal = refused(monkeypatch, message, exported, "--push_to_hub", REPO)
    assert refusal.code == "C-HUB" and hub.repos[REPO]["files"] == before
    call(monkeypatch, exported, "--push_to_hub", REPO, "--overwrite")
    assert hub.repos[REPO]["files"].keys() == before.keys() | contents(exported).keys()


def test_a_commit_of_somebody_else_in_the_meantime(hub, exported, monkeypatch):
    hub.add(REPO, {})
    numbers = itertools.count()
    monkeypatch.setattr("support.fake_hub.head", lambda repo: f"{next(numbers):040x}")
    refused(monkeypatch, r"E-HUB.*412", exported, "--push_to_hub", REPO)
    assert hub.repos[REPO]["files"].keys() == {".gitattributes"}


def test_private_is_not_ignored_where_the_repository_is_public(hub, exported, monkeypatch):
    hub.add(REPO, {})
    message = r"C-HUB\] me/llava-tuned:--private: this repository is public"
    refused(monkeypatch, message, exported, "--push_to_hub", REPO, "--private")


@pytest.mark.parametrize("name, message", [
    ("llava-tuned", "C-FLAG.*no owner"),
    ("me/a b", "C-FLAG.*not a valid repository name"),
    ("", "C-FLAG.*--push_to_hub: no"),
    ("me/x--y", "C-FLAG.*not a valid repository name"),
])  # fmt: skip
def test_a_wrong_name(hub, run, tmp_path, monkeypatch, name, message):
    refused(monkeypatch, message, run, "--output_dir", tmp_path / "out", "--push_to_hub", name)
    assert hub.asked == [] and not (tmp_path / "out").exists()


def test_offline_without_token_or_with_one_that_only_reads(hub, run, tmp_path, monkeypatch):
    words = (run, "--output_dir", tmp_path / "out", "--push_to_hub", REPO)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused(patch, r"E-HUB\] --push_to_hub: the Hub is disabled; found HF_HUB_OFFLINE", *words)
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        refused(patch, r"E-HUB\] --push_to_hub: no Hub token; fix: hf auth login", *words)
    assert hub.asked == []
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        refused(patch, "E-HUB.*the Hub request failed.*fix: check name, token and network", *words)
    hub.role = "read"
    refused(monkeypatch, "E-HUB.*this token is read-only", *words)
    assert hub.repos == {} and not (tmp_path / "out").exists()


def test_no_finished_export(hub, run, exported, tmp_path, monkeypatch):
    refused(monkeypatch, r"C-HUB.*not a finished export.*for a run, give --output_dir", run, "--push_to_hub", REPO)
    changed = shutil.copytree(exported, tmp_path / "changed")
    (changed / "config.json").write_text("{}")
    message = r"C-HUB.*missing or changed since the export; found config\.json"
    refused(monkeypatch, message, changed, "--push_to_hub", REPO)
    assert hub.asked == []


def test_flags_that_do_not_go_together(hub, run, exported, tmp_path, monkeypatch):
    refused(monkeypatch, r"C-FLAG\] --output_dir: missing", exported)
    refused(monkeypatch, r"C-FLAG\] --private: needs --push_to_hub", run, "--output_dir", tmp_path, "--private")
    refused(
        monkeypatch, r"C-FLAG\] --dtype: belongs to an export", exported, "--push_to_hub", REPO, "--dtype", "float16"
    )
    words = (run, "--output_dir", tmp_path / "out", "--push_to_hub", REPO, "--format", "hf", "llm")
    refused(monkeypatch, r"C-FLAG\] --format: a repository holds one format; found hf, llm", *words)
