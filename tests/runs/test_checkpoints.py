"""Checkpoints of a run: damage is found and an older one used, pruning keeps the valid ones, one process at a time."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.files.manifest import MANIFEST, add_facts, read_facts, verify_manifest
from llava_moslora.runs.checkpoints import checkpoints, lock_run, newest_valid, prune, publish_checkpoint, step_of


def make(run: Path, step: int, content: bytes = b"weights") -> Path:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "w.bin").write_bytes(content)

    publish_checkpoint(run / f"checkpoint-{step}", write, lambda: {"step": step})
    return run / f"checkpoint-{step}"


def test_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    damage_flip(make(tmp_path, 1))
    assert verify_manifest(make(tmp_path, 1))["step"] == 1


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
    reseal(folder, files={"../out.bin": file_entry(folder)})


def file_entry(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())["files"]["adapter/w.bin"]


def reseal(folder: Path, **facts) -> None:
    """Other facts in the manifest, under a hash that is right for them."""
    manifest = json.loads((folder / MANIFEST).read_text())
    content = {k: v for k, v in manifest.items() if k != "sha256"} | facts
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
        (lambda folder: reseal(folder, files={"w\0.bin": file_entry(folder)}), "K-MANIFEST"),
        (lambda folder: reseal(folder, files={"w.bin": {"size": "7", "sha256": "x"}}), "K-MANIFEST"),
        (lambda folder: reseal(folder, files=["w.bin"]), "K-MANIFEST"),
        (lambda folder: reseal(folder, best={"step": "3"}), "K-MANIFEST"),
        (lambda folder: reseal(folder, best=3), "K-MANIFEST"),
        (lambda folder: reseal(folder, best={"loss": 0.5}), "K-MANIFEST"),
    ],
)
def test_damage_is_found_and_the_older_checkpoint_used(tmp_path, damage, code):
    older = make(tmp_path, 10)
    damage(make(tmp_path, 20))
    newest, skipped = newest_valid(tmp_path)
    assert newest == older
    assert [r.code for r in skipped] == [code]
    assert (tmp_path / "checkpoint-20").is_dir()  # left alone


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"files": ["w.bin"]}, r"MANIFEST\.json:files: unreadable .*; found \['w\.bin'\]; expected file: size and"),
        ({"files": {"w.bin": 7}}, r'MANIFEST\.json:files\.w\.bin: unreadable manifest; found 7; expected \{"size"'),
        ({"files": {"w\0": {}}}, r"MANIFEST\.json:files: .*; found w\\x00; expected the name of a file"),
        ({"best": 3}, r'MANIFEST\.json:best: .*; found 3; expected \{"step": number\}; fix: use another checkpoint$'),
        ({"schema": "2"}, r"MANIFEST\.json:schema: unreadable manifest; found 2; expected schema 2"),
        ({"schema": 3, "files": 0}, r"MANIFEST\.json: a manifest of another version; found 3; expected 2"),
    ],
)
def test_a_manifest_in_another_form(tmp_path, facts, said):
    folder = make(tmp_path, 10)
    reseal(folder, **facts)
    with pytest.raises(Refusal, match=said):
        verify_manifest(folder)


def test_order_is_by_number_and_decoys_are_ignored(tmp_path):
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-999").write_text("a file")
    assert [step_of(p) for p in checkpoints(tmp_path)] == [100, 10, 9]


def test_prune_keeps_the_newest_and_never_fewer_than_two(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    prune(tmp_path, keep=3)
    assert [step_of(p) for p in checkpoints(tmp_path)] == [5, 4, 3]
    prune(tmp_path, keep=1)
    assert [step_of(p) for p in checkpoints(tmp_path)] == [5, 4]


def test_prune_keeps_the_best(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    prune(tmp_path, keep=1, best=2)
    assert steps(tmp_path) == [5, 4, 2]
    prune(tmp_path, keep=1, best=5)
    assert steps(tmp_path) == [5, 4]


def test_facts_that_are_added_are_hashed_too(tmp_path):
    folder = make(tmp_path, 3)
    add_facts(folder, {"best": {"step": 3}})
    assert verify_manifest(folder) == read_facts(folder) and read_facts(folder)["best"] == {"step": 3}
    assert read_facts(folder)["step"] == 3
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 3\n  }', '"step": 2\n  }'))
    with pytest.raises(Refusal, match="K-HASH"):
        read_facts(folder)


def steps(run: Path) -> list[int]:
    return [step_of(p) for p in checkpoints(run)]


# K3: a flipped bit
def test_prune_never_counts_a_damaged_checkpoint(tmp_path):
    """Two damaged ones with the largest numbers: a run resumed below them keeps what it saves."""
    for step in (20, 30):
        damage_flip(make(tmp_path, step))
    for step in (3, 6, 9, 12):
        make(tmp_path, step)
        prune(tmp_path, keep=2)
    assert steps(tmp_path) == [30, 20, 12, 9]
    assert newest_valid(tmp_path)[0].name == "checkpoint-12"


@pytest.mark.parametrize("damage", [damage_no_manifest, damage_manifest, damage_schema, damage_fact])
def test_prune_leaves_alone_what_it_cannot_read(tmp_path, damage):
    """Such as a checkpoint that a newer version of this package wrote."""
    damage(make(tmp_path, 20).rename(tmp_path / "checkpoint-2"))
    for step in (3, 6, 9):
        make(tmp_path, step)
    prune(tmp_path, keep=2)
    assert steps(tmp_path) == [9, 6, 2]


def test_a_damaged_checkpoint_stays_until_the_new_one_is_written(tmp_path):
    damage_flip(make(tmp_path, 1))

    def write(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(Refusal, match="disk full"):
        publish_checkpoint(tmp_path / "checkpoint-1", write, dict)
    assert (tmp_path / "checkpoint-1" / "adapter" / "w.bin").is_file()
    make(tmp_path, 1, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert verify_manifest(tmp_path / "checkpoint-1")["files"]["adapter/w.bin"]["size"] == 3


def test_a_renamed_checkpoint_is_refused(tmp_path):
    make(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-20")
    with pytest.raises(
        Refusal, match=r"K-STEP.*checkpoint-20: .*found step 2 in .*expected step 20; fix: rename it to"
    ):
        newest_valid(tmp_path)
    make(tmp_path, 20)  # the true end of the run is written all the same
    assert newest_valid(tmp_path)[0].name == "checkpoint-20"
    assert verify_manifest(tmp_path / "checkpoint-20")["step"] == 20


# R10: two runs in one folder
def test_second_process_on_one_folder_is_refused(tmp_path):
    lock = lock_run(tmp_path)
    with pytest.raises(Refusal, match=rf"another process is training .* found process {os.getpid()} on "):
        lock_run(tmp_path, patience=0)
    lock.release()
    lock_run(tmp_path).release()
