"""Which records are validation data: a share chosen by content, files of their own, or both."""

import json
from pathlib import Path

import numpy as np
import pytest

from llava_moslora.config import DataSettings
from llava_moslora.data.prepare import prepare
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.data.split import eval_files, set_names, validation_data
from llava_moslora.errors import Refusal


def record(number: int, **more) -> dict:
    question, answer = f"what is {number} and {number + 1}?", f"yes {number}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", "conversations": turns, **more}


@pytest.fixture
def write(tmp_path):
    def write(name: str, records: list[dict]) -> str:
        (tmp_path / name).write_text(json.dumps(records))
        return str(tmp_path / name)

    return write


@pytest.fixture
def parted(tiny, tmp_path):
    """``parted(data_path, …)``: the trained rows' ids, and the ids of each validation set."""

    def parted(*data_path: str, tokenizer: str = "chatml", template: str = "chatml", seed: int = 0, **settings):
        settings = DataSettings(list(data_path), data_cache=str(tmp_path / "cache"), **settings)

        def prepared(settings):
            return prepare(settings, tokenizer=tiny(tokenizer), template=template, tokens_per_image=4)

        dataset = prepared(settings)
        trained, validation, keys = validation_data(dataset, settings, prepared, seed=seed)
        sampler = GlobalBatchSampler.of(dataset, settings, per_device_batch_size=2, records=trained)
        seen = {dataset[int(row)]["id"] for row in sampler.epoch_order()}
        assert seen == {dataset[int(row)]["id"] for row in trained}
        sets = {} if validation is None else validation.sets
        ids = {name: [validation.dataset[int(row)]["id"] for row in rows] for name, rows in sets.items()}
        for name, rows in sets.items():  # a refusal about one of them names its file
            file = Path(validation.files[validation.dataset[int(rows[0])]["source"]])
            assert set(ids[name]) <= {record["id"] for record in json.loads(file.read_text())}
        return [dataset[int(row)]["id"] for row in trained], ids, keys

    return parted


def test_adding_removing_and_reordering_records_moves_none(parted, write):
    few = [record(n) for n in range(0, 400)]
    more = [record(n) for n in range(600)]
    np.random.default_rng(0).shuffle(more)
    trained, sets, keys = parted(write("a.json", few), validation_split=0.1)
    later, other, others = parted(write("a.json", [r for r in more if r["id"] != "r7"]), validation_split=0.1)
    assert set(trained) - {"r7"} <= set(later) and set(sets["a"]) - {"r7"} <= set(other["a"])
    assert parted(write("a.json", few), validation_split=0.1) == (trained, sets, keys)
    assert keys.keys() == {"data", "validation"} and keys != others


def test_a_share_is_that_share_and_part_of_a_larger_one(parted, write):
    file = write("a.json", [record(n) for n in range(3000)])
    small, large = (set(parted(file, validation_split=share)[1]["a"]) for share in (0.01, 0.2))
    assert small < large
    for found, share in ((small, 0.01), (large, 0.2)):  # within four standard deviations of a fair draw
        assert abs(len(found) - 3000 * share) < 4 * (3000 * share * (1 - share)) ** 0.5


def test_neither_tokenizer_template_length_nor_id_moves_a_record(parted, write):
    """And copies of a record are on one side."""
    records = [record(n) for n in range(200)]
    file = write("a.json", records)
    expected = parted(file, validation_split=0.2)[:2]
    assert parted(file, validation_split=0.2, tokenizer="llama3", template="llama3")[:2] == expected
    more = [{"from": "human", "value": "red " * 40}, {"from": "gpt", "value": "yes"}]
    long = write("a.json", [{**one, "conversations": [*one["conversations"], *more]} for one in records])
    cut = parted(long, validation_split=0.2, model_max_length=60)[:2]
    assert parted(long, validation_split=0.2)[:2] == cut != expected
    copies = write("b.json", [*records, *({**one, "id": f"copy of {one['id']}"} for one in records)])
    trained, sets, _ = parted(copies, validation_split=0.2)
    assert {name.removeprefix("copy of ") for name in trained} == set(expected[0])
    assert len(sets["b"]) == 2 * len(expected[1]["a"])


def test_a_record_in_another_format_is_on_the_same_side(parted, write):
    records = [record(n) for n in range(100)]
    names = {"human": "user", "gpt": "assistant"}
    messages = [
        {"id": one["id"], "messages": [{"role": names[t["from"]], "content": t["value"]} for t in one["conversations"]]}
        for one in records
    ]
    expected = parted(write("a.json", records), validation_split=0.2)
    assert parted(write("a.json", messages), validation_split=0.2)[:2] == expected[:2]


