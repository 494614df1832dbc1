"""A container that is new to the package: one class, one row."""

import json
import zipfile
from collections.abc import Iterator

import pytest
import torch

from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.prepare import keys_of
from llava_moslora.data.sources import source
from llava_moslora.data.sources.container import CheckedImage, CheckImage, Container, RawRecord, open_file
from llava_moslora.errors import Refusal

TRANSFORM = ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3)


class Zip(Container):
    """``records.json`` and its images; an image is found by its number among the members."""

    suffixes = (".zip",)
    can_hold_images = True
    contents = "zip files of records and images"

    def read(self, file: str, check: CheckImage | None) -> Iterator[RawRecord]:
        with open_file(file) as stream, zipfile.ZipFile(stream) as archive:
            images = {
                name: CheckedImage.of(archive.read(name), file, name, (number, 0, 0), check)
                for number, name in enumerate(archive.namelist())
                if name != "records.json"
            }
            for value in json.loads(archive.read("records.json")):
                yield RawRecord(value, images=images)

    def read_image(self, file: str, at: tuple[int, int, int]) -> bytes:
        with open_file(file) as stream, zipfile.ZipFile(stream) as archive:
            return archive.read(archive.namelist()[at[0]])


def write_zip(path, records, images):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in images.items():
            archive.writestr(name, data)
        archive.writestr("records.json", json.dumps(records))
    return path


RECORDS = [
    {
        "id": str(k),
        "image": f"{k % 4}.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat " * (k + 1)}],
    }
    for k in range(6)
]


@pytest.fixture
def zips(monkeypatch, tmp_path, image_folder):
    monkeypatch.setattr(source, "CONTAINERS", (Zip(), *source.CONTAINERS))
    images = {path.name: path.read_bytes() for path in image_folder.iterdir()}
    write_zip(tmp_path / "mix-0.zip", RECORDS[:4], images)
    write_zip(tmp_path / "mix-1.zip", RECORDS[4:], images | {"bad.png": b"GIF?"})
    return tmp_path


def test_rows_and_pixels_are_those_of_plain_files(zips, prepare_files, write_json, image_folder):
    plain, zipped = prepare_files(write_json(RECORDS), image_folder), prepare_files(zips / "mix-*.zip")
    for name in ("input_ids", "labels", "id", "length", "trained", "has_image", "number"):
        assert zipped[name][:] == plain[name][:], name
    batches = [Collator(0, image_folder, TRANSFORM)(list(rows)) for rows in (plain, zipped)]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert keys_of(prepare_files(zips / "mix-*.zip")) == keys_of(zipped)


def test_its_records_and_images_are_checked(zips, prepare_files):
    write_zip(zips / "bad.zip", [RECORDS[0], RECORDS[1] | {"image": "bad.png"}], {"0.png": b"", "bad.png": b"GIF?"})
    with pytest.raises(Refusal, match=r"\[I-FORMAT\] .*bad\.zip:0\.png:record 0 id=0:image: the file is empty"):
        prepare_files(zips / "bad.zip")


def test_files_without_images_have_no_image(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(NotImplementedError, match="Json files hold no images"):
        source.container_of("a.json").read_image("a.json", (0, 0, 0))
    assert list(source.container_of("a.json").read(str(tmp_path / "a.json"), None)) == []


def test_a_file_with_images_inside_is_no_plain_data_file(zips):
    with pytest.raises(Refusal, match=r"\[D-SHARD\] .*mix-0\.zip: the images are inside this file"):
        source.read_raw_records(str(zips / "mix-0.zip"))
