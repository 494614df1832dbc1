"""Records and images out of tar and Parquet shards: the same rows and pixels as from plain files, or a refusal."""

import gzip
import io
import json
import os
import tarfile

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from llava_moslora.config import DataSettings
from llava_moslora.data.cache import content_digest, keys_of, report_of
from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.report import data_report
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.data.sources import parquet, tar
from llava_moslora.data.sources.container import ImageRef
from llava_moslora.data.sources.source import Source
from llava_moslora.errors import Refusal


def record(text="<image>\nWhat?", answer="A cat.", image="0.png", id="r"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


TRANSFORM = ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3)
RECORDS = [
    record("<image>\nWhat?", "A cat. " * (k % 5 + 1), f"{k % 4}.png", f"r{k}")
    if k % 3
    else record("hello", "yes " * (k + 1), None, f"r{k}")
    for k in range(20)
]
RECORDS[4] = record("<image><image>", "two", ["1.png", "3.png"], "r4")


def write_tar(path, records, images, *, records_last=True, lines=True):
    """``images``: name → bytes."""
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    members = [*images.items(), ("records.jsonl" if lines else "a/records.json", text.encode())]
    with fsspec.open(str(path), "wb") as file, tarfile.open(fileobj=file, mode="w|") as archive:
        for name, data in members if records_last else members[::-1]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path, records, images, group=3):
    """As ``datasets`` stores images."""
    rows = []
    for one in records:
        names = one.get("image", [])
        names = [names] if isinstance(names, str) else names
        rows.append(one | {"image": [{"bytes": images[name], "path": name} for name in names]})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture
def images(image_folder):
    return {path.name: path.read_bytes() for path in image_folder.iterdir()}


@pytest.fixture
def build(prepare_files):
    def builder(source, folder=None, **options):
        return prepare_files(source, folder, **{"model_max_length": 60} | options)

    return builder


def batches_of(rows, folder=None, world=1, rank=0, start=0, **options):
    sampler = GlobalBatchSampler(
        rows["length"][:],
        rows["has_image"][:],
        per_device_batch_size=4 // world,
        world_size=world,
        rank=rank,
        **options,
    )
    sampler.start_at(start)
    collate = Collator(0, folder, TRANSFORM)
    return [collate([rows[k] for k in batch]) for batch in sampler]


def same(a, b):
    return len(a) == len(b) and all(
        one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        for one, two in zip(a, b, strict=True)
    )


@pytest.fixture
def plain(build, write_json, image_folder):
    rows = build(write_json(RECORDS), image_folder)
    return rows, batches_of(rows, image_folder)


@pytest.fixture(params=["tar", "tar, records first", "parquet", "memory://"])
def sharded(request, tmp_path, images):
    """Three shards of the same records, and how to name them."""
    kind = request.param
    for number, start in enumerate((0, 7, 13)):
        part = RECORDS[start : (7, 13, 20)[number]]
        if kind == "parquet":
            write_parquet(tmp_path / f"mix-{number}.parquet", part, images)
        elif kind == "memory://":
            write_tar(f"memory://bucket{tmp_path}/mix-{number}.tar", part, images)
        else:
            write_tar(tmp_path / f"mix-{number}.tar", part, images, records_last=kind == "tar", lines=number > 0)
    if kind == "memory://":
        return f"memory://bucket{tmp_path}/mix-*.tar"
    return str(tmp_path / f"mix-*.{kind[:7].split(',')[0]}")


def test_rows_order_and_pixels_are_those_of_plain_files(build, plain, sharded):
    rows = build(sharded)
    for name in ("input_ids", "labels", "id", "length", "trained", "has_image", "number"):
        assert rows[name][:] == plain[0][name][:], name
    assert rows["record"][:] == [*range(7), *range(6), *range(7)]  # counted in the shard, as refusals name them
    assert same(batches_of(rows), plain[1])


def test_resumed_anywhere_on_any_number_of_ranks(build, plain, sharded):
    rows = build(sharded)
    for start in range(6):
        assert same(batches_of(rows, start=start), plain[1][start:])
    first, second = (batches_of(rows, world=2, rank=rank) for rank in (0, 1))
    for one, two, whole in zip(first, second, plain[1], strict=True):
        assert torch.stack([one["record"], two["record"]], 1).flatten().tolist() == whole["record"].tolist()


def test_several_processes_and_a_second_call(build, plain, sharded):
    if sharded.startswith("memory"):
        pytest.skip("memory of this process")
    rows = build(sharded, preprocessing_num_workers=2)
    assert rows["input_ids"][:] == plain[0]["input_ids"][:]
    assert keys_of(build(sharded)) == keys_of(rows)


