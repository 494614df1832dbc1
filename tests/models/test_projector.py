import pytest
import torch
from safetensors.torch import save_file

from llava_moslora.errors import Refusal
from llava_moslora.models.projector import KEYS, LAYOUTS, read_projector

E, D = 6, 10


def tensors(prefix: str, linears: tuple[str, str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": [(D, E), (D, D)], "bias": [(D,), (D,)]}
    return {
        f"{prefix}{linear}.{part}": torch.randn(shapes[part][i], generator=generator)
        for i, linear in enumerate(linears)
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("prefix", LAYOUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".wrapped.pth"])
def test_every_layout_reads_the_same(tmp_path, prefix, suffix):
    linears = LAYOUTS[prefix]
    content = tensors(prefix, linears)
    others = {"lm_head.weight": torch.zeros(2)}
    file = tmp_path / f"projector{suffix}"
    if suffix == ".safetensors":
        save_file(content | others, file)
    else:
        torch.save(
            {"state_dict": content | others, "meta": {"epoch": 1}} if "wrapped" in suffix else content | others, file
        )
    read = read_projector(file, E, D)
    assert tuple(read) == KEYS
    for here, there in zip(("linear_1", "linear_2"), linears, strict=True):
        for part in ("weight", "bias"):
            assert torch.equal(read[f"{here}.{part}"], content[f"{prefix}{there}.{part}"])


def test_folder_and_file_are_the_same(tmp_path):
    save_file(tensors("model.", ("0", "2")), tmp_path / "model.safetensors")
    folder, file = read_projector(tmp_path, E, D), read_projector(tmp_path / "model.safetensors", E, D)
    assert all(torch.equal(folder[k], file[k]) for k in KEYS)


def test_other_towers_are_named(tmp_path):
    file = tmp_path / "p.safetensors"
    save_file(tensors("model.", ("0", "2")), file)
    with pytest.raises(Refusal, match=r"p\.safetensors:model\.0\.weight.*found \[10, 6\]; expected \[10, 8\]"):
        read_projector(file, 8, D)
    with pytest.raises(Refusal, match=r"expected \[12, 6\] \(vision width 6, LLM width 12\)"):
        read_projector(file, E, 12)


def test_no_matching_key_is_an_error(tmp_path):
    file = tmp_path / "p.safetensors"
    save_file({"unrelated.weight": torch.zeros(2)}, file)
    with pytest.raises(Refusal, match=r"no projector in this file; found unrelated\.weight"):
        read_projector(file, E, D)


def test_missing_and_surplus_tensors_are_named(tmp_path):
    content = tensors("mm_projector.", ("0", "2"))
    del content["mm_projector.2.bias"]
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(Refusal, match=r"mm_projector\.2\.bias"):
        read_projector(tmp_path / "a.safetensors", E, D)
    content = tensors("mm_projector.", ("0", "2")) | {"mm_projector.4.weight": torch.zeros(D, D)}
    save_file(content, tmp_path / "b.safetensors")
    with pytest.raises(Refusal, match=r"unexpected mm_projector\.4\.weight"):
        read_projector(tmp_path / "b.safetensors", E, D)


def test_nan_is_refused(tmp_path):
    content = tensors("", ("0", "2"))
    content["0.weight"][0, 0] = float("nan")
    save_file(content, tmp_path / "p.safetensors")
    with pytest.raises(Refusal, match="NaN or Inf"):
        read_projector(tmp_path / "p.safetensors", E, D)


def test_truncated_safetensors_is_named(tmp_path):
    file = tmp_path / "p.safetensors"
    save_file(tensors("model.", ("0", "2")), file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Refusal, match=r"p\.safetensors: not a whole safetensors file"):
        read_projector(file, E, D)


class Payload:
    def __reduce__(self):
        return eval, ("open('SENTINEL', 'w').close()",)


def test_pickled_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.0.weight": Payload()}, tmp_path / "p.pth")
    with pytest.raises(Refusal, match="cannot be read as plain tensors"):
        read_projector(tmp_path / "p.pth", E, D)
    assert not (tmp_path / "SENTINEL").exists()


@pytest.mark.parametrize("name", ["nowhere", "nowhere.bin"])
def test_missing_path_is_named(tmp_path, name):
    with pytest.raises(Refusal, match=rf"{name}.*--pretrain_mm_mlp_adapter: no such file or folder"):
        read_projector(tmp_path / name, E, D)


def test_folder_without_projector(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"no projector file in this folder; found config\.json"):
        read_projector(tmp_path, E, D)
