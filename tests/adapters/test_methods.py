"""An adapter method is one row: with it, another method of PEFT is read, merged and checked like our own."""

import json
from dataclasses import dataclass

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava_moslora.adapters.fold import Additive, fold, merge, named_tensors, save
from llava_moslora.adapters.kinds import Kind
from llava_moslora.adapters.load import ALL_KINDS, read_adapter
from llava_moslora.errors import Refusal
from llava_moslora.export.writer import PlannedTensor, merged_blocks
from llava_moslora.files.tensors import LazyTensor, in_memory
from support.adapter_models import Pair

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class LoHa(Additive):
    """ΔW = s·(W1a·W1b ∘ W2a·W2b), as PEFT's LoHa."""

    factors: dict[str, LazyTensor]
    scaling: float

    @property
    def shape(self):
        return self.factors["hada_w1_a"].shape[0], self.factors["hada_w1_b"].shape[1]

    @property
    def tensors(self):
        return self.factors

    def delta_rows(self, begin, end):
        w1_a, w1_b, w2_a, w2_b = (self.factors[name].read().float() for name in NAMES)
        return (w1_a[begin:end] @ w1_b) * (w2_a[begin:end] @ w2_b) * self.scaling


ROW = Kind(
    config=LoHaConfig,
    names={name: name for name in NAMES},
    needed=lambda config, module, present: set(NAMES),
    update=lambda tensors, config, module: LoHa(tensors, config.alpha / config.r),
)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Trained by stock PEFT and saved in ``tmp_path``."""
    monkeypatch.setitem(ALL_KINDS, "LOHA", ROW)
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoHaConfig(r=4, alpha=6, target_modules=["up", "down"], init_weights=False))
    model.save_pretrained(tmp_path)
    return model


def test_merged_as_peft_merges_it(model, tmp_path):
    adapter = read_adapter(tmp_path)
    expected = model.merge_and_unload().state_dict()
    for name, weight in Pair().state_dict().items():
        module, _, parameter = name.rpartition(".")
        merged = merge(weight, adapter.layers[module]) if parameter == "weight" else weight
        assert torch.allclose(merged, expected[name], atol=1e-6)
    assert not torch.equal(expected["up.weight"], Pair().up.weight)


def test_exported_block_by_block(model, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_moslora.export.writer.BLOCK", 10 * 64)  # 10 rows at a time
    weights = in_memory({"up.weight": Pair().up.weight.detach()}, tmp_path)
    planned = PlannedTensor("up.weight", weights["up.weight"], read_adapter(tmp_path).layers["up"])
    blocks = list(merged_blocks(planned, torch.float32))
    assert len(blocks) == 10
    assert torch.allclose(torch.cat(blocks), model.merge_and_unload().up.weight, atol=1e-6)


def test_read_back_as_saved(model, tmp_path):
    adapter = read_adapter(tmp_path)
    save(adapter, tmp_path / "again")
    stored, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert stored.keys() == again.keys() == named_tensors(adapter).keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["peft_type"] == "LOHA"


def test_what_it_cannot_do_is_refused(model, tmp_path):
    adapter = read_adapter(tmp_path)
    with pytest.raises(Refusal, match=r"K-ADAPTER\] (up|down): .*cannot be written as a plain LoRA; found LoHa"):
        fold(adapter)
    with pytest.raises(Refusal, match=r"K-ADAPTER\] .*names of this adapter method cannot be changed"):
        read_adapter(tmp_path, rename={"up": "down"})
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "up.hada_w2_b" not in name}, file)
    with pytest.raises(Refusal, match=r"1 missing tensors; expected up\.hada_w2_b"):
        read_adapter(tmp_path)


def test_without_the_row_it_is_unknown(model, tmp_path, monkeypatch):
    monkeypatch.delitem(ALL_KINDS, "LOHA")
    with pytest.raises(Refusal, match="no LoRA tensors in it"):
        read_adapter(tmp_path)
