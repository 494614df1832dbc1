"""JSON objects are read strictly; files and folders are replaced atomically."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llava_moslora.errors import Refusal, known_failure
from llava_moslora.evaluation.kept import append
from llava_moslora.files import disk
from llava_moslora.files.disk import new_folder, read_json, replace_file, replace_folder, replace_json, write_json
from llava_moslora.files.tensors import save_tensors
from llava_moslora.runs.log import append_row, delete_rows_after, read_rows

NOT_OBJECTS = {
    "cut": (b'{"a": ', "K-JSON", "not valid JSON"),
    "nested too deeply": (b"[" * 10**5, "K-JSON", "not valid JSON"),
    "a list": (b"[]", "K-JSON", "not a JSON object; found list"),
    "null": (b"null", "K-JSON", "not a JSON object; found NoneType"),
    "another encoding": (b"\xff\xfe{\0", "K-JSON", "not UTF-8"),
    "nothing": (b"", "K-JSON", "not valid JSON"),
}


@pytest.mark.parametrize("case", NOT_OBJECTS)
def test_what_is_no_json_object_is_refused(tmp_path, case):
    content, code, message = NOT_OBJECTS[case]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    for given, expected in ((None, code), ("K-OTHER", "K-OTHER")):
        with pytest.raises(Refusal, match=message) as refusal:
            read_json(file, given)
        assert (refusal.value.code, refusal.value.file) == (expected, file) and refusal.value.fix


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for file, message in ((tmp_path / "none.json", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(Refusal, match=rf"K-MISSING\] .*{message}"):
            read_json(file)


def test_written_as_it_is_read(tmp_path):
    content = {"größe": [1, None, 2.5], "b": {"c": "日本"}}
    write_json(tmp_path / "a.json", content)
    replace_json(tmp_path / "b.json", {})
    replace_json(tmp_path / "b.json", content)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "b.json") == content
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "b.json").read_bytes())  # byte order mark
    assert read_json(tmp_path / "a.json") == content
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


def test_a_file_is_replaced_or_stays(tmp_path, monkeypatch):
    file = tmp_path / "f"
    replace_file(file, b"old")

    def fail(*_):
        raise OSError("power cut")

    monkeypatch.setattr(disk.os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        replace_file(file, b"new")
    assert file.read_bytes() == b"old"


def test_a_folder_is_replaced(tmp_path):
    for name in ("staging", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    replace_folder(tmp_path / "staging", tmp_path / "target", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "from").read_text() == "staging"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "new"
    with pytest.raises(ZeroDivisionError), new_folder(target) as staging:
        (staging / "half").write_text("")
        raise ZeroDivisionError
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("complete")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "complete" and list(target.parent.iterdir()) == [target]


@contextmanager
def room_for(size: int):
    """No file of this process may grow beyond ``size`` bytes: what is written behind them fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


WRITERS = {
    "a file in place": lambda file: disk.write_text(file, "x" * 100),
    "a file that is replaced": lambda file: replace_file(file, b"x" * 100),
    "JSON": lambda file: replace_json(file, {"a": "x" * 100}),
    "a row": lambda file: append_row(file, {"step": 2, "text": "x" * 100}),
    "tensors": lambda file: save_tensors({"a": torch.zeros(100)}, file),
    "an answer": lambda file: append(file.open("a"), [{"index": "x" * 100}]),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_names_the_file(tmp_path, writer):
    with pytest.raises(OSError) as raised, room_for(40):
        WRITERS[writer](tmp_path / "file.json")
    assert Path(raised.value.filename).name.strip(".").startswith("file.json")
    refusal = known_failure(raised.value)
    assert refusal.code == "E-DISK" and "file.json" in str(refusal.file) and refusal.exit_status == 4


def test_a_full_disk_leaves_what_was_there(tmp_path):
    file = tmp_path / "file.json"
    replace_json(file, {"a": 1})
    with pytest.raises(OSError, match="File too large"), room_for(40):
        replace_json(file, {"a": "x" * 100})
    assert read_json(file) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_row_that_was_cut_is_no_row(tmp_path):
    """The disk is full within a row; with space the run goes on, and has every row once."""
    file = tmp_path / "metrics.jsonl"
    append_row(file, {"step": 1, "loss": 2.0})
    with pytest.raises(OSError, match="File too large"), room_for(file.stat().st_size + 10):
        append_row(file, {"step": 2, "loss": 1.0})
    assert read_rows(file) == [{"step": 1, "loss": 2.0}]
    delete_rows_after(file, 1)  # as a resumed run does
    append_row(file, {"step": 2, "loss": 1.0})
    assert [row["step"] for row in read_rows(file)] == [1, 2]
