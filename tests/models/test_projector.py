import json
import sys
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from llava_moslora.errors import Refusal
from llava_moslora.models.projector import KEYS, PREFIXES, read_projector
from support.mmengine_log import save_with_log

E, D = 6, 10


def tensors(prefix: str, linears: tuple[str, str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": [(D, E), (D, D)], "bias": [(D,), (D,)]}
    return {
        f"{prefix}{linear}.{part}": torch.randn(shapes[part][i], generator=generator)
        for i, linear in enumerate(linears)
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".wrapped.pth"])
def test_every_layout_reads_the_same(tmp_path, prefix, suffix):
    linears = PREFIXES[prefix]
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


# K8: a projector of another shape
def test_other_towers_are_named(tmp_path):
    file = tmp_path / "p.safetensors"
    save_file(tensors("model.", ("0", "2")), file)
    with pytest.raises(Refusal, match=r"p\.safetensors:model\.0\.weight.*found \[10, 6\]; expected \[10, 8\]"):
        read_projector(file, 8, D)
    with pytest.raises(Refusal, match=r"expected \[12, 6\] \(vision width 6, LLM width 12\)"):
        read_projector(file, E, 12)


# K8: a projector of another shape
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
    with pytest.raises(Refusal, match=r"p\.safetensors: not a complete safetensors file"):
        read_projector(file, E, D)


class Payload:
    def __reduce__(self):
        return eval, ("open('SENTINEL', 'w').close()",)


# K5: a pickle with code
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


def test_deepspeed_directory(tmp_path):
    """Under DeepSpeed XTuner's ``iter_N.pth`` is a folder, the model's tensors behind ``module``."""
    folder = tmp_path / "iter_2181.pth"
    folder.mkdir()
    content = tensors("projector.model.", ("0", "2"))
    state = {"module": OrderedDict(content), "buffer_names": [], "param_shapes": [{"a": torch.Size([2])}], "mp": {1, 2}}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    read = read_projector(folder, E, D)
    assert torch.equal(read["linear_2.weight"], content["projector.model.2.weight"])
    (folder / "mp_rank_00_model_states.pt").rename(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(Refusal, match=r"iter_2181\.pth: DeepSpeed's ZeRO-3 folder.*fix: .*zero_to_fp32\.py"):
        read_projector(folder, E, D)


def test_the_trainers_log_next_to_the_weights_is_no_obstacle(tmp_path):
    """mmengine stores its log as objects of a class of its own; it is neither imported nor needed."""
    content = tensors("projector.model.", ("0", "2"))
    save_with_log(content, tmp_path / "iter_2181.pth")
    read = read_projector(tmp_path / "iter_2181.pth", E, D)
    assert torch.equal(read["linear_1.weight"], content["projector.model.0.weight"])
    assert "mmengine" not in sys.modules
    torch.save({"state_dict": content, "hook": Payload()}, tmp_path / "other.pth")
    with pytest.raises(Refusal, match="cannot be read as plain tensors"):
        read_projector(tmp_path / "other.pth", E, D)


def test_non_lora_trainables_of_a_llava_run(tmp_path):
    """LLaVA's LoRA training: adapter, projector and the whole model's configuration in one folder."""
    content = tensors("base_model.model.model.mm_projector.", ("0", "2"))
    torch.save(content, tmp_path / "non_lora_trainables.bin")
    config = {"architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "non_lora_trainables.bin"):
        read = read_projector(path, E, D)
        assert torch.equal(read["linear_1.bias"], content["base_model.model.model.mm_projector.0.bias"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    with pytest.raises(Refusal, match=r"config\.json:mm_projector_type: .*found linear; expected mlp2x_gelu"):
        read_projector(tmp_path, E, D)


XTUNER = {"model_type": "projector", "bias": True, "depth": 2, "hidden_act": "gelu", "auto_map": {"AutoModel": "m.P"}}


@pytest.mark.parametrize(
    ("key", "value"),
    [("depth", 3), ("hidden_act", "relu"), ("bias", False), ("visual_hidden_size", 7), ("llm_hidden_size", 11)],
)
def test_xtuner_configuration_is_checked(tmp_path, key, value):
    save_file(tensors("model.", ("0", "2")), tmp_path / "model.safetensors")
    config = XTUNER | {"visual_hidden_size": E, "llm_hidden_size": D}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(read_projector(tmp_path, E, D)) == 4
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(Refusal) as caught:
        read_projector(tmp_path, E, D)
    assert (caught.value.code, caught.value.key, caught.value.found) == ("K-PROJECTOR", key, value)
