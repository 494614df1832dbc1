"""Folders are published complete or not at all, with a manifest of their files."""

import json
import os
from pathlib import Path

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.files.manifest import MANIFEST, verify_manifest
from llava_moslora.files.publish import publish, sweep


def make(parent: Path, step: int, content: bytes = b"weights") -> Path:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "w.bin").write_bytes(content)

    publish(parent / f"checkpoint-{step}", write, lambda: {"step": step})
    return parent / f"checkpoint-{step}"


def test_published_folder_is_whole_and_staging_gone(tmp_path):
    folder = make(tmp_path, 5)
    assert verify_manifest(folder)["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_publishing_twice_changes_nothing(tmp_path):
    folder = make(tmp_path, 5, b"first")
    make(tmp_path, 5, b"second")
    assert (folder / "adapter" / "w.bin").read_bytes() == b"first"


def test_a_failed_write_publishes_nothing(tmp_path):
    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError("disk full")

    with pytest.raises(Refusal, match=r"rank 0: disk full; .* bytes free; fix: free space") as refusal:
        publish(tmp_path / "checkpoint-1", write, dict)
    assert refusal.value.code == "E-DISK" and refusal.value.exit_status == 4
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left to fill the disk further
    assert make(tmp_path, 1).is_dir()


def test_an_error_of_our_own_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError):
        publish(tmp_path / "checkpoint-1", lambda folder: 1 / 0, dict)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_are_deleted(tmp_path):
    make(tmp_path, 1)
    for name in (".checkpoint-2.0badcafe.staging", ".checkpoint-1.0badcafe.trash"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    """safetensors writes files that only their owner may read."""
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        save_file({"w": torch.zeros(2)}, folder / "adapter" / "w.safetensors")

    before = os.umask(umask)
    try:
        publish(tmp_path / "checkpoint-1", write, lambda: {"step": 1})
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()]
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == {"w.safetensors": mode, MANIFEST: mode}


def test_manifest_lists_every_file_with_its_hash(tmp_path):
    folder = make(tmp_path, 1)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(files) == ["adapter/w.bin"]
    # by sha256sum(1)
    assert files["adapter/w.bin"]["size"] == 7 and files["adapter/w.bin"]["sha256"] == (
        "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    )
