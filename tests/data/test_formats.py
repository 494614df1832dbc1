"""The bad-input table of the data files: what is refused, in which words, and what is let through."""

import json
import tracemalloc
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_moslora.data import formats
from llava_moslora.data.formats import read_records
from llava_moslora.data.sources import json as json_source
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import Turn


def record(text="<image>\nWhat?", answer="A cat.", image="0.png", id="r"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


GOOD = json.dumps(record())
WINDOWS = pytest.mark.parametrize("window", [1 << 20, 7, 1])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """``read(content, window)``: the records of a file with that text or those bytes."""

    def reader(content, window=1 << 20):
        monkeypatch.setattr(json_source, "WINDOW", window)
        path = tmp_path / "data.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_records(path))

    return reader


# D3: JSON lines instead of an array
# D4: a UTF-8 byte order mark
@WINDOWS
@pytest.mark.parametrize("content", [
    f"[{GOOD},{GOOD}]",
    f" [\n {GOOD} ,\r\n\t{GOOD}\n]\n\n",
    f"{GOOD}\n{GOOD}\n",  # JSON lines
    f"{GOOD}\r\n{GOOD}",
    f"\ufeff[{GOOD},{GOOD}]",  # byte order mark
])  # fmt: skip
def test_accepted(read, content, window):
    first, second = read(content, window)
    assert (first.index, second.index) == (0, 1)
    assert first.id == "r"
    assert first.images == ("0.png",)
    assert first.turns == (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."))


# D18: emoji, right-to-left text, NUL and other Unicode
@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧 🏳️‍🌈", "مرحبا \u202eabc", "nul \x00 byte", "日本語 a\u0301", "\u2028 \ud7ff \ue000", "<image> 🎉"]
)
@pytest.mark.parametrize("ascii", [True, False])
@WINDOWS
def test_unicode_round_trips(read, text, ascii, window):
    (found,) = read(json.dumps([record(answer=text)], ensure_ascii=ascii), window)
    assert found.turns[1].text == text


def bad(**changes):
    return json.dumps([record() | changes])


def turns(*pairs):
    return bad(conversations=[{"from": role, "value": value} for role, value in pairs])


NOT_JSON = [
    # D1: not JSON, or an empty file
    ("D1", "", r"\[D-PARSE\] .*data.json: the file is empty"),
    ("D1", " \n\n ", r"\[D-PARSE\] .*the file is empty"),
    ("D1", '[\n{"id" 1}, {"id": 12345678901234567890}]', r"line 2 column 7: expecting ':' delimiter; found 1},"),
    ("D1", f"[{GOOD},]", r"\[D-PARSE\] .*line 1 column \d+: expecting value; found \]"),
    ("D1", f"[{GOOD} {GOOD}]", r"\[D-PARSE\] .*line 1 column \d+: ',' or '\]' must follow a record"),
    ("D1", f"[{GOOD}] x", r"\[D-PARSE\] .*unexpected content after the end of the array; found x"),
    ("D1", f"{GOOD}\n{GOOD[:-1]}\n{GOOD}", r"\[D-PARSE\] .*line 3 column 1: expecting ',' delimiter"),
    ("D1", "[tru]", r"\[D-PARSE\] .*line 1 column 2: expecting value; found tru"),
    ("D1", '[{"id": "a\nb"}]', r"\[D-PARSE\] .*line 1 column 11: invalid control character at"),
    # D2: JSON that ends too early
    ("D2", f"[{GOOD},\n{GOOD[:40]}", r"\[D-PARSE\] .*the file ends at byte \d+ .*probably an interrupted copy"),
    ("D2", f"[{GOOD},", r"\[D-PARSE\] .*the file ends at byte"),
    ("D2", f"[{GOOD}", r"\[D-PARSE\] .*the file ends at byte"),
    ("D2", f"{GOOD}\n{GOOD[:-1]}", r"\[D-PARSE\] .*the file ends at byte"),
    # D5: bytes that are not UTF-8
    ("D5", GOOD.replace("What", "Prüf").encode("latin-1"), r"\[D-ENC\] .*not UTF-8 at byte \d+; found 0xfc"),
    ("D5", f"[{GOOD}]".encode("utf-16"), r"\[D-ENC\] .*the file is UTF-16; expected UTF-8"),
    ("D5", f"[{GOOD}]".encode() + b"\xe2\x82", r"\[D-ENC\] .*not UTF-8 at byte"),
    # D6: a top level or a record of another type
    ("D6", '"text"', r"\[D-TYPE\] .*the top level is neither an array nor one object per line"),
    ("D6", "17", r"\[D-TYPE\] .*the top level is neither"),
    # D9: brackets nested 100,000 deep
    ("D9", "[" * 100_000, r"\[D-PARSE\] .*brackets are nested too deeply"),
    ("D9", '{"a":' * 100_000, r"\[D-PARSE\] .*brackets are nested too deeply"),
]  # fmt: skip
BAD_RECORDS = [
    # D6: a top level or a record of another type
    ("D6", '["text"]', r"\[D-TYPE\] .*record 0: a record must be an object; found a string"),
    ("D6", '{"data": [], "version": 1}', r"record 0: unknown record format.*found keys data, .*as a JSON array"),
    ("D6", "[null, 1]", r"\[D-TYPE\] .*record 0: a record must be an object; found null"),
    # D7: one key twice in an object
    ("D7", '[{"id": 1, "id": 2}]', r"\[D-JSON\] .*record 0 id=2: the key 'id' occurs twice in one object"),
    ("D7", f"[{GOOD[:-1]}, \"x\": {{\"y\": 1, \"y\": 1}}}}]", r"\[D-JSON\] .*the key 'y' occurs twice"),
    # D8: NaN, Infinity, or a number of thousands of digits
    ("D8", '[{"id": NaN}]', r"\[D-JSON\] .*NaN is not a JSON value"),
    ("D8", '[{"x": -Infinity}]', r"\[D-JSON\] .*-Infinity is not a JSON value"),
    ("D8", f'[{{"id": {"9" * 5000}}}]', r"\[D-JSON\] .*a number of 5000 digits"),
    # D10: no conversations
    ("D10", '[{"id": "a"}]', r"\[D-SCHEMA\] .*record 0 id=a: unknown record format; found keys id; expected"),
    # D11: conversations, id or image of another type
    ("D11", bad(conversations=[]), r"\[D-SCHEMA\] .*found an empty list"),
    ("D11", bad(conversations=None), r"\[D-SCHEMA\] .*found null"),
    ("D11", bad(conversations="hi"), r"\[D-SCHEMA\] .*found a string"),
    ("D11", bad(conversations=["hi"]), r"\[D-SCHEMA\] .*conversations\[0\]: a turn must be an object .*found a string"),
    ("D11", bad(conversations=[{"speaker": "user", "text": "x"}]), r"\[D-SCHEMA\] .*found keys speaker, text"),
    ("D11", bad(conversations=[{"from": "human", "value": None}]), r"\[D-SCHEMA\] .*conversations\[0\]"),
    ("D11", bad(id=[1]), r"\[D-SCHEMA\] .*id: must be a string or a number; found an array"),
    ("D11", bad(image={"file": "x"}), r"\[D-SCHEMA\] .*image: must be a file name or a list of file names"),
    ("D11", bad(image=""), r"\[D-SCHEMA\] .*image: must be a file name"),
    ("D11", bad(image=["0.png", None]), r"\[D-SCHEMA\] .*image: must be a file name"),
    ("D11", bad(images=["x"]), r"\[D-SCHEMA\] .*image, images: images under two keys; found image and.*: keep"),
    # D12: turns out of order, or an unknown role
    ("D12", turns(("gpt", "x"), ("human", "x")), r"\[D-ROLE\] .*not in order; found gpt, human"),
    ("D12", turns(("human", "x"), ("human", "x"), ("gpt", "x")), r"\[D-ROLE\] .*found human, human, gpt"),
    ("D12", turns(("human", "<image>")), r"\[D-ROLE\] .*found human; expected .*ending with gpt"),
    ("D12", turns(("human", "<image>"), ("gpt", "x"), ("human", "x")), r"\[D-ROLE\] .*found human, gpt, human"),
    ("D12", turns(("bot", "x")), r"\[D-ROLE\] .*\[0\].from: unknown role; found bot; expected system"),
    ("D12", turns(("human", "x"), ("system", "x"), ("gpt", "x")), r"\[D-ROLE\] .*not in order"),
    ("D12", turns(("system", "x")), r"\[D-ROLE\] .*not in order"),
    # D13: an empty turn
    ("D13", turns(("human", "<image>"), ("gpt", " \n ")), r"\[D-EMPTY\] .*\[1\].value: the gpt turn is empty"),
    ("D13", turns(("human", ""), ("gpt", "x")), r"\[D-EMPTY\] .*the human turn is empty"),
    # D14: more or fewer images than <image>, or a video
    ("D14", bad(image=["0.png", "1.png"]), r"\[D-IMAGES\] .*found 1 <image>; expected 2 for 2 images"),
    ("D14", json.dumps([record("<image><image>")]), r"\[D-IMAGES\] .*found 2 <image>; expected 1 for 1 images"),
    ("D14", json.dumps([record(image=None)]), r"\[D-IMAGES\] .*but no image; found 1 <image>, 0 im"),
    ("D14", json.dumps([record("What?\n<image>", image=None)]), r"\[D-IMAGES\] .*no image"),
    ("D14", bad(video="a.mp4"), r"\[D-VIDEO\] .*record 0 id=r:video: videos are not supported; fix: .*'image', one"),
    ("D14", bad(videos=["a.mp4"]), r"\[D-VIDEO\] .*:videos: videos are not"),
    ("D14", json.dumps([record("<video>\nwhat?", image=None)]), r"\[D-VIDEO\] .*<video> placeholder.*; found <video>"),
    ("D14", json.dumps([record("<image>\nwhat?\n<video>")]), r"\[D-VIDEO\]"),
    # D15: an image without <image>
    ("D15", json.dumps([record("What?")]), r"\[D-IMAGES\] .*found 0 <image>; expected 1 for 1 images"),
    ("D15", json.dumps([record("What?", "<image>")]), r"\[D-IMAGES\] .*found 0 <image>"),
    # D19: a lone surrogate
    ("D19", json.dumps([record(answer="\ud83d")]), r"\[D-UNICODE\] .*a lone surrogate .*found \\ud83d"),
    ("D19", json.dumps([record(image="\udc00")]), r"\[D-UNICODE\] .*a lone surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "content", "message"), NOT_JSON + BAD_RECORDS)
@WINDOWS
def test_refused(read, case, content, message, window):
    if window == 1 and len(content) > 3000:
        window = 7
    with pytest.raises(Refusal, match=message) as refusal:
        read(content, window)
    assert refusal.value.exit_status == 2
    assert "data.json" in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_bad_record_is_named_by_index_and_id(read):
    records = [record(id=k) for k in range(5)]
    records[3]["conversations"][0]["value"] = "no image"
    with pytest.raises(Refusal, match=r"data.json:record 3 id=3: the number of <image>"):
        read(json.dumps(records))


@pytest.mark.parametrize(("keys", "wrong"), [(1000, False), (1001, True)])
def test_keys_of_a_record(read, tmp_path, keys, wrong):
    """Of a record itself, not of an object inside it; also of columns."""
    many = {f"k{k}": 0 for k in range(keys)}
    good = record(id="many")
    as_row = good | dict.fromkeys(list(many)[: keys - len(good)], 0)
    pq.write_table(pa.Table.from_pylist([as_row]), tmp_path / "rows.parquet")
    assert read(json.dumps([good | {"more": many}]))[0].id == "many"
    if wrong:
        with pytest.raises(Refusal, match=r"D-JSON\] .*json:record 0 id=many: 1001 keys in one record, of at most"):
            read(json.dumps([as_row]))
    else:
        assert read(json.dumps([as_row]))[0].id == "many"
    if not wrong:
        assert next(iter(read_records(tmp_path / "rows.parquet"))).id == "many"
        return
    with pytest.raises(Refusal, match=r"rows\.parquet:record 0 id=many: 1001 keys in one record, of at most 1000"):
        list(read_records(tmp_path / "rows.parquet"))


# D16: <image> in running text
def test_image_in_running_text_is_text(read):
    (found,) = read(json.dumps([record("what does <image> mean in HTML?", "<image>\nis a tag", image=None)]))
    assert found.images == ()
    (found,) = read(json.dumps([record("<image>\nWhat?", "it says <image>")]))
    assert found.images == ("0.png",)


def test_optional_parts(read):
    first, second, third = read(json.dumps([
        {"conversations": record("a", image=None)["conversations"]},
        record("a", image=None, id=17) | {"image": None, "source": {"any": ["thing"]}},
        record("<image> and <image>", image=["a.png", "b/c.png"]) | {
            "conversations": [{"from": "system", "value": "s"}, *record("<image> <image>")["conversations"]]
        },
    ]))  # fmt: skip
    assert (first.id, second.id) == ("", "17")
    assert third.images == ("a.png", "b/c.png")
    assert third.turns[0] == Turn("system", "s")


def test_parquet(tmp_path):
    rows = [record(id=str(k)) for k in range(3000)]
    rows[1] = record("a", image=None, id="1")
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = list(read_records(path))
    assert [one.id for one in found] == [str(k) for k in range(3000)]
    assert found[0].images == ("0.png",)
    assert found[1].images == ()
    assert found[2].turns == (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."))
    rows[2]["conversations"][0]["value"] = "no image"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(Refusal, match=r"data.parquet:record 2 id=2: the number of <image>"):
        list(read_records(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Refusal, match=r"\[D-PARSE\] .*data.parquet: not a Parquet file, or a damaged one"):
        list(read_records(path))
    with pytest.raises(Refusal, match=r"\[D-FILE\]"):
        list(read_records(tmp_path / "nope.parquet"))


def test_missing_file(tmp_path):
    with pytest.raises(Refusal, match=r"\[D-FILE\] .*no such file; fix: check --data_path"):
        list(read_records(tmp_path / "nope.json"))


def test_a_record_without_end_is_refused_before_it_fills_memory(read, monkeypatch):
    monkeypatch.setattr(json_source, "LONGEST_VALUE", 10_000)
    with pytest.raises(Refusal, match="a record does not end; a quote or a bracket is missing"):
        read('[{"id": "' + "x" * 100_000, window=1000)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "long.json"
    text = json.dumps(record("<image>\n" + "word " * 400))
    path.write_text("[" + ",\n".join([text] * 4000) + "]")
    assert path.stat().st_size > 8e6
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * json_source.WINDOW


def read_pairs(raw):
    """``{"pairs": [[question, answer], ...], "photo": FILE}``"""
    turns = [(Turn("human", question), Turn("gpt", answer)) for question, answer in raw["pairs"]]
    return (raw["photo"],) if "photo" in raw else (), tuple(chain.from_iterable(turns))


def test_a_new_format_is_one_function_and_one_row(read, monkeypatch):
    row = formats.Format("pairs", ("pairs",), read_pairs)
    monkeypatch.setattr(formats, "FORMATS", (row, *formats.FORMATS))
    pairs = [["<image>\nWhat?", "A cat."], ["Sure?", "Yes."]]
    one, two = read(json.dumps([{"id": 7, "pairs": pairs, "photo": "a.png"}, record()]))
    assert (one.id, one.images, [turn.text for turn in one.turns]) == ("7", ("a.png",), [*pairs[0], *pairs[1]])
    assert two == formats.check_record(record(), 1, "data.json")
    for raw, message in [
        ({"id": 7, "pairs": []}, r"\[D-ROLE\] .*record 0 id=7:pairs: the turns are not in order; found no turns"),
        ({"pairs": pairs}, r"\[D-IMAGES\] .*record 0: the record has an <image> line but no image"),
        ({"pairs": [["\ud800", "a"]]}, r"\[D-UNICODE\] .*record 0: a lone surrogate"),
        (
            {"dialogue": []},
            r"\[D-SCHEMA\] .*record 0: unknown record format; .*; expected pairs \| conversations",
        ),
    ]:
        with pytest.raises(Refusal, match=message):
            read(json.dumps([raw]))