def test_sources_are_split_each_and_weights_are_of_what_is_trained(parted, write):
    a, b = (write(name, [record(n) for n in rows]) for name, rows in (("a.json", range(50)), ("b.json", range(50, 99))))
    trained, sets, _ = parted(a, b, validation_split=0.2, data_weights=[2, 1], data_order="shuffle")
    assert {int(name[1:]) < 50 for name in sets["a"]} == {True} and {int(name[1:]) < 50 for name in sets["b"]} == {
        False
    }
    assert sorted([*trained, *sets["a"], *sets["b"]]) == sorted(f"r{n}" for n in range(99))


def test_files_of_their_own_and_a_split(parted, write):
    file = write("a.json", [record(n) for n in range(50)])
    own = [write("b.json", [record(n) for n in range(60, 70)]), f"ocr={write('c.json', [record(80)])}"]
    trained, sets, keys = parted(file, eval_data_path=own)
    assert len(trained) == 50 and list(sets) == ["b", "ocr"] and sets["ocr"] == ["r80"]
    assert sets["b"] == [f"r{n}" for n in range(60, 70)] and len(keys["validation"]) == 2
    assert list(parted(file, eval_data_path=own[:1], validation_split=0.2)[1]) == ["a", "b"]
    assert parted(file)[1:] == ({}, {"data": parted(file, eval_data_path=own)[2]["data"]})  # keys as without


def test_names_of_validation_sets(tmp_path):
    def names(data=("x/train.json",), split=0.0, **settings):
        return set_names(DataSettings(list(data), validation_split=split, **settings))

    assert names() == [] and names(split=0.1) == ["train"]
    assert names(["x/train.json", "y/train.json", "z.json"], 0.1) == ["train_1", "train_2", "z"]
    assert names(eval_data_path=["val/coco val.json", "ocr=o.json", "mix/*.tar"]) == ["coco_val", "ocr", "mix"]
    (tmp_path / "a=b.json").touch()  # an existing file is a file
    assert eval_files(DataSettings(["t"], eval_data_path=[f"{tmp_path}/a=b.json"])).keys() == {"a_b"}
    with pytest.raises(Refusal, match=r"--eval_data_path: duplicate validation set name; found a/v.json and b/v.json"):
        names(eval_data_path=["a/v.json", "b/v.json"])
    with pytest.raises(Refusal, match=r"found train; fix: name it: --eval_data_path train_eval=v/train.json"):
        names(split=0.1, eval_data_path=["v/train.json"])


def test_what_cannot_be_validation_data(parted, write):
    file = write("a.json", [record(n) for n in range(20)])
    with pytest.raises(
        Refusal, match=r"D-NONE.*a.json:--validation_split: 0 of its 20 records fall into .*found 0.001"
    ):
        parted(file, validation_split=0.001)
    with pytest.raises(Refusal, match=r"D-TWICE.*a.json: validation data that are also training data"):
        parted(file, eval_data_path=[f"v={file}"])
    with pytest.raises(Refusal, match=r"D-FILE.*nope.json: there is no such file; fix: check --eval_data_path"):
        parted(file, eval_data_path=["nope.json"])


def test_shares_of_a_seed_are_nested_and_another_seed_draws_others(parted, write):
    a, b = write("a.json", [record(n) for n in range(400)]), write("b.json", [record(n) for n in range(400, 500)])
    shares = (0.125, 0.25, 0.5, 0.75, 1.0)
    sets = [set(parted(a, b, data_share=share, seed=3)[0]) for share in shares]
    assert [len(one) for one in sets] == [50 + 12, 100 + 25, 200 + 50, 300 + 75, 500]
    assert sets[0] < sets[1] < sets[2] < sets[3] < sets[4]
    other = set(parted(a, b, data_share=0.5, seed=4)[0])
    assert len(other) == 250 and 100 < len(other & sets[2]) < 150  # as chance has it: 125 ± 4 · 7.9 / 2
    backwards = write("c.json", [record(n) for n in reversed(range(400))])
    assert set(parted(backwards, data_share=0.25, seed=3)[0]) == {one for one in sets[1] if int(one[1:]) < 400}


def test_a_share_leaves_the_validation_data_alone_and_is_in_the_fingerprint(parted, write):
    file = write("a.json", [record(n) for n in range(1000)])
    whole, sets, keys = parted(file, validation_split=0.1)
    part, same, others = parted(file, validation_split=0.1, data_share=0.1)
    assert same == sets and len(part) == round(0.1 * len(whole)) and set(part) < set(whole)
    assert others["validation"] == keys["validation"] and others["data"] != keys["data"]


def test_a_share_out_of_range_or_of_too_few(parted, write):
    file = write("a.json", [record(n) for n in range(20)])
    with pytest.raises(Refusal, match=r"D-NONE.*a.json:--data_share: none of its 20 records is in the share"):
        parted(file, data_share=0.02)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(Refusal, match=r"C-FLAG\] --data_share: out of range; found .*; expected a share above 0"):
            DataSettings(["a.json"], data_share=share)