def test_what_datasets_writes(build, plain, tmp_path, images):
    features = datasets.Features({
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    })  # fmt: skip
    one_image = [k for k, one in enumerate(RECORDS) if not isinstance(one.get("image"), list)]
    chosen = [RECORDS[k] for k in one_image]
    content = [one | {"image": {"bytes": images[one["image"]], "path": None} if "image" in one else None}
               for one in chosen]  # fmt: skip
    datasets.Dataset.from_list(content, features=features).to_parquet(tmp_path / "hub.parquet")
    rows = build(tmp_path / "hub.parquet")
    assert rows["input_ids"][:] == [plain[0]["input_ids"][k] for k in one_image]
    collate = Collator(0, None, TRANSFORM)
    assert collate([rows[1]])["pixel_values"].shape == (1, 3, 8, 8)


BAD = {
    "D-EMPTY": (record(answer=" "), {}, r"s\.tar:record 1 id=r:conversations\[1\].value: the gpt turn is empty"),
    "D-IMAGES": (record("no tag"), {}, r"s\.tar:record 1 id=r: the number of <image> in the human turns differs"),
    "I-MISSING": (record(image="../0.png"), {}, r"s\.tar:record 1 id=r:image: the shard has no such image; found"),
    "I-FORMAT": (record(image="x.png"), {"x.png": b"GIF?"}, r"s\.tar:x\.png:record 1 id=r:image: not an image"),
    "I-SIZE": (record(image="big.png"), {"big.png": b"0" * 5000}, r"big\.png:record 1 id=r:image: .* too large"),
}  # fmt: skip


@pytest.mark.parametrize("code", BAD)
def test_the_same_checks_per_record(build, tmp_path, images, code, monkeypatch):
    monkeypatch.setattr(tar, "LARGEST_IMAGE", 4000)
    bad, more, message = BAD[code]
    write_tar(tmp_path / "s.tar", [record(), bad, record(id="z")], images | more)
    with pytest.raises(Refusal, match=message) as refusal:
        build(tmp_path / "s.tar")
    assert refusal.value.code == code
    rows = build(tmp_path / "s.tar", on_bad_record="quarantine", max_bad_share=0.5)
    assert rows["id"][:] == ["r", "z"] and rows["number"][:] == [0, 2]
    assert report_of(rows)["problems"][0]["refusal"]["record"] == 1


def test_decoding_is_offered_here_too(build, tmp_path, images):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    noise.save(buffer := io.BytesIO(), "PNG")
    write_tar(tmp_path / "s.tar", [record(image="cut.png")], {"cut.png": buffer.getvalue()[:-200]})
    assert len(build(tmp_path / "s.tar")) == 1
    with pytest.raises(Refusal, match=r"\[I-DECODE\] .*cut\.png:record 0 id=r:image: the image is damaged"):
        build(tmp_path / "s.tar", decode_images=True)


def test_a_tar_of_one_record_with_columns_of_other_names(build, tmp_path, images):
    one = record(id="one")
    write_tar(tmp_path / "s.tar", [{"dialog": one.pop("conversations")} | one], images)
    assert build(tmp_path / "s.tar", data_columns=["conversations=dialog"])["id"] == ["one"]


def test_a_shard_that_changed_is_not_trained_on(build, tmp_path, images):
    write_tar(tmp_path / "s.tar", [record()], images)
    rows = build(tmp_path / "s.tar")
    place = ImageRef.parse(rows[0]["images"][0])
    assert str(place) == rows[0]["images"][0] and place.name == "0.png"
    content = bytearray((tmp_path / "s.tar").read_bytes())
    content[place.at[0] + 30] ^= 1
    (tmp_path / "s.tar").write_bytes(content)
    collate = Collator(0, None, TRANSFORM)
    with pytest.raises(Refusal, match=r"\[I-CHANGED\] .*s\.tar:0\.png:record 0 id=r:image: the shard changed after"):
        collate([rows[0]])
    (tmp_path / "s.tar").unlink()
    with pytest.raises(Refusal, match=r"\[I-MISSING\] .*s\.tar:0\.png:record 0 id=r:image: .*cannot be read"):
        collate([rows[0]])


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_copies_of_a_shard_have_the_same_content(build, tmp_path, images, write):
    """As on two hosts: elsewhere, and copied at another time."""
    digests, keys = [], []
    for host, records in (
        ("a", RECORDS),
        ("b", RECORDS),
        ("c", RECORDS[::-1]),
        ("d", [*RECORDS[:-1], record(answer="Yes.")]),
    ):
        (tmp_path / host).mkdir()
        shard = write(tmp_path / host / f"mix.{'tar' if write is write_tar else 'parquet'}", records, images)
        os.utime(shard, (ord(host), ord(host)))
        rows = build(shard)
        digests.append(content_digest(rows, np.arange(len(rows))))
        keys += keys_of(rows)
    assert digests[0] == digests[1] and len(set(digests)) == 3 and len(set(keys)) == 4
    assert content_digest(rows, np.arange(len(rows) - 1)) != digests[-1]


