"""What the strict reader of JSON takes, and that everything else is a ValueError in one line."""

import json
import tracemalloc

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json
from llava_moslora.files.json import DEEPEST, parse_json

WRONG = {
    "nothing": (b"", "Expecting value"),
    "cut off": (b'{"a": [1', "delimiter"),
    "two values": (b"{} {}", "Extra data"),
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON value"),
    "Infinity": (b"[-Infinity]", "-Infinity is not"),
    "out of range": (b"[1e999]", "1e999 is out of range"),
    "digits": (b"1" * 5000, "a number of 5000 digits"),
    "nested for Python": (b"[" * 100_000, "nested"),
    "nested": (b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2), "nested more than"),
    "half a character": (b'{"a": "\\ud83d"}', "surrogates not allowed"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "can't decode"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "can't decode"),
    "NUL": (b'{"a": 1}\0', "Extra data"),
    "a control character": (b'{"a": "\n"}', "Invalid control character"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_json_is_one_kind_of_error(name, tmp_path):
    content, said = WRONG[name]
    with pytest.raises(ValueError, match=said) as error:
        parse_json(content)
    assert not isinstance(error.value, Refusal)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Refusal) as refusal:
        read_json(tmp_path / "x.json")
    assert (refusal.value.code == "K-JSON" and said in str(refusal.value)) or name == "nested"


def test_right_json_is_what_pythons_own_reader_takes():
    value = {"a": [1, -2.5e-7, True, None, "é\u2028👍\0"], "limit": int(1e30), "": {"b": [[[]]]}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text.encode()) == parse_json(text) == parse_json(text.encode("utf-8-sig")) == value
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(deep.encode()) == json.loads(deep)


def test_a_log_of_pythons_own_writer_may_hold_nan():
    assert parse_json(json.dumps({"loss": float("inf")}), finite=False) == {"loss": float("inf")}


def test_many_keys_take_memory_in_proportion():
    text = json.dumps({f"key{k}": k for k in range(200_000)} | {"last": 1})[:-1] + ', "last": 2}'
    tracemalloc.start()
    with pytest.raises(ValueError, match="'last' occurs twice"):
        parse_json(text)
    assert tracemalloc.get_traced_memory()[1] < 40 * len(text)
    tracemalloc.stop()
