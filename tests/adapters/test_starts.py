"""Starts from the base weight, compared with their definitions."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llava_moslora.adapters.attach import attach
from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.fold import fold, merge, save
from llava_moslora.adapters.load import read_adapter
from llava_moslora.adapters.starts import top_singular
from llava_moslora.errors import Refusal
from support.adapter_models import Pair

R = 4
STARTS = ["flora", "loraxs", "nlora", "pissa", "folded"]
NO_MIXER = {"mixer_init": "identity", "train_mixer": False}


def adapted(start: str, **changes):
    torch.manual_seed(0)
    mixer = NO_MIXER if start == "pissa" else {"train_mixer": False} if start == "folded" else {}
    settings = {"r": R, "lora_alpha": 6, "target_modules": ["up", "down"], "start": start} | mixer | changes
    return get_peft_model(Pair(), MosLoraConfig(**settings))


def layers(model):
    return (model.base_model.model.up, model.base_model.model.down)


def moved(start: str, **changes):
    """With random numbers added to what is trained."""
    model = adapted(start, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def best_of_rank_r(weight):
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :R] * s[:R]) @ v[:R]


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_the_first_singular_triples(shape):
    weight = torch.randn(shape)
    u, s, v = top_singular(weight, R)
    expected = torch.linalg.svd(weight.double(), full_matrices=False)
    assert torch.allclose(s, expected.S[:R], rtol=1e-10)
    assert torch.allclose((u * s) @ v.T, best_of_rank_r(weight), atol=1e-10)
    assert torch.allclose(u.T @ u, torch.eye(R).double(), atol=1e-10)


def test_lora_xs_trains_the_mixer_between_the_singular_vectors():
    for layer in layers(adapted("loraxs")):
        a, w, b = layer.adapter_weights("default")
        weight = layer.get_base_layer().weight
        assert torch.allclose((b @ a).double(), best_of_rank_r(weight), atol=1e-5)
        assert torch.allclose(a @ a.T, torch.eye(R), atol=1e-5)
        assert w.requires_grad and not a.requires_grad and not b.requires_grad
        assert 0 < w.std() < 3e-5


def test_flora_starts_with_a_core_of_zeros():
    for layer in layers(adapted("flora")):
        a, w, b = layer.adapter_weights("default")
        assert not w.any() and a.any() and 0.015 < b.std() < 0.025
        assert all(factor.requires_grad for factor in (a, w, b))
    model = adapted("flora")
    model(torch.randn(5, 64)).square().sum().backward()
    assert model.base_model.model.up.lora_mixer["default"].weight.grad.any()


def test_nlora_starts_as_rows_corner_and_columns():
    for layer in layers(adapted("nlora")):
        a, w, b = layer.adapter_weights("default")
        weight = layer.get_base_layer().weight
        for factor, part in ((a, weight[:R]), (w, weight[:R, :R]), (b, weight[:, :R])):
            assert torch.equal(factor, part) and factor.requires_grad


def test_pissa_starts_at_the_base_and_its_factors_are_pefts():
    model, x = adapted("pissa"), torch.randn(5, 64)
    assert torch.allclose(model(x), Pair()(x), atol=1e-5)
    stock = get_peft_model(
        Pair(), LoraConfig(r=R, lora_alpha=6, init_lora_weights="pissa", target_modules=["up", "down"])
    )
    for layer, theirs in zip(layers(model), layers(stock), strict=True):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(b @ a, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight, atol=1e-5)
        assert torch.allclose(a.norm(dim=1), theirs.lora_A["default"].weight.norm(dim=1), atol=1e-5)
        assert torch.equal(
            layer.get_base_layer().weight, Pair().up.weight if layer is layers(model)[0] else Pair().down.weight
        )
    assert torch.equal(layers(model)[0].get_base_layer().weight, Pair().up.weight)  # PEFT's is changed
    with torch.no_grad():  # the same change of the trained factors changes both models alike
        for layer, theirs in zip(layers(model), layers(stock), strict=True):
            theirs.lora_A["default"].weight.copy_(layer.lora_A["default"].weight.mul_(1.5))
            theirs.lora_B["default"].weight.copy_(layer.lora_B["default"].weight)
    assert torch.allclose(model(x), stock(x), atol=1e-4)


@pytest.mark.parametrize("init", ["kaiming_uniform", "orthogonal", "butterfly"])
def test_a_folded_mixer_is_moslora_s_start_as_a_lora(init):
    """A is W·A of the MoSLoRA of the same seed, and nothing but A and B is there."""
    model = adapted("folded", mixer_init=init, train_mixer=False)
    for layer, other in zip(layers(model), layers(adapted("lora", mixer_init=init)), strict=True):
        a, w, b = layer.adapter_weights("default")
        a0, mixer, _ = other.adapter_weights("default")
        assert w is None and not b.any() and a.requires_grad and b.requires_grad
        assert torch.allclose(a, mixer @ a0, atol=1e-6) and not torch.allclose(a, a0, atol=1e-2)


@pytest.mark.parametrize("start", STARTS)
def test_saved_loaded_and_merged(tmp_path, monkeypatch, start):
    model, x = moved(start), torch.randn(5, 64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("llava_moslora.adapters.starts.top_singular", lambda *_: pytest.fail("decomposed to be loaded"))
    assert torch.equal(PeftModel.from_pretrained(Pair(), tmp_path)(x), expected)
    adapter = read_adapter(tmp_path)
    assert torch.equal(attach(Pair(), adapter)(x), expected)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(x), expected, atol=1e-5)
    for module in ("up", "down"):
        weight = getattr(Pair(), module).weight.detach()
        assert torch.allclose(merge(weight, adapter.layers[module]), getattr(merged, module).weight, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_folded_it_is_a_plain_lora_for_stock_peft(tmp_path, start, rslora):
    model, x = moved(start, use_rslora=rslora, rank_pattern={"down": 2}, alpha_pattern={"down": 3}), torch.randn(5, 64)
    model.save_pretrained(tmp_path)
    plain = fold(read_adapter(tmp_path))
    save(plain, tmp_path / "plain")
    assert type(plain.config) is LoraConfig and plain.config.r == (2 * R if start == "pissa" else R)
    assert torch.allclose(PeftModel.from_pretrained(Pair(), tmp_path / "plain")(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "olora"}, "start: unknown start; found olora; expected lora, flora"),
        ({"start": "flora", "mixer_init": "orthogonal"}, "mixer_init: start 'flora' sets it itself"),
        ({"start": "loraxs", "train_mixer": False}, "train_mixer: start 'loraxs' sets it itself"),
        ({"start": "folded"}, "train_mixer: start 'folded' sets it itself; found True; expected False"),
        ({"start": "pissa"}, "mixer_init: start 'pissa' sets it itself; found kaiming_uniform; expected identity"),
        ({"start": "nlora", "mixer_init_pattern": {"up": "normal"}}, "mixer_init: start 'nlora' sets it itself"),
        ({"start": "nlora", "init_lora_weights": "gaussian"}, "init_lora_weights: start 'nlora' sets it itself"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(Refusal, match=message):
        MosLoraConfig(r=R, target_modules=["up"], **settings)