def test_what_cannot_be_read_by_position_is_refused(build, tmp_path, images, monkeypatch):
    whole = write_tar(tmp_path / "s.tar", [record()], images).read_bytes()
    (tmp_path / "z.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(Refusal, match=r"\[D-PARSE\] .*z\.tar: not a complete uncompressed tar file.*gunzip"):
        build(tmp_path / "z.tar")
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("data.json")
        member.pax_headers = {"GNU.sparse.map": "x"}
        archive.addfile(member)
    with pytest.raises(Refusal, match=r"\[D-PARSE\] .*sparse\.tar"):
        build(tmp_path / "sparse.tar")
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    with pytest.raises(Refusal, match=r"\[D-PARSE\] .*cut\.tar"):
        build(tmp_path / "cut.tar")
    write_parquet(tmp_path / "p.parquet", [record()], images)
    monkeypatch.setattr(parquet, "LARGEST_ROW_GROUP", 10)
    with pytest.raises(Refusal, match=r"\[D-SHARD\] .*p\.parquet:row group 0: .*smaller row_group_size"):
        build(tmp_path / "p.parquet")


def test_refused_sources(build, tmp_path, images):
    with pytest.raises(Refusal, match=r"\[D-FILE\] .*nope-\*\.tar: there is no such file; fix: check --data_path"):
        build(str(tmp_path / "nope-*.tar"))
    with pytest.raises(
        Refusal, match=r"\[D-FILE\] nowhere://x\.tar: the storage cannot be reached; found Protocol not"
    ):
        build("nowhere://x.tar")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(Refusal, match=r"\[D-SHARD\] .*a\.json: not a shard; .*name plain data files one by one"):
        build(str(tmp_path / "a*"))
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            member = tarfile.TarInfo("0.png")
            member.size = len(images["0.png"])
            archive.addfile(member, io.BytesIO(images["0.png"]))
    with pytest.raises(Refusal, match=r"^error\[D-SHARD\] .*two members have the same name; found 0\.png"):
        build(tmp_path / "twice.tar")
    (tmp_path / "half.parquet").write_bytes(write_parquet(tmp_path / "p.parquet", [record()], images).read_bytes()[:-9])
    with pytest.raises(Refusal, match=r"\[D-PARSE\] .*half\.parquet: not a Parquet file"):
        build(str(tmp_path / "hal*.parquet"))


def test_links_and_devices_in_a_tar_are_not_followed(build, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        data = json.dumps(record()).encode()
        member = tarfile.TarInfo("r.json")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with pytest.raises(Refusal, match=r"\[I-MISSING\] .*the shard has no such image; found 0\.png"):
        build(tmp_path / "s.tar")


def test_which_sources_are_shards(tmp_path, images):
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.Table.from_pylist([record()]), plain)
    packed = write_parquet(tmp_path / "packed.parquet", [record()], images)
    names = [str(plain), str(packed), "a.json", "b.tar", "s3://b/c.json", "x/*.parquet"]
    assert [Source(name).is_sharded for name in names] == [
        False, True, False, True, True, True,
    ]  # fmt: skip
    assert Source(str(packed)).shards == [str(packed)]


@pytest.mark.parametrize("folder", ["data [v2]", "what?", "all*", "[ab]/c"])
def test_an_existing_file_is_a_file_whatever_its_folders_name(build, tmp_path, image_folder, images, folder):
    place = tmp_path / folder
    place.mkdir(parents=True)
    (place / "train.json").write_text(json.dumps([record()]))
    (place / "lines [1].jsonl").write_text(json.dumps(record(id="l")))
    for file in (place / "train.json", place / "lines [1].jsonl"):
        assert not Source(str(file)).is_sharded
        assert build(file, image_folder)["images"][:] == [["0.png"]]
    pq.write_table(pa.Table.from_pylist([record(id="p")]), place / "plain.parquet")
    assert not Source(str(place / "plain.parquet")).is_sharded
    tars = [str(write_tar(place / f"{name}.tar", [record(id=name)], images)) for name in ("s-1", "s-2")]
    assert Source(tars[0]).is_sharded and Source(tars[0]).shards == tars[:1]
    assert Source(str(place / "s-*.tar")).shards == tars
    assert build(place / "s-*.tar")["id"][:] == ["s-1", "s-2"]
    write_parquet(place / "p.parquet", [record(id="q")], images)
    assert build(place / "p.parquet")["id"][:] == ["q"]


def test_patterns_over_folders_still_are_patterns(tmp_path, images):
    for name in ("a1", "a2"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "s.tar", [record()], images)
    expected = [str(tmp_path / name / "s.tar") for name in ("a1", "a2")]
    assert Source(str(tmp_path / "a[12]/*.tar")).shards == Source(str(tmp_path / "a*/s.tar")).shards == expected


def test_report_names_the_images_folders(build, tmp_path, images):
    write_tar(
        tmp_path / "s.tar", [record(image="coco/0.png"), record("a", image=None)], {"coco/0.png": images["0.png"]}
    )
    rows = build(tmp_path / "s.tar")
    report = data_report(rows, settings=DataSettings([str(tmp_path / "s.tar")]), batch_size=2)
    assert set(report["sources"]) == {"coco", "text"}
