"""Data sets of the datasets library: folders, the Hub (a stub: nothing is downloaded in a test), columns of images."""

import shutil
import socket
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Image, List, Value
from PIL import Image as Pillow

from llava_moslora.data.cache import keys_of, summary
from llava_moslora.data.collate import Collator
from llava_moslora.data.formats import read_records
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.sources import parquet, saved_dataset
from llava_moslora.data.sources.source import Source, container_of
from llava_moslora.errors import Refusal

TRANSFORM = ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3)
TURNS = List({"role": Value("string"), "content": Value("string")})


def record(k, images=1, answer="A cat."):
    turns = [
        {"role": "user", "content": "<image>" * images + f"What is {k}?"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": str(k), "messages": turns, "images": [f"{(k + n) % 4}.png" for n in range(images)]}


RECORDS = [record(k, images=k % 3) for k in range(12)]


@pytest.fixture
def with_images(image_folder):
    """``with_images(records)``: a data set that holds the images."""

    def make(records):
        features = datasets.Features(
            {"id": Value("string"), "messages": TURNS, "images": List(Image()), "score": Value("float32")}
        )
        rows = [
            one | {"images": [{"bytes": (image_folder / n).read_bytes(), "path": None} for n in one["images"]]}
            for one in records
        ]
        return datasets.Dataset.from_list([row | {"score": None} for row in rows], features=features)

    return make


def same_rows(rows, expected):
    names = ("input_ids", "labels", "id", "length", "trained", "has_image", "number")
    return all(rows[name][:] == expected[name][:] for name in names)


def batch(rows, folder):
    return Collator(0, folder, TRANSFORM)(list(rows))["pixel_values"]


def test_a_folder_with_images(with_images, prepare_files, write_json, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_dataset, "ROWS_WITH_IMAGES", 5)
    with_images(RECORDS).save_to_disk(tmp_path / "saved", num_shards=3)
    rows = prepare_files(tmp_path / "saved", preprocessing_num_workers=2)
    plain = prepare_files(write_json(RECORDS), image_folder)
    assert same_rows(rows, plain) and "saved: messages\n" in summary(rows)
    assert torch.equal(batch(rows, None), batch(plain, image_folder))
    assert Source(str(tmp_path / "saved")).is_sharded
    with_images(RECORDS[:4]).save_to_disk(tmp_path / "saved")  # written again: read again, in this process too
    again = prepare_files(tmp_path / "saved")
    assert len(again) == 4 and keys_of(again) != keys_of(rows)
    assert torch.equal(batch(again, None), batch(list(plain)[:4], image_folder))
    with pytest.raises(Refusal, match=r"\[I-(CHANGED|MISSING)\] .*saved:"):
        batch(rows, None)
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(
        Refusal, match=r"\[I-MISSING\] .*saved:0:record 1 id=1:image: the image cannot be read from its"
    ):
        batch(again, None)


def test_a_folder_with_names_of_images(prepare_files, write_json, image_folder, tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "names [v1]")
    rows = prepare_files(tmp_path / "names [v1]", image_folder)
    plain = prepare_files(write_json(RECORDS), image_folder)
    assert not Source(str(tmp_path / "names [v1]")).is_sharded
    assert same_rows(rows, plain) and rows["images"][:] == plain["images"][:]
    assert len(list(read_records(tmp_path / "names [v1]"))) == 12


def test_folders_that_are_no_data_set(with_images, prepare_files, tmp_path):
    datasets.DatasetDict({name: with_images(RECORDS) for name in ("test", "train")}).save_to_disk(tmp_path / "all")
    with pytest.raises(
        Refusal, match=r"D-FILE\] .*all:--data_path: .* splits .*; fix: name one of them: \S*all/test or"
    ):
        prepare_files(tmp_path / "all")
    assert len(prepare_files(tmp_path / "all" / "train")) == 12
    with pytest.raises(
        Refusal, match=r"D-FILE\] .*:--data_path: a folder that is not a saved data set; expected state"
    ):
        prepare_files(tmp_path)
    arrow = next((tmp_path / "all" / "test").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(Refusal, match=r"D-PARSE\] .*test: a damaged data set; found .*; fix: save it again"):
        prepare_files(tmp_path / "all" / "test")


def test_the_hub_only_where_it_is_named(with_images, prepare_files, write_json, image_folder, tmp_path, monkeypatch):
    with_images(RECORDS).save_to_disk(tmp_path / "downloaded")
    asked = []

    def load(path, name, **options):
        asked.append((path, name, options["revision"], options["split"]))
        return datasets.load_from_disk(str(tmp_path / "downloaded"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = prepare_files("hub:owner/cats/small@v1.0:validation")
    assert set(asked) == {("owner/cats", "small", "v1.0", "validation")}
    plain = prepare_files(write_json(RECORDS), image_folder)
    assert same_rows(rows, plain) and torch.equal(batch(rows, None), batch(plain, image_folder))
    asked.clear()
    prepare_files("hub:owner/cats")
    assert set(asked) == {("owner/cats", None, None, "train")}
    asked.clear()
    with pytest.raises(Refusal, match=r"\[D-FILE\] owner/cats: there is no such file"):
        prepare_files("owner/cats")
    assert not asked
    with pytest.raises(
        Refusal, match=r"\[D-HUB\] hub:cats:--data_path: not the name of a data set on the Hub; expected hub:OWNER/N"
    ):
        prepare_files("hub:cats")


def test_without_a_network_the_hub_is_refused_in_one_line(prepare_files, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    saved_dataset._load_from_hub.cache_clear()
    with pytest.raises(
        Refusal, match=r"\[D-HUB\] hub:owner/never-was: the Hub's data set cannot be read; found \w+: .*"
    ):
        prepare_files("hub:owner/never-was")


def test_images_that_are_only_named_are_refused(prepare_files, tmp_path, image_folder):
    rows = [record(0) | {"images": [{"bytes": None, "path": "0.png"}]},
            record(1) | {"images": [{"bytes": (image_folder / "1.png").read_bytes(), "path": "1.png"}]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(Refusal, match=r"I-MISSING\] .*a\.parquet:record 0 id=0:image: an image name without the bytes"):
        prepare_files(tmp_path / "a.parquet")


def test_other_columns_of_images(prepare_files, write_json, image_folder, tmp_path):
    """Of two columns of images the mapped one is read; images are found in whichever columns there are."""
    images = [{"bytes": (image_folder / f"{k}.png").read_bytes(), "path": f"{k}.png"} for k in range(4)]
    rows = [record(k) | {"images": None, "mask": images[3], "pics": [images[k]]} for k in range(3)]
    table_ = pa.Table.from_pylist(rows).select(["id", "messages", "mask", "pics"])
    pq.write_table(table_, tmp_path / "a.parquet")
    rows = prepare_files(tmp_path / "a.parquet", data_columns=["images=pics"])
    plain = prepare_files(write_json([record(k) for k in range(3)]), image_folder)
    assert same_rows(rows, plain) and torch.equal(batch(rows, None), batch(plain, image_folder))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_memory_does_not_grow_with_the_images(with_images, image_folder, tmp_path, monkeypatch, kind):
    """Of 38 MB of images, in row groups of 10 MB, 8 are in memory at a time, and one row group."""
    monkeypatch.setattr(parquet if kind == "parquet" else saved_dataset, "ROWS_WITH_IMAGES", 8)
    noise = np.random.default_rng(0).integers(0, 256, (330, 300, 3), dtype=np.uint8)
    for k in range(4):
        Pillow.fromarray(noise + k).save(image_folder / f"{k}.png", compress_level=0)
    data, file = with_images([record(k) for k in range(128)]), str(tmp_path / f"images.{kind}")
    data.to_parquet(file, batch_size=32) if kind == "parquet" else data.save_to_disk(file)
    del data
    before, allocated = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    numbers = []
    for raw in container_of(file).read(file, lambda data, name: None):
        numbers.append(len(raw.images))
        allocated = max(allocated, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == [1] * 128
    assert peak < 15e6 and allocated < 12e6
