import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.files import publish
from llava_moslora.files.manifest import MANIFEST, read_manifest


def make(run: Path, step: int, content: bytes = b"weights") -> Path:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "w.bin").write_bytes(content)

    publish.publish(run / f"checkpoint-{step}", write, lambda: {"step": step})
    return run / f"checkpoint-{step}"


def test_published_folder_is_whole_and_staging_gone(tmp_path):
    folder = make(tmp_path, 5)
    assert read_manifest(folder)["step"] == 5
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
        publish.publish(tmp_path / "checkpoint-1", write, dict)
    assert refusal.value.code == "E-DISK" and refusal.value.exit_status == 4
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left to fill the disk further
    assert publish.newest_valid(tmp_path)[0] is None
    assert make(tmp_path, 1).is_dir()


def test_an_error_of_our_own_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError):
        publish.publish(tmp_path / "checkpoint-1", lambda folder: 1 / 0, dict)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_lives_are_swept(tmp_path):
    make(tmp_path, 1)
    for name in (".checkpoint-2.0badcafe.staging", ".checkpoint-1.0badcafe.trash"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    publish.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    damage_flip(make(tmp_path, 1))
    assert read_manifest(make(tmp_path, 1))["step"] == 1


def damage_flip(folder: Path) -> None:
    file = folder / "adapter" / "w.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


def damage_truncate(folder: Path) -> None:
    (folder / "adapter" / "w.bin").write_bytes(b"weigh")


def damage_remove(folder: Path) -> None:
    (folder / "adapter" / "w.bin").unlink()


def damage_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"schema": 1')


def damage_empty(folder: Path) -> None:  # what a kill leaves of a checkpoint that is written in place
    for path in [*(folder / "adapter").iterdir(), folder / MANIFEST]:
        path.unlink()


def damage_fact(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 20', '"step": 30'))


def damage_schema(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"schema": 2', '"schema": 9'))


def damage_link(folder: Path) -> None:
    file = folder / "adapter" / "w.bin"
    file.rename(folder.parent / "elsewhere.bin")
    file.symlink_to(folder.parent / "elsewhere.bin")


def damage_way_out(folder: Path) -> None:
    (folder.parent / "out.bin").write_bytes(b"weights")
    manifest = json.loads((folder / MANIFEST).read_text())
    listed = {"../out.bin": manifest["files"].pop("adapter/w.bin")}
    content = {k: v for k, v in manifest.items() if k != "sha256"} | {"files": listed}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": digest}))


# K2: a truncated safetensors file
# K3: a flipped bit
# K13: paths and links out of the folder
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (damage_flip, "K-HASH"),
        (damage_truncate, "K-SIZE"),
        (damage_remove, "K-MISSING"),
        (damage_no_manifest, "K-MANIFEST"),
        (damage_manifest, "K-MANIFEST"),
        (damage_empty, "K-MANIFEST"),
        (damage_schema, "K-MANIFEST"),
        (damage_fact, "K-HASH"),
        (damage_link, "K-PATH"),
        (damage_way_out, "K-PATH"),
    ],
)
def test_damage_is_found_and_the_older_checkpoint_used(tmp_path, damage, code):
    older = make(tmp_path, 10)
    damage(make(tmp_path, 20))
    newest, passed_over = publish.newest_valid(tmp_path)
    assert newest == older
    assert [r.code for r in passed_over] == [code]
    assert (tmp_path / "checkpoint-20").is_dir()  # left alone


def test_order_is_by_number_and_decoys_are_ignored(tmp_path):
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-999").write_text("a file")
    assert [publish.step_of(p) for p in publish.checkpoints(tmp_path)] == [100, 10, 9]


def test_prune_keeps_the_newest_and_never_fewer_than_two(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    publish.prune(tmp_path, keep=3)
    assert [publish.step_of(p) for p in publish.checkpoints(tmp_path)] == [5, 4, 3]
    publish.prune(tmp_path, keep=1)
    assert [publish.step_of(p) for p in publish.checkpoints(tmp_path)] == [5, 4]


def steps(run: Path) -> list[int]:
    return [publish.step_of(p) for p in publish.checkpoints(run)]


# K3: a flipped bit
def test_prune_never_counts_a_damaged_checkpoint(tmp_path):
    """Two damaged ones with the largest numbers: a run that went on below them keeps what it saves."""
    for step in (20, 30):
        damage_flip(make(tmp_path, step))
    for step in (3, 6, 9, 12):
        make(tmp_path, step)
        publish.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [30, 20, 12, 9]
    assert publish.newest_valid(tmp_path)[0].name == "checkpoint-12"


@pytest.mark.parametrize("damage", [damage_no_manifest, damage_manifest, damage_schema, damage_fact])
def test_prune_leaves_alone_what_it_cannot_read(tmp_path, damage):
    """Such as a checkpoint that a newer version of this package wrote."""
    damage(make(tmp_path, 20).rename(tmp_path / "checkpoint-2"))
    for step in (3, 6, 9):
        make(tmp_path, step)
    publish.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [9, 6, 2]


def test_a_damaged_checkpoint_stays_until_the_new_one_is_written(tmp_path):
    damage_flip(make(tmp_path, 1))

    def write(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(Refusal, match="disk full"):
        publish.publish(tmp_path / "checkpoint-1", write, dict)
    assert (tmp_path / "checkpoint-1" / "adapter" / "w.bin").is_file()
    make(tmp_path, 1, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert read_manifest(tmp_path / "checkpoint-1")["files"]["adapter/w.bin"]["size"] == 3


def test_a_renamed_checkpoint_is_refused(tmp_path):
    make(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-20")
    with pytest.raises(
        Refusal, match=r"K-STEP.*checkpoint-20: .*found step 2 in .*expected step 20; fix: rename it to"
    ):
        publish.newest_valid(tmp_path)
    make(tmp_path, 20)  # the true end of the run is written all the same
    assert publish.newest_valid(tmp_path)[0].name == "checkpoint-20"
    assert read_manifest(tmp_path / "checkpoint-20")["step"] == 20


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    """safetensors writes files that only their owner may read."""
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        save_file({"w": torch.zeros(2)}, folder / "adapter" / "w.safetensors")

    before = os.umask(umask)
    try:
        publish.publish(tmp_path / "checkpoint-1", write, lambda: {"step": 1})
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()]
    assert {p.name: p.stat().st_mode & 0o777 for p in files} == {"w.safetensors": mode, MANIFEST: mode}


# R10: two runs in one folder
def test_second_process_on_one_folder_is_refused(tmp_path):
    lock = publish.lock_run(tmp_path)
    with pytest.raises(Refusal, match=rf"another process is training .* found process {os.getpid()} on "):
        publish.lock_run(tmp_path, patience=0)
    lock.release()
    publish.lock_run(tmp_path).release()


def test_manifest_lists_every_file_with_its_hash(tmp_path):
    folder = make(tmp_path, 1)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(files) == ["adapter/w.bin"]
    # by sha256sum(1)
    assert files["adapter/w.bin"]["size"] == 7 and files["adapter/w.bin"]["sha256"] == (
        "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    )
