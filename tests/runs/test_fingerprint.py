"""What identifies the base of a run."""

import json

import pytest

from llava_moslora.runs.fingerprint import fingerprint


# K7: an adapter of another base
def test_models_of_one_shape_have_different_fingerprints(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(300_000))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "other")
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.seek(150_000)
        file.write(b"another")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")
    assert json.dumps(fingerprint(tmp_path / "one"))


@pytest.mark.parametrize("place", ["user@host/llm", "plain/llm", "open_clip@home/llm"])
def test_a_fingerprint_does_not_depend_on_the_path(tmp_path, place):
    """Homes below a path with @ are usual where accounts are user@domain."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    hashes = fingerprint(folder)
    assert list(hashes) == ["model.safetensors"]
    folder.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == hashes
    assert fingerprint(f"open_clip:{tmp_path / 'moved'}") == hashes
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"Weights")
    assert fingerprint(tmp_path / "moved") != hashes


def test_an_open_clip_tower_is_its_file(tmp_path):
    (tmp_path / "user@host").mkdir()
    file = tmp_path / "user@host" / "vit.safetensors"
    file.write_bytes(b"weights")
    hashes = fingerprint(f"open_clip:ViT-B-32@{file}")
    assert list(hashes) == ["vit.safetensors"] and hashes == fingerprint(file)
    assert fingerprint("open_clip:ViT-B-32@openai") == {"name": "open_clip:ViT-B-32@openai"}
