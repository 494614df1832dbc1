"""The prepared data set: columns, cache key, truncation, quarantine, interruption, several processes at once."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from llava_moslora.config import DataSettings
from llava_moslora.data import cache, tokenise
from llava_moslora.data import prepare as module
from llava_moslora.data.cache import folders_of, keys_of, report_of, reports_of, summary
from llava_moslora.data.prepare import prepare
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import IGNORE_INDEX
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from support.labels import show_labels


def record(text="<image>\nWhat?", answer="A cat.", image="0.png", id="r"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


@pytest.fixture
def build(prepare_files, write_json, image_folder):
    """``build(records, ...)``: prepare them with the tiny ChatML tokenizer and 4 tokens per image."""

    def builder(records, name="data.json", **options):
        path = records if isinstance(records, os.PathLike) else write_json(records, name)
        return prepare_files(path, **{"image_folder": image_folder, "model_max_length": 200} | options)

    return builder


def test_rows(build, tiny):
    records = [
        record(id=7),
        record("hi", "ho", None, id="t"),
        record("<image><image>", "two", ["1.png", "2.png"], id="m"),
    ]
    rows = build(records)
    names = ["input_ids", "labels", "images", "shard", "record", "id", "length", "trained", "has_image", "hash"]
    assert rows.column_names == [*names, "source", "number"]
    assert rows["images"][:] == [["0.png"], [], ["1.png", "2.png"]]
    assert rows["id"][:] == ["7", "t", "m"]
    assert rows["record"][:] == [0, 1, 2]
    assert rows["has_image"][:] == [True, False, True]
    assert rows["trained"][:] == [sum(label >= 0 for label in labels) for labels in rows["labels"]]
    for row, images in zip(rows, [1, 0, 2], strict=True):
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        assert row["input_ids"].count(image_token_id(tiny("chatml"))) == 4 * images
    shown = show_labels(rows[0]["input_ids"], rows[0]["labels"], tiny("chatml"))
    assert shown == ("<|im_start|>user\n<image>×4\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n")
    report = report_of(rows)
    assert {k: report[k] for k in ("records", "kept", "with_images", "tokens")} == {
        "records": 3, "kept": 3, "with_images": 2, "tokens": sum(rows["length"])
    }  # fmt: skip
    assert report["problems"] == []


def test_cache_is_found_again_and_keyed_by_content(build, monkeypatch):
    first = build([record()])
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("the cache was not used"))
    assert build([record()])[:] == first[:]
    monkeypatch.undo()
    folder = os.path.dirname(first.cache_files[0]["filename"])
    others = [
        build([record(answer="A dog.")]),
        build([record()], tokens_per_image=5),
        build([record()], model_max_length=199),
        build([record()], template="vicuna_v1"),
    ]
    monkeypatch.setattr(cache, "CODE_VERSION", cache.CODE_VERSION + 1)
    others.append(build([record()]))
    assert len({folder, *(os.path.dirname(one.cache_files[0]["filename"]) for one in others)}) == 6


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_an_edited_chat_template_gives_another_cache(build, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("chatml"), tmp_path / "llm")

    def rows_with(chat_template):
        (folder / "chat_template.jinja").write_text(chat_template)
        return build([record()], tokenizer=load_tokenizer(folder), template="tokenizer")

    first = rows_with(CHAT)
    edited = rows_with(CHAT.replace("m['role']", "m['role'].replace('user', 'the user says')"))
    again = rows_with(CHAT)
    assert edited[0]["length"] > first[0]["length"]
    assert keys_of(edited) != keys_of(first) == keys_of(again)
    assert again[:] == first[:]


def rounds(*sizes, image_at=(0,)):
    turns = []
    for k, size in enumerate(sizes):
        turns += [{"from": "human", "value": ("<image>\n" if k in image_at else "") + "q"},
                  {"from": "gpt", "value": "x" * size}]  # fmt: skip
    return {"id": "long", "image": [f"{k}.png" for k in range(len(image_at))], "conversations": turns}


def test_truncation_drops_whole_trailing_rounds(build, tiny):
    record_ = rounds(3, 3, 3, image_at=(0, 2))
    whole = build([record_])[0]
    ends = [k + 2 for k, label in enumerate(whole["labels"]) if label == tiny("chatml").eos_token_id]
    for limit in range(ends[0], ends[2] + 1):
        rows = build([record_], model_max_length=limit)
        kept = sum(end <= limit for end in ends)
        assert rows[0]["input_ids"] == whole["input_ids"][: ends[kept - 1]]
        assert rows[0]["labels"] == whole["labels"][: ends[kept - 1]]
        assert rows[0]["images"] == (["0.png", "1.png"] if kept == 3 else ["0.png"])
        assert report_of(rows).get("turns_dropped", 0) == (kept < 3)


def test_a_single_long_round_keeps_its_question_and_some_answer(build, tiny):
    whole = build([rounds(50), record("<image>q", "a")])[0]
    first = next(k for k, label in enumerate(whole["labels"]) if label != IGNORE_INDEX)
    rows = build([rounds(50), record("<image>q", "a")], model_max_length=first + 10)
    assert rows[0]["input_ids"] == whole["input_ids"][: first + 10]
    assert rows[0]["labels"][first:] == whole["input_ids"][first : first + 10]
    assert report_of(rows)["answers_cut"] == 1


def test_a_question_that_does_not_fit_leaves_the_record_out(build, caplog):
    caplog.set_level("INFO")
    rows = build([record("q" * 300, "a", None), record(id="short")], model_max_length=100)
    assert rows["id"][:] == ["short"]
    assert rows["record"][:] == [1]
    assert report_of(rows)["left_out"] == 1
    assert "left out, too long: 1" in caplog.text
    with pytest.raises(Refusal, match=r"\[D-NONE\] .*no record is short enough: 0 optimizer steps; found 1 records"):
        build([record("q" * 300, "a", None)], model_max_length=100)


# D20: a record longer than the limit
@pytest.mark.parametrize("limit", range(20, 60))
def test_no_image_is_cut_and_no_row_is_without_labels(build, tiny, limit):
    try:
        rows = build([rounds(9, 2, image_at=(0, 1)), rounds(30)], model_max_length=limit)
    except Refusal as refusal:
        assert refusal.code == "D-NONE"
        return
    for row in rows:
        assert row["input_ids"].count(image_token_id(tiny("chatml"))) == 4 * len(row["images"])
        assert any(label != IGNORE_INDEX for label in row["labels"])
        assert len(row["input_ids"]) <= limit


@pytest.mark.parametrize("limit", [-7, -1, 0, 3, 4])
def test_a_limit_that_holds_no_image_is_refused(build, limit):
    with pytest.raises(Refusal, match=rf"C-FLAG\] --model_max_length: out of range; found {limit}; expected above 4"):
        build([record()], model_max_length=limit)
    if limit > 0:  # text needs no room for an image
        assert len(build([record("hi", "ho", None)], image_folder=None, model_max_length=40)) == 1
    else:
        with pytest.raises(Refusal, match=rf"--model_max_length: out of range; found {limit}; expected at least 1"):
            build([record("hi", "ho", None)], image_folder=None, model_max_length=limit)


def test_a_limit_above_the_llms_positions_is_refused(build):
    long = [record("q" * 80, "a", None)]
    assert len(build(long, model_max_length=100, longest_text=100)) == 1
    what = r"C-FLAG\] --model_max_length: longer than the LLM's context; found 101; expected at most 100 .*fix: "
    with pytest.raises(Refusal, match=what + "--model_max_length 100, or"):
        build(long, model_max_length=101, longest_text=100)


BAD = [
    record(id=0),
    record(id=1, image="nope.png"),
    record(id=2, answer=" "),
    record(id=3),
    record(id=4, text="no tag"),
]


@pytest.mark.parametrize("processes", [1, 2])
def test_fail_policy_looks_at_everything_first(build, caplog, tmp_path, processes):
    with pytest.raises(
        Refusal, match=r"\[I-MISSING\] .*nope.png:record 1 id=1.* \(and 2 more of 5 records cannot be used\)"
    ):
        build(BAD, preprocessing_num_workers=processes)
    assert "record 1 id=1" not in caplog.text  # it is the refusal
    for what in ("record 2 id=2", "record 4 id=4"):
        assert caplog.text.count(what) == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.suffix != ".staging"]
    with pytest.raises(Refusal, match=r"nope.png:record 1 id=1:image: there is no such image; found nope.png"):
        build(BAD[:2])


def test_a_mended_image_is_looked_at_again(build, image_folder):
    with pytest.raises(Refusal, match="I-MISSING"):
        build([record(image="late.png")])
    (image_folder / "late.png").write_bytes((image_folder / "0.png").read_bytes())
    assert len(build([record(image="late.png")])) == 1


def test_quarantine(build, caplog):
    rows = build(BAD, on_bad_record="quarantine", max_bad_share=0.6)
    assert rows["record"][:] == [0, 3]
    report = report_of(rows)
    assert [problem["refusal"]["record"] for problem in report["problems"]] == [1, 2, 4]
    assert [problem["refusal"]["code"] for problem in report["problems"]] == ["I-MISSING", "D-EMPTY", "D-IMAGES"]
    assert caplog.text.count("record 1 id=1") == caplog.text.count("record 4 id=4") == 1
    with pytest.raises(Refusal, match=r"2 more of 5 .*more than the share of 0.5 allowed by --max_bad_share"):
        build(BAD, on_bad_record="quarantine", max_bad_share=0.5)
    with pytest.raises(Refusal, match=r"\[C-FLAG\] --on_bad_record: unknown value; found skip; expected fail"):
        build(BAD, on_bad_record="skip")


def test_bad_records_are_counted_also_from_the_cache(build, caplog):
    """What is kept and what is left out add up to the records, whichever run says it."""
    records = [record(id=str(k), image="0.png" if k % 2 else "nope.png") for k in range(42)]
    quarantine = {"on_bad_record": "quarantine", "max_bad_share": 0.5}
    for logged in (True, False):
        caplog.clear()
        rows = build(records, **quarantine)
        report = folders_of(rows)[0] / "report.json"
        assert f"bad records of {reports_of(rows)[0]['file']}: 21, listed in {report}" in summary(rows).splitlines()
        assert "data: records: 42  kept: 21  " in summary(rows) and "  left out, bad: 21" in summary(rows)
        assert (f"and 1 more; all are listed in {report}" in caplog.text) == logged
    assert "left out" not in summary(build(records[1::2]))


def test_a_bad_record_names_the_way_without_it(build):
    with pytest.raises(Refusal, match=r"or to train without bad records: --on_bad_record quarantine$"):
        build([record(id=str(k), image="0.png" if k else "nope.png") for k in range(100)])
    with pytest.raises(Refusal, match=r"bad records: --on_bad_record quarantine --max_bad_share 0.34$"):
        build([record(id=str(k), image="0.png" if k else "nope.png") for k in range(3)])
    with pytest.raises(Refusal) as refusal:  # nothing would be left
        build([record(image="nope.png")])
    assert "quarantine" not in str(refusal.value)


def test_a_refused_name_of_an_image_names_the_data_file(build, image_folder, tmp_path):
    names = [str(image_folder / "0.png"), "1.png"]
    records = [record(image=name, id=str(k)) for k, name in enumerate(names)]
    assert build(records)["images"][:] == [[name] for name in names]
    other = shutil.copytree(image_folder, tmp_path / "others")
    message = r"I-PATH\] {}:record 0 id=0:image: an absolute path outside --image_folder; found {}"
    with pytest.raises(Refusal, match=message.format(tmp_path / "data.json", names[0])):
        build(records, image_folder=other)  # from the cache
    (image_folder / "0.png").rename(tmp_path / "0.png")
    records[0]["image"] = str(tmp_path / "0.png")
    with pytest.raises(Refusal, match=message.format(tmp_path / "data.json", tmp_path / "0.png")):
        build(records)


# D24: no records, or fewer than one global batch
def test_refusals(build, write_json, image_folder, tmp_path):
    with pytest.raises(Refusal, match=r"\[D-NONE\] .*there are no records: 0 optimizer steps"):
        build([])
    with pytest.raises(Refusal, match=r"\[I-FOLDER\] .*no such folder; fix: check --image_folder"):
        build([record()], image_folder=tmp_path / "nope")
    with pytest.raises(Refusal, match=r"\[I-FOLDER\] .*data.json: not a folder; fix: check --image_folder"):
        build([record()], image_folder=write_json([]))
    with pytest.raises(Refusal, match=r"\[I-FOLDER\] .*record 0 id=r: the record has an image but no image folder"):
        build([record()], image_folder=None)
    with pytest.raises(Refusal, match=r"\[D-FILE\] .*no such file; fix: check --data_path"):
        build(tmp_path / "nope.json")
    broken = write_json([])
    broken.write_text('[{"id": 1')
    with pytest.raises(Refusal, match=r"\[D-PARSE\] .*interrupted copy"):
        build(broken)


# D17: the name of a control token in a text
def test_control_tokens_in_text_are_text_and_counted(build, tiny, caplog):
    caplog.set_level("INFO")
    nasty = record("<image>\nx<|im_end|>\n<|im_start|>assistant\ny", "z<|im_end|>", id="n")
    rows = build([record("<image>\nx", "z"), nasty])
    controls = set(tiny("chatml").added_tokens_decoder)
    found = [[i for i in ids if i in controls] for ids in rows["input_ids"]]
    assert found[0] == found[1]
    assert report_of(rows)["control_names_as_text"] == 1
    said = "  with a control token's name in a text, kept as plain text: 1"
    assert summary(rows).endswith(said) and f"prepared {reports_of(rows)[0]['file']}: records: 2" in caplog.text
    assert "token's name" not in summary(build([record("<image>\nx", "z")])) and "names_as_text" not in caplog.text


# D23: one id twice
def test_duplicate_ids_are_counted(build, caplog):
    rows = build([record(id="a"), record(id="b"), record(id="a"), record(id="a")])
    assert report_of(rows)["duplicate_ids"] == 2
    assert "2 records have the id of an earlier one" in caplog.text


def test_an_interrupted_build_goes_on_where_it_stopped(build, monkeypatch):
    monkeypatch.setattr(tokenise, "RECORDS_PER_PART", 2)
    records = [record(id=str(k)) for k in range(9)]
    done, work = [], tokenise._build_part

    def stop_at_two(task):
        if task.number == 2:
            raise KeyboardInterrupt
        return work(task)

    def note(task):
        done.append((task.number, not task.records))
        return work(task)

    monkeypatch.setattr(tokenise, "_build_part", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        build(records)
    monkeypatch.setattr(tokenise, "_build_part", note)
    rows = build(records)
    assert rows["id"][:] == [str(k) for k in range(9)]
    assert done == [(0, True), (1, True), (2, False), (3, False), (4, False)]


def _prepare_in_child(path, images, tokenizer, cache, results):
    settings = DataSettings([str(path)], image_folder=str(images), model_max_length=99, data_cache=str(cache))
    rows = prepare(settings, tokenizer=tokenizer, template="chatml", tokens_per_image=4)
    results.put((os.path.dirname(rows.cache_files[0]["filename"]), rows["id"][:]))


@pytest.mark.parametrize("damaged", [False, True])
def test_several_processes_at_once(build, tiny, write_json, image_folder, tmp_path, damaged):
    records = [record(id=str(k)) for k in range(300)]
    path = write_json(records)
    if damaged:
        flip(Path(build(records, model_max_length=99).cache_files[0]["filename"]))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (path, image_folder, tiny("chatml"), tmp_path / "cache", results)
    children = [context.Process(target=_prepare_in_child, args=arguments) for _ in range(4)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len({folder for folder, _ in found}) == 1
    assert all(ids == [str(k) for k in range(300)] for _, ids in found)
    assert not list((tmp_path / "cache").glob("*.staging"))


def test_a_part_may_end_up_empty(build, monkeypatch):
    monkeypatch.setattr(tokenise, "RECORDS_PER_PART", 1)
    rows = build([record("q" * 300, "a", None), record(id="a"), record("q" * 300, "a", None)], model_max_length=100)
    assert rows["id"][:] == ["a"]


def test_good_parts_of_another_image_folder_are_checked_again(build, monkeypatch, image_folder, tmp_path):
    monkeypatch.setattr(tokenise, "RECORDS_PER_PART", 1)
    (tmp_path / "others").mkdir()
    (tmp_path / "others/x.png").write_bytes((image_folder / "0.png").read_bytes())
    records = [record(image="0.png"), record(image="x.png")]
    with pytest.raises(Refusal, match=r"x.png:record 1"):
        build(records)
    with pytest.raises(Refusal, match=r"0.png:record 0"):
        build(records, image_folder=tmp_path / "others")


def test_a_finished_cache_is_checked_in_another_image_folder_once(build, monkeypatch, image_folder, tmp_path):
    records = [record(image="0.png"), record(image="1.png"), record(image="2.png")]
    rows = build(records)
    other = tmp_path / "others"
    other.mkdir()
    (other / "1.png").write_bytes((image_folder / "1.png").read_bytes())
    with pytest.raises(Refusal, match=r"0.png:record 0.*no such image \(and 1 more images cannot be used\)"):
        build(records, image_folder=other)
    for name in ("0.png", "2.png"):
        (other / name).write_bytes((image_folder / name).read_bytes())
    assert build(records, image_folder=other)[:] == rows[:]
    monkeypatch.setattr("llava_moslora.data.prepare.check_image", None)
    assert build(records, image_folder=other)[:] == rows[:]


def test_a_quarantined_image_is_looked_at_again(build, image_folder, tmp_path):
    records = [record(image="late.png", id="0"), *(record(id=str(k)) for k in range(1, 9))]
    quarantine = {"on_bad_record": "quarantine", "max_bad_share": 0.2}
    without = build(records, **quarantine)
    assert without["id"][0] == "1"
    assert keys_of(build(records, **quarantine)) == keys_of(without)
    (image_folder / "late.png").write_bytes((image_folder / "0.png").read_bytes())
    rows = build(records)  # under the policy "fail"
    assert rows["id"][:] == [str(k) for k in range(9)]
    assert build(records, **quarantine)[:] == rows[:]
    assert keys_of(rows) != keys_of(without)  # other rows: a resumed run must notice
    assert report_of(rows)["problems"] == []


def test_only_parts_with_problems_are_built_again(build, monkeypatch, image_folder):
    monkeypatch.setattr(tokenise, "RECORDS_PER_PART", 2)
    records = [record(id=str(k), image="late.png" if k == 3 else "0.png") for k in range(9)]
    build(records, on_bad_record="quarantine", max_bad_share=0.2)
    (image_folder / "late.png").write_bytes((image_folder / "0.png").read_bytes())
    seen, check = [], tokenise.check_record
    monkeypatch.setattr(
        tokenise, "check_record", lambda raw, index, *rest: seen.append(index) or check(raw, index, *rest)
    )
    assert build(records)["id"][:] == [str(k) for k in range(9)]
    assert seen == [2, 3]


def test_an_image_that_is_missing_in_another_folder_is_told_of_that_folder(build, image_folder, tmp_path):
    records = [record(image="late.png", id="0"), *(record(id=str(k)) for k in range(1, 9))]
    build(records, on_bad_record="quarantine", max_bad_share=0.2)
    other = shutil.copytree(image_folder, tmp_path / "others")
    for _ in range(2):
        with pytest.raises(Refusal, match=rf"{other}/late.png:record 0 id=0:image: there is no such image"):
            build(records, image_folder=other)
    with pytest.raises(Refusal, match=rf"{image_folder}/late.png:record 0 id=0:image: there is no such image"):
        build(records)
    (other / "late.png").write_bytes((image_folder / "0.png").read_bytes())
    assert len(build(records, image_folder=other)) == 9
    with pytest.raises(Refusal, match=rf"{image_folder}/late.png:record 0"):  # here it is still missing
        build(records)
    assert len(build(records, image_folder=other)) == 9


def test_images_missing_in_another_folder_only_are_quarantined_there(build, image_folder, tmp_path):
    records = [record(image=f"{k % 4}.png", id=str(k)) for k in range(8)]
    quarantine = {"on_bad_record": "quarantine", "max_bad_share": 0.3}
    whole = build(records, **quarantine)
    other = shutil.copytree(image_folder, tmp_path / "others")
    (other / "2.png").unlink()
    rows = build(records, image_folder=other, **quarantine)
    assert rows["id"][:] == ["0", "1", "3", "4", "5", "7"]
    assert build(records, **quarantine)[:] == whole[:]


def test_a_cache_with_images_needs_the_image_folder(build):
    build([record()])
    with pytest.raises(Refusal, match=r"I-FOLDER\] .*no image folder was given; fix: give --image_folder"):
        build([record()], image_folder=None)


def flip(path, at=-200):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda arrow, report: os.truncate(arrow, arrow.stat().st_size // 2),
    "empty": lambda arrow, report: os.truncate(arrow, 0),
    "zeros": lambda arrow, report: arrow.write_bytes(bytes(arrow.stat().st_size)),
    "gone": lambda arrow, report: arrow.unlink(),
    "one bit": lambda arrow, report: flip(arrow),
    "a part too many": lambda arrow, report: shutil.copy(arrow, arrow.with_name("000009.arrow")),
    "no report": lambda arrow, report: report.unlink(),
    "an empty report": lambda arrow, report: os.truncate(report, 0),
    "a report of {}": lambda arrow, report: report.write_text("{}"),
    "a report of []": lambda arrow, report: report.write_text("[]"),
    "another number": lambda arrow, report: report.write_text(report.read_text().replace('"kept": 5', '"kept": 6')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_again(build, monkeypatch, caplog, damage):
    monkeypatch.setattr(tokenise, "RECORDS_PER_PART", 2)
    records = [record(id=str(k)) for k in range(5)]
    rows = build(records)
    before, folder = rows[:], Path(rows.cache_files[0]["filename"]).parent
    DAMAGE[damage](folder / "000001.arrow", folder / "report.json")
    assert build(records)[:] == before
    assert "rebuilding its data cache" in caplog.text
    caplog.clear()
    assert build(records)[:] == before
    assert not caplog.text
    assert report_of(rows)["kept"] == 5
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


UNFINISHED = {
    "its count empty": lambda part: os.truncate(part.with_suffix(".json"), 0),
    "its count cut": lambda part: os.truncate(part.with_suffix(".json"), 20),
    "its count changed": lambda part: part.with_suffix(".json").write_text('{"counts": {}}'),
    "its rows gone": lambda part: part.with_suffix(".arrow").unlink(),
    "its rows cut": lambda part: os.truncate(part.with_suffix(".arrow"), 100),
    "its rows changed": lambda part: flip(part.with_suffix(".arrow")),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("damage", UNFINISHED)
def test_a_damaged_part_of_an_unfinished_build_is_built_again(build, monkeypatch, tmp_path, damage, processes):
    monkeypatch.setattr(tokenise, "RECORDS_PER_PART", 2)
    records, work = [record(id=str(k)) for k in range(9)], tokenise._build_part

    def stop_at_three(task):
        if task.number == 3:
            raise KeyboardInterrupt
        return work(task)

    monkeypatch.setattr(tokenise, "_build_part", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        build(records)
    monkeypatch.setattr(tokenise, "_build_part", work)
    (staging,) = (tmp_path / "cache").glob("*.staging")
    UNFINISHED[damage](staging / "000001")
    rows = build(records, preprocessing_num_workers=processes)
    assert rows["id"][:] == [str(k) for k in range(9)]
    assert report_of(rows)["kept"] == len(rows) == 9


def test_everything_is_on_the_disk_before_it_counts(build, monkeypatch):
    """Each file is synced before the rename that gives it its name, its folder before the folder's own."""
    synced, renamed, fsync, replace, rename = [], [], os.fsync, os.replace, os.rename

    def note_fsync(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(real):
        def call(source, target):
            renamed.append((os.path.basename(source), os.path.basename(target)))
            assert os.path.basename(source) in synced, f"{source} was not synced before it was renamed"
            real(source, target)

        return call

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_rename(replace))
    monkeypatch.setattr(os, "rename", note_rename(rename))
    build([record()])
    assert [target for _, target in renamed][:3] == ["000000.arrow", "000000.json", "report.json"]
    assert renamed[-1][0].endswith(".staging") and synced[-1] == "cache"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocessing_num_workers": 0}, r"--preprocessing_num_workers: out of range; found 0; expected at least 1"),
        ({"max_bad_share": float("nan")}, r"--max_bad_share: out of range; found nan; expected 0 to 1"),
        ({"max_bad_share": -1}, r"--max_bad_share: out of range; found -1; expected 0 to 1"),
    ],
)
def test_numbers_out_of_range(build, options, message):
    with pytest.raises(Refusal, match=message):
        build([record()], **options)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_cache_that_cannot_be_written(build, monkeypatch, error, call, processes):
    def fail(*arguments, **options):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched, pytest.raises(Refusal) as refusal:
        patched.setattr(os, call, fail)
        build([record(id=str(k)) for k in range(3)], preprocessing_num_workers=processes)
    assert (refusal.value.code, refusal.value.key) == ("E-DISK", "--data_cache")
    assert refusal.value.found == os.strerror(error)
    assert len(build([record(id=str(k)) for k in range(3)])) == 3


