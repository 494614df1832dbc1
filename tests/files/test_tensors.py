"""Weights in files: every layout gives the same tensors, and every way to be incomplete is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import read_tensor_file, read_tensor_folder

TENSORS = {f"t{n}": torch.arange(6.0).view(2, 3) + n for n in range(4)}


def write(folder, kind: str, shards: int):
    folder.mkdir()
    save = save_file if kind == ".safetensors" else torch.save
    stem = "model" if kind == ".safetensors" else "pytorch_model"
    if shards == 1:
        save(TENSORS, folder / f"{stem}{kind}")
        return folder
    weight_map = {}
    for n in range(shards):
        file = f"{stem}-{n + 1:05d}-of-{shards:05d}{kind}"
        part = {name: TENSORS[name] for name in list(TENSORS)[n::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


KINDS = pytest.mark.parametrize("kind", [".safetensors", ".bin"])


@KINDS
@pytest.mark.parametrize("shards", [1, 2])
def test_every_layout(tmp_path, kind, shards):
    found = read_tensor_folder(write(tmp_path / "m", kind, shards))
    assert found.keys() == TENSORS.keys()
    for name, stored in found.items():
        assert stored.shape == (2, 3) and stored.file.suffix == kind
        assert torch.equal(stored.read(), TENSORS[name])


def test_torch_files_of_old_and_wrapped(tmp_path):
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": TENSORS, "meta": {}}, tmp_path / "wrapped.pth")
    for file in tmp_path.iterdir():
        assert torch.equal(read_tensor_file(file)["t3"].read(), TENSORS["t3"])


def refused(folder) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_tensor_folder(folder)
    assert caught.value.fix and "\n" not in caught.value.line()
    return caught.value


# K1: a missing shard
# K2: a truncated safetensors file
@KINDS
def test_a_missing_a_truncated_and_an_emptied_shard(tmp_path, kind):
    folder = write(tmp_path / "m", kind, 2)
    shard = sorted(folder.glob(f"*{kind}"))[1]
    content = shard.read_bytes()
    for size in (len(content) - 1, 20, 0):
        shard.write_bytes(content[:size])
        assert (refused(folder).code, refused(folder).file) == ("K-DAMAGED", shard)
    shard.unlink()
    assert (refused(folder).code, refused(folder).file) == ("K-MISSING", shard)


@KINDS
def test_a_surplus_shard(tmp_path, kind):
    folder = write(tmp_path / "m", kind, 2)
    first = sorted(folder.glob(f"*{kind}"))[0]
    surplus = first.with_name(first.name.replace("00001-of-00002", "00003-of-00003"))
    surplus.write_bytes(first.read_bytes())
    assert (refused(folder).code, refused(folder).file) == ("K-KEYS", surplus)


@KINDS
def test_index_and_shards_disagree(tmp_path, kind):
    folder = write(tmp_path / "m", kind, 2)
    index = next(folder.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))
    for changed, file, key in [
        (weight_map | {"t9": first}, first, "t9"),
        (weight_map | {"t0": second}, first, "t0"),
        ({k: v for k, v in weight_map.items() if k != "t1"}, second, "t1"),
    ]:
        index.write_text(json.dumps({"weight_map": changed}))
        refusal = refused(folder)
        assert (refusal.code, refusal.file, refusal.key) == ("K-KEYS", folder / file, key)
    for content in ('{"weight_map": 3}', "[]", "{", '{"weight_map": {"t0": 1}}'):
        index.write_text(content)
        assert (refused(folder).code, refused(folder).file) == ("K-JSON", index)


def test_no_weights(tmp_path):
    (tmp_path / "README.md").write_text("")
    assert (refused(tmp_path).code, refused(tmp_path).found) == ("K-MISSING", "README.md")


def test_a_file_that_is_no_dictionary(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    assert refused(tmp_path).code == "K-DAMAGED"


def _odd(folder: Path) -> dict:
    """What a torch file may hold next to tensors, and tensors that weights cannot be."""
    return {
        7: torch.zeros(2),
        ("a", "b"): torch.zeros(2),
        "note": "text",
        "sparse": torch.eye(3).to_sparse(),
        "nowhere": torch.zeros(2, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    }


def test_odd_names_and_tensors_of_a_torch_file_are_left_out(tmp_path):
    torch.save(TENSORS | _odd(tmp_path), tmp_path / "x.bin")
    assert read_tensor_file(tmp_path / "x.bin").keys() == TENSORS.keys()
    with pytest.raises(Refusal, match=r"K-DAMAGED\] .*x.bin: not a file of named tensors; found .*and 3 more"):
        read_tensor_file(tmp_path / "x.bin", only_tensors=True)


def test_a_dtype_that_torch_cannot_read_is_named(tmp_path):
    header = json.dumps({"t0": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    (stored,) = read_tensor_folder(tmp_path).values()
    with pytest.raises(Refusal, match=r"K-DAMAGED\] .*model.safetensors:t0: a tensor that cannot be read; found .*F6"):
        stored.read()
