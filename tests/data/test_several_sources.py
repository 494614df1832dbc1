"""Several data files in one call: rows one after the other, weights, records that are kept apart, decoding."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llava_moslora.config import DataSettings
from llava_moslora.data.cache import keys_of, report_of, reports_of
from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.report import data_report, write_report
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.errors import Refusal

TRANSFORM = ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3)


def record(text="<image>\nWhat?", answer="A cat.", image="0.png", id="r"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


@pytest.fixture
def files(tmp_path):
    """JSON, JSONL and Parquet, with 6, 5 and 4 records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = {"a": 6, "b": 5, "c": 4}
    records = [record(id=f"{name}{k}", answer=name * (k + 1)) for name, n in sizes.items() for k in range(n)]
    (tmp_path / "a.json").write_text(json.dumps(records[:6]))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records[6:11])))
    pq.write_table(pa.Table.from_pylist(records[11:]), tmp_path / "c.parquet")
    return [tmp_path / name for name in ("a.json", "b.jsonl", "c.parquet")]


@pytest.fixture
def build(prepare_files, image_folder):
    def builder(sources, **options):
        return prepare_files(sources, image_folder, **{"model_max_length": 60} | options)

    return builder


def test_rows_of_all_files_in_order(build, files):
    rows = build(files)
    assert rows["id"][:] == [f"a{k}" for k in range(6)] + [f"b{k}" for k in range(5)] + [f"c{k}" for k in range(4)]
    assert rows["source"][:] == [0] * 6 + [1] * 5 + [2] * 4
    assert rows["record"][:] == [*range(6), *range(5), *range(4)]
    assert rows["number"][:] == list(range(15))
    assert rows["input_ids"][6:11] == build(files[1])["input_ids"][:]
    assert report_of(rows)["records"] == 15 and [one["records"] for one in reports_of(rows)] == [6, 5, 4]
    assert len(keys_of(rows)) == 3 and keys_of(rows)[1] == keys_of(build(files[1]))[0]  # a cache per file


def test_records_are_counted_through_also_where_some_are_left_out(build, files, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([record("q" * 300, "a", None), record(id="kept"), record(id="last")]))
    rows = build([tmp_path / "x.json", files[2]])
    assert rows["record"][:] == [1, 2, 0, 1, 2, 3]
    assert rows["number"][:] == [1, 2, 3, 4, 5, 6]


def sampled(rows, weights, **options):
    sampler = GlobalBatchSampler(
        rows["length"][:], rows["has_image"][:], per_device_batch_size=2, source=rows["source"][:], weights=weights,
        **options,
    )  # fmt: skip
    return sampler, np.asarray(rows["source"][:])[sampler.epoch_order()[: sampler.records_per_epoch]]


def test_weights_say_how_often_a_file_is_seen(build, files):
    sampler, seen = sampled(build(files), [1, 0.4, 2])
    assert np.bincount(seen).tolist() == [6, 2, 8]
    assert sampler.global_batches == 8
    assert np.bincount(sampled(build(files), None)[1]).tolist() == [6, 5, 4]


@pytest.mark.parametrize(("weights", "message"), [
    ([1, 2], "as many weights as data files are needed; found 2; expected 3; fix: one weight per file of --data_path"),
    ([1, 0, 1], "not a weight; found 0; expected a number above 0; .*omit a file that you do not want"),
    ([1, -1, 1], "not a weight; found -1"),
    ([1, float("nan"), 1], "not a weight; found nan"),
    ([1, float("inf"), 1], "not a weight; found inf"),
])  # fmt: skip
def test_refused_weights(build, files, weights, message):
    with pytest.raises(Refusal, match=rf"\[C-ORDER\] --data_weights: {message}"):
        sampled(build(files), weights)
    with pytest.raises(Refusal, match=r"\[C-ORDER\] --data_group: not a number of batches; found 0"):
        sampled(build(files), None, group=0)


def test_the_same_data_twice_is_refused(build, files):
    copy = files[0].with_name("again.json")
    copy.write_bytes(files[0].read_bytes())
    with pytest.raises(Refusal, match=r"\[D-TWICE\] .*again\.json: the same data as .*a\.json; fix: .*--data_weights"):
        build([*files, copy])


def test_a_broken_image_is_named_with_its_file(build, files, image_folder):
    rows = build(files)
    collate = Collator(0, image_folder, TRANSFORM, data_files=tuple(map(str, files)))
    assert collate([rows[7]])["record"].tolist() == [7]
    (image_folder / "0.png").write_bytes((image_folder / "0.png").read_bytes()[:60])
    with pytest.raises(Refusal, match=r"\[I-DECODE\] .*0\.png:record 1 id=b1 of .*b\.jsonl:image: the image is"):
        collate([rows[7]])


def test_a_bad_record_in_the_second_file(build, files):
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    rows[3]["conversations"][1]["value"] = " "
    files[1].write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(Refusal, match=r"\[D-EMPTY\] .*b\.jsonl:record 3 id=b3:conversations\[1\]\.value: the gpt turn"):
        build(files)
    assert len(build(files, on_bad_record="quarantine", max_bad_share=0.3)) == 14


def test_report_of_several_files(build, files, tiny, image_folder, tmp_path):
    rows = build(files)
    settings = DataSettings(list(map(str, files)), image_folder=str(image_folder))
    report = data_report(rows, settings=replace(settings, data_weights=[1, 0.4, 2], data_group=2), batch_size=2)
    assert [(os.path.basename(one["file"]), one["records"], one["seen_per_epoch"]) for one in report["files"]] == [
        ("a.json", 6, 6), ("b.jsonl", 5, 2), ("c.parquet", 4, 8)
    ]  # fmt: skip
    page = write_report(tmp_path / "r", rows, settings=settings, tokenizer=tiny("chatml"), batch_size=2).read_text()
    assert "seen per epoch" in page and "record 1 · b1 · b.jsonl" in page


@pytest.fixture
def cut(image_folder):
    """An image whose header is good and whose end is missing."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    noise.save(image_folder / "cut.png")
    whole = (image_folder / "cut.png").read_bytes()
    (image_folder / "cut.png").write_bytes(whole[:-300])
    return whole


def test_decoding_finds_what_a_header_hides(build, write_json, image_folder, cut):
    path = write_json([record(), record(image="cut.png", id="c")])
    assert len(build(path)) == 2  # by its header it is an image
    with pytest.raises(Refusal, match=r"\[I-DECODE\] .*cut\.png:record 1 id=c:image: the image is damaged"):
        build(path, decode_images=True)
    assert len(build(path)) == 2  # the cache that was there is untouched
    assert build(path, decode_images=True, on_bad_record="quarantine", max_bad_share=0.5)["id"][:] == ["r"]


def test_a_decoded_cache_serves_both(build, write_json, image_folder, cut):
    path = write_json([record(), record(image="cut.png", id="c")])
    (image_folder / "cut.png").write_bytes(cut)
    headers = keys_of(build(path))
    rows = build(path, decode_images=True)
    assert len(rows) == 2 and keys_of(rows) == headers and reports_of(rows)[0]["decoded"]
    (image_folder / "cut.png").unlink()  # not opened again
    assert len(build(path, decode_images=True)) == len(build(path)) == 2
