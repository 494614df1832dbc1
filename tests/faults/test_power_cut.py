"""A power cut at any moment of a save: whatever subset of the unsynced writes reached the disk, a valid checkpoint is
there. Files lose what was not fsynced; a rename may or may not have happened until its folder is fsynced."""

import os
from pathlib import Path

import pytest

from llava_moslora.runs.checkpoints import newest_valid, publish_checkpoint


def write(content: bytes):
    def into(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "w.bin").write_bytes(content)
        (folder / "position.json").write_text('{"adam_steps": 1}')

    return into


class Disk:
    """Notes what a save did, in order: ('fsync', path, content or None for a folder) and ('rename', from, to)."""

    def __init__(self, monkeypatch):
        self.events: list[tuple] = []
        fsync, rename = os.fsync, os.rename

        def noting_fsync(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.events.append(("fsync", path, None if path.is_dir() else path.read_bytes()))

        def noting_rename(source, target) -> None:
            rename(source, target)
            self.events.append(("rename", Path(source), Path(target)))

        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(os, "rename", noting_rename)


def disk_after(events: list[tuple], renamed: bool, kept: dict[Path, bytes]) -> dict[Path, bytes]:
    """What is on the disk if the power fails after ``events``: only synced content, under the name it then has.

    Args:
        renamed: whether a rename that was done reached the disk though its folder was not yet synced.
    """
    staged = {path: content for kind, path, content in events if kind == "fsync" and content is not None}
    names = [event for event in events if event[0] == "rename"]
    disk = dict(kept)
    for path, content in staged.items():
        for _, source, target in names if renamed else []:
            if path.is_relative_to(source):
                path = target / path.relative_to(source)
        disk[path] = content
    return disk


@pytest.mark.parametrize("renamed", [True, False])
def test_a_valid_checkpoint_at_every_instant(tmp_path, monkeypatch, renamed):
    run = tmp_path / "run"
    publish_checkpoint(run / "checkpoint-1", write(b"first"), lambda: {"step": 1})
    old = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    disk = Disk(monkeypatch)
    publish_checkpoint(run / "checkpoint-2", write(b"second"), lambda: {"step": 2})
    events = disk.events
    monkeypatch.undo()
    assert [e[0] for e in events].count("rename") == 1 and len(events) > 6
    for instant in range(len(events) + 1):
        replay = tmp_path / f"instant{instant}"
        content = disk_after(events[:instant], renamed, old)
        for path, data in content.items():
            (replay / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (replay / path.relative_to(run)).write_bytes(data)
        newest, skipped = newest_valid(replay)
        assert newest is not None and skipped == [], f"after {instant} of {len(events)} operations"
        expected = b"second" if newest.name == "checkpoint-2" else b"first"
        assert (newest / "adapter" / "w.bin").read_bytes() == expected
    assert newest.name == ("checkpoint-2" if renamed else "checkpoint-1")


def test_the_rename_is_synced(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    publish_checkpoint(tmp_path / "checkpoint-1", write(b"first"), lambda: {"step": 1})
    assert disk.events[-2][0] == "rename" and disk.events[-1] == ("fsync", tmp_path, None)
