"""Where the adapters of an assembled LLaVA sit, and what is trained."""

import pytest
import torch

from llava_moslora.config import AdapterSettings, TowerAdapter
from llava_moslora.errors import Refusal
from llava_moslora.models.adapt import add_adapters, parameter_table, train_projector_only
from support.assembled import build, make_batch
from support.settings import adapters


def test_every_trained_tensor_gets_gradient_in_both_towers(parts):
    model, tokenizer = build(parts)
    model = add_adapters(model, adapters(TowerAdapter(4, 8, 0.0), TowerAdapter(2, 4, 0.0)))
    with torch.no_grad():  # with B at 0 only B has a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model(**make_batch(tokenizer)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    towers = {"model.language_model": 2 * 7, "model.vision_tower": 2 * 6}
    for tower, linears in towers.items():
        for part in ("lora_A", "lora_mixer", "lora_B"):
            assert sum(tower in name and part in name for name in trained) == linears
    assert sum("multi_modal_projector" in name for name in trained) == 4
    assert not any("layers.2" in name for name in trained if "vision_tower" in name)  # the unused last layer


def test_per_tower_settings(parts):
    model, _ = build(parts)
    llm = TowerAdapter(4, 8, 0.1, target_modules=("q_proj",))
    model = add_adapters(model, adapters(llm, TowerAdapter(2, 16, 0.0, "identity", False, ("fc1",))))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 4
    for name, layer in layers.items():
        vision = "vision_tower" in name
        assert layer.r["default"] == (2 if vision else 4)
        assert layer.scaling["default"] == (8 if vision else 2)
        assert ("lora_mixer" in dict(layer.named_children()) and len(layer.lora_mixer) > 0) != vision


@pytest.mark.parametrize("tower", ["llm", "vision"])
def test_one_tower_alone(parts, tower):
    model, _ = build(parts)
    spec = TowerAdapter(2, 4)
    settings = adapters(spec if tower == "llm" else None, spec if tower == "vision" else None)
    model = add_adapters(model, settings)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    assert names and all(("vision_tower" in n) == (tower == "vision") for n in names)


# C4: a target that matches nothing
def test_unmatched_target_is_named(parts):
    model, _ = build(parts)
    with pytest.raises(Refusal, match=r"--vision_lora_target_modules: .*found gate_proj; expected .*mlp\.fc1"):
        vision = TowerAdapter(2, 4, target_modules=("fc1", "gate_proj"))
        add_adapters(model, adapters(TowerAdapter(2, 4), vision))
    with pytest.raises(Refusal, match="no adapter to train"):
        add_adapters(model, AdapterSettings(lora_r=0, vision_lora_r=0))


# C2: an impossible rank
def test_a_rank_above_a_linears_smaller_side_is_refused(parts):
    model, _ = build(parts)
    named = r"--lora_r: the rank is above a dimension of model.language_model.layers.0.self_attn.k_proj"
    with pytest.raises(Refusal, match=named + "; found 33 for 64 → 32; expected at most 32"):
        add_adapters(model, adapters(TowerAdapter(33, 8)))
    add_adapters(model, adapters(TowerAdapter(33, 8, target_modules=("q_proj",))))


def test_stage_1_trains_the_projector_alone(parts):
    model, tokenizer = build(parts, projector=None)
    model = train_projector_only(model)
    model(**make_batch(tokenizer)).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if "multi_modal_projector" in n} and len(trained) == 4


def test_the_table_counts_every_parameter_once(parts):
    model, _ = build(parts)
    total = sum(p.numel() for p in model.parameters())
    model = add_adapters(model, adapters(TowerAdapter(4, 8), TowerAdapter(2, 4)))
    added = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    last = parameter_table(model).splitlines()[-1].replace(",", "").split()
    assert [int(n) for n in last[1:3]] == [total + added, trained]
