import json
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.runs import publish
from llava_moslora.runs.manifest import MANIFEST, read_manifest


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

    with pytest.raises(OSError, match="disk full"):
        publish.publish(tmp_path / "checkpoint-1", write, dict)
    assert publish.newest_valid(tmp_path)[0] is None
    assert make(tmp_path, 1).is_dir()  # leftovers do not block the next life


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


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (damage_flip, "K-HASH"),
        (damage_truncate, "K-SIZE"),
        (damage_remove, "K-MISSING"),
        (damage_no_manifest, "K-MANIFEST"),
        (damage_manifest, "K-MANIFEST"),
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


def test_second_process_on_one_folder_is_refused(tmp_path):
    lock = publish.lock_run(tmp_path)
    with pytest.raises(Refusal, match="another process"):
        publish.lock_run(tmp_path)
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
