"""JSON objects are read strictly; files and folders are replaced atomically."""

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.files import disk
from llava_moslora.files.disk import new_folder, read_json, replace_file, replace_folder, replace_json, write_json

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