def test_a_file_in_place_of_the_cache(build, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(
        Refusal, match=r"E-DISK\] .*cache:--data_cache: the data cache cannot be used; found File exists"
    ):
        build([record()])


def test_a_cache_or_data_file_that_cannot_be_read(build, monkeypatch):
    rows = build([record()])
    arrow, real = Path(rows.cache_files[0]["filename"]), io.open

    def refuse(which):
        def open_(file, *arguments, **options):
            if Path(file) == which:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return real(file, *arguments, **options)

        return open_

    with monkeypatch.context() as patched:
        patched.setattr(io, "open", refuse(arrow))
        with pytest.raises(
            Refusal, match=rf"E-DISK\] {arrow}:--data_cache: .* cannot be used; found Permission denied"
        ):
            build([record()])
    data = Path(report_of_first(rows)["file"])
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", refuse(data))
        with pytest.raises(Refusal, match=rf"D-FILE\] {data}: the file cannot be read; found Permission denied"):
            build([record()])
    assert build([record()])[:] == rows[:]


def report_of_first(rows):
    return json.loads((Path(rows.cache_files[0]["filename"]).parent / "report.json").read_text())


def test_a_killed_worker_is_told(build, monkeypatch):
    monkeypatch.setattr(tokenise._Worker, "_row", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Refusal, match=r"E-WORKER\] .*a process that tokenises was killed; .*fewer processes"):
        build([record()], preprocessing_num_workers=2)
    monkeypatch.undo()
    assert len(build([record()], preprocessing_num_workers=2)) == 1


def test_many_workers_keep_the_order(build, monkeypatch):
    monkeypatch.setattr(tokenise, "RECORDS_PER_PART", 3)
    rows = build([record(id=str(k)) for k in range(50)], preprocessing_num_workers=3)
    assert rows["id"][:] == [str(k) for k in range(50)]
    assert json.loads(json.dumps(report_of(rows)))["kept"] == 50
