"""PEFT's own adapters, read from their folders, are merged as PEFT merges them."""

import json

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava_moslora.adapters.fold import fold, merge, save
from llava_moslora.adapters.load import read_adapter
from llava_moslora.errors import Refusal
from llava_moslora.export.writer import PlannedTensor, merged_blocks
from llava_moslora.files.tensors import in_memory
from support.adapter_models import Pair

BOTH = {"target_modules": ["up", "down"]}
OWN_RANK = {"rank_pattern": {"down": 3}, "alpha_pattern": {"down": 5}}
ADALORA = {"init_r": 4, "target_r": 4, "lora_alpha": 6, "total_step": 10}
CONFIGS = {
    "DoRA": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, **OWN_RANK, **BOTH),
    "rank-stabilised DoRA": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True, **BOTH),
    "LoHa": lambda: LoHaConfig(r=4, alpha=6, **OWN_RANK, **BOTH),
    "LoKr": lambda: LoKrConfig(r=2, alpha=6, **OWN_RANK, **BOTH),
    "LoKr of whole factors": lambda: LoKrConfig(r=16, alpha=6, **BOTH),
    "LoKr of divided factors": lambda: LoKrConfig(r=2, alpha=6, decompose_both=True, decompose_factor=32, **BOTH),
    "AdaLoRA": lambda: AdaLoraConfig(**ADALORA, **BOTH),
}


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path):
    """With random adapters, saved in ``tmp_path``."""
    torch.manual_seed(0)
    model = get_peft_model(Pair(), CONFIGS[request.param]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.02 if "magnitude" in name else 0.3))
    model.save_pretrained(tmp_path)
    return model


def test_merged_as_peft_merges_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_moslora.export.writer.BLOCK", 10 * 64)  # 10 rows at a time
    adapter, base = read_adapter(tmp_path), {n: t.detach().clone() for n, t in Pair().state_dict().items()}
    expected = model.merge_and_unload().state_dict()
    for module in ("up", "down"):
        name = f"{module}.weight"
        assert adapter.layers[module].shape == base[name].shape
        assert torch.allclose(merge(base[name], adapter.layers[module]), expected[name], atol=1e-5)
        assert not torch.allclose(base[name], expected[name], atol=1e-2)
        planned = PlannedTensor(name, in_memory(base, tmp_path)[name], adapter.layers[module])
        assert torch.allclose(torch.cat(list(merged_blocks(planned, torch.float32))), expected[name], atol=1e-5)


def test_read_back_as_saved(model, tmp_path):
    save(read_adapter(tmp_path), tmp_path / "again")
    stored, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())
    kinds = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert kinds[0]["peft_type"] == kinds[1]["peft_type"]


def test_it_is_no_plain_lora(model, tmp_path):
    with pytest.raises(Refusal, match=r"K-ADAPTER.*cannot be written as a plain LoRA"):
        fold(read_adapter(tmp_path))


def test_missing_and_misshapen_tensors_are_refused(model, tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    dropped = sorted(stored)[-1]
    save_file({name: tensor for name, tensor in stored.items() if name != dropped}, file)
    with pytest.raises(Refusal, match=r"K-ADAPTER.*1 missing tensors"):
        read_adapter(tmp_path)
    save_file(stored | {dropped: stored[dropped].new_ones(1, 7, 1)}, file)
    with pytest.raises(Refusal, match=r"K-ADAPTER.*shape of"):
        read_adapter(tmp_path)
