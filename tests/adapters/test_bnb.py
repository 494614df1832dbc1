"""Merging over a 4-bit base: never in place, and never from a weight that bitsandbytes has repacked."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.errors import Refusal
from support.adapter_models import LINEARS, Pair, adapted, llama, relative

bnb = pytest.importorskip("bitsandbytes")
quantised = pytest.importorskip("llava_moslora.adapters.bnb")


# C5: merging into 4 bits
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_no_merging_in_place(call):
    model = adapted(Pair("nf4"))
    weight = model.base_model.model.up.base_layer.weight.clone()
    with pytest.raises(Refusal, match=r"cannot be merged into 4-bit weights.*merge_over_4bit"):
        getattr(model, call)()
    assert torch.equal(model.base_model.model.up.base_layer.weight, weight)


@pytest.mark.parametrize("kind, kinds", [("nf4", "nf4, double quantisation"), ("nf4 single", "nf4")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_the_dequantised_weights(kind, kinds, dtype):
    model, x = adapted(Pair(kind, dtype)), torch.randn(5, 64, dtype=dtype)
    expected = model(x)
    merged, metadata = quantised.merge_over_4bit(model)
    assert metadata == {"merged_into": "the dequantised weights", "quantised_for_training": kinds}
    assert type(merged.up) is nn.Linear and merged.up.weight.dtype == dtype
    assert relative(merged(x), expected) <= (1e-6 if dtype == torch.float32 else 2**-7)


def test_merging_into_the_original_weights():
    originals = {name: module.weight.data for name, module in Pair().named_children()}
    model, exact = adapted(Pair("nf4")), adapted(Pair())
    merged, metadata = quantised.merge_over_4bit(model, originals)
    assert metadata["merged_into"] == "the original weights"
    x = torch.randn(5, 64)
    assert relative(merged(x), exact(x)) <= 1e-6
    with pytest.raises(Refusal, match=r"1 of 2 original weights missing; expected down"):
        quantised.merge_over_4bit(adapted(Pair("nf4")), {"up": originals["up"]})
    with pytest.raises(Refusal, match=r"up: not the weight .* found \(64, 96\); expected \(96, 64\)"):
        quantised.merge_over_4bit(adapted(Pair("nf4")), {"up": originals["down"], "down": originals["up"]})


def test_evaluating_first_does_not_corrupt_a_merge():
    """On CPUs with AVX512-BF16 an eval forward repacks the weight in place, and dequantising it then gives garbage."""
    model, x = adapted(Pair("nf4")).eval(), torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
    assert relative(quantised.merge_over_4bit(model)[0](x), expected) <= 1e-6


def test_a_repacked_weight_is_not_dequantised():
    """A base that was evaluated before it was adapted: the scales have been rounded, so it is refused."""
    layer = Pair("nf4").up
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(Refusal, match=r"repacked this 4-bit weight.*load the base model again"):
        quantised.dequantised(layer)


def test_a_quantised_model_of_transformers(tmp_path):
    """NF4 with double quantisation as transformers loads it: train, merge, save, load as a plain 16-bit model."""
    llama().save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, device_map="cpu")
    model = get_peft_model(
        base, MosLoraConfig(r=4, target_modules=[n for n in LINEARS if n != "k_proj"], init_lora_weights=False)
    ).eval()
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is quantised.MosLoraLinear4bit
    ids = torch.arange(1, 21)[None].repeat(2, 1)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model(input_ids=ids).logits

    merged, metadata = quantised.merge_over_4bit(model)
    assert metadata["quantised_for_training"] == "nf4, double quantisation"
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in merged.modules())  # k_proj, which has no adapter, too
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(again.config, "quantization_config", None) is None
    assert (again(input_ids=ids).logits - expected).abs().max() <= 1e-4
