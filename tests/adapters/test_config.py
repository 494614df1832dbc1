"""What MosLoraConfig accepts, refuses and keeps: every refusal that a user can cause, with its reason."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.config import MIXER_INITS
from llava_moslora.errors import Refusal
from support.adapter_models import IDENTITY, Pair, adapted

REFUSED = [
    ({"mixer_init": "zeros"}, "C-MIXER", "Appendix C"),
    ({"mixer_init": "xavier"}, "C-MIXER", "butterfly, identity, kaiming_uniform, normal, orthogonal"),
    ({"mixer_init_pattern": {"up": "zeros"}}, "C-MIXER", r"mixer_init_pattern\['up'\]"),
    ({"train_mixer": "yes"}, "C-MIXER", "train_mixer"),
    ({"train_mixer_pattern": {"up": 1}}, "C-MIXER", r"train_mixer_pattern\['up'\]"),
    ({"mixer_init": "butterfly", "r": 7}, "C-RANK", "found 7; expected even"),
    ({"r": 0}, "C-RANK", "positive"),
    ({"r": 8.0}, "C-RANK", "positive integer"),
    ({"rank_pattern": {"up": -1}}, "C-RANK", r"rank_pattern\['up'\]"),
    ({"lora_alpha": 0}, "C-ALPHA", "positive"),
    ({"alpha_pattern": {"up": float("nan")}}, "C-ALPHA", r"alpha_pattern\['up'\]"),
    ({"lora_dropout": 1.0}, "C-DROPOUT", "below 1"),
    ({"dropout_pattern": {"up": -0.1}}, "C-DROPOUT", r"dropout_pattern\['up'\]"),
    ({"rank_pattern": ["up"]}, "C-TARGET", "rank_pattern: not a table"),
    ({"alpha_pattern": {"(up": 4}}, "C-TARGET", "alpha_pattern: not a regular expression"),
    ({"target_modules": "*.up"}, "C-TARGET", "target_modules: not a regular expression"),
    ({"use_dora": True}, "C-ADAPTER", "use_dora: cannot be combined with a mixer"),
    ({"lora_bias": True}, "C-ADAPTER", "lora_bias"),
    ({"fan_in_fan_out": True}, "C-ADAPTER", "fan_in_fan_out"),
    ({"target_parameters": ["up.weight"]}, "C-ADAPTER", "target_parameters"),
    ({"init_lora_weights": "pissa"}, "C-ADAPTER", "without a mixer"),
    ({"init_lora_weights": "orthogonal"}, "C-ADAPTER", "without a mixer"),
]


@pytest.mark.parametrize("settings, code, message", REFUSED, ids=lambda v: str(v)[:40])
def test_refused_when_made(settings, code, message):
    with pytest.raises(Refusal, match=message) as refusal:
        MosLoraConfig(**settings)
    assert refusal.value.code == code


REFUSED_BY_THE_MODEL = [
    ({"target_modules": ["up", "dwon"]}, "C-TARGET", "target_modules: matches no adapted module; found dwon"),
    ({"rank_pattern": {"u": 4}}, "C-TARGET", "rank_pattern"),
    ({"alpha_pattern": {"vision.*": 4}}, "C-TARGET", "alpha_pattern"),
    ({"dropout_pattern": {"nothing": 0.1}}, "C-TARGET", "dropout_pattern"),
    ({"mixer_init_pattern": {"nothing": "normal"}}, "C-TARGET", "mixer_init_pattern"),
    ({"train_mixer_pattern": {"nothing": False}}, "C-TARGET", "train_mixer_pattern"),
    ({"r": 65}, "C-RANK", r"up: .*found 65; expected at most min\(in, out\) = 64"),
    ({"rank_pattern": {"down": 7}, "mixer_init": "butterfly"}, "C-RANK", "down: .*halves"),
    ({"target_modules": ["up", "norm"]}, "C-TARGET", "norm: MoSLoRA supports nn.Linear .*found LayerNorm"),
]


@pytest.mark.parametrize("settings, code, message", REFUSED_BY_THE_MODEL, ids=lambda v: str(v)[:40])
def test_refused_by_the_model(settings, code, message):
    model = Pair()
    model.norm = nn.LayerNorm(64)
    with pytest.raises(Refusal, match=message) as refusal:
        adapted(model, **settings)
    assert refusal.value.code == code


# C4: a target that matches nothing
def test_a_name_that_matches_nothing_is_refused_in_a_long_list_too():
    """PEFT shortens lists of 20 names and more to suffixes, which would cover the wrong name."""
    model = nn.ModuleDict({f"layer{i}": nn.ModuleDict({"q": nn.Linear(8, 8)}) for i in range(30)})
    names = [f"layer{i}.q" for i in range(30)]
    get_peft_model(copy.deepcopy(model), MosLoraConfig(target_modules=names))
    with pytest.raises(Refusal, match=r"found layer30\.q"):
        get_peft_model(model, MosLoraConfig(target_modules=[*names, "layer30.q"]))


def test_all_linear_beside_a_module_that_is_trained_whole():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "projector": nn.Sequential(nn.Linear(8, 8))})
    config = MosLoraConfig(target_modules="all-linear", modules_to_save=["projector"])
    names = {name for name, _ in get_peft_model(model, config).named_parameters()}
    assert any("body.lora_mixer" in name for name in names)
    assert not any("projector" in name and "lora" in name for name in names)


def test_targets_named_later_are_checked_too():
    config = MosLoraConfig(target_modules=["up"])
    config.target_modules = {"up", "dwon"}
    with pytest.raises(Refusal, match="found dwon"):
        get_peft_model(Pair(), config)


def test_one_configuration_serves_two_models():
    config = MosLoraConfig(target_modules=["up", "down"])
    get_peft_model(Pair(), config)
    with pytest.raises(Refusal, match="found down"):
        get_peft_model(nn.ModuleDict({"up": nn.Linear(8, 8)}), config)


def test_patterns_settle_each_module():
    model = adapted(
        Pair(),
        lora_dropout=0.5,
        rank_pattern={"down": 4},
        alpha_pattern={"down": 2},
        dropout_pattern={"up": 0.0},
        mixer_init_pattern={"down": "butterfly"},
        train_mixer_pattern={"d.*n": False},
    ).base_model.model
    assert (model.up.r["default"], model.down.r["default"]) == (8, 4)
    assert (model.up.scaling["default"], model.down.scaling["default"]) == (12 / 8, 2 / 4)
    assert isinstance(model.up.lora_dropout["default"], nn.Identity)
    assert model.down.lora_dropout["default"].p == 0.5
    assert model.up.lora_mixer["default"].weight.requires_grad
    assert not model.down.lora_mixer["default"].weight.requires_grad
    assert torch.equal(model.down.lora_mixer["default"].weight, torch.eye(2).repeat(2, 2))


@pytest.mark.parametrize("init", MIXER_INITS)
def test_mixer_starts(init):
    w = adapted(Pair(), mixer_init=init, r=32).base_model.model.up.lora_mixer["default"].weight.detach()
    if init == "kaiming_uniform":  # a = √5: uniform in ±1/√r
        assert w.abs().max() <= 32**-0.5 and w.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)
    elif init == "orthogonal":
        assert torch.allclose(w @ w.T, torch.eye(32), atol=1e-5)
    elif init == "identity":
        assert torch.equal(w, torch.eye(32))
    elif init == "normal":
        assert w.std() == pytest.approx(1, rel=0.1)
    else:
        assert torch.equal(w, torch.eye(16).repeat(2, 2))


def test_frozen_identity_stores_no_mixer():
    model = adapted(Pair(), **IDENTITY)
    assert not any("mixer" in name for name, _ in model.named_parameters())


def test_training_form_and_memory_form(tmp_path):
    model = adapted(Pair(), use_rslora=True, mixer_init="orthogonal")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "MOSLORA" and stored["mixer_init"] == "orthogonal"
    assert stored["target_modules"] == ["down", "up"]  # sorted: the same file from every process
    again = PeftModel.from_pretrained(Pair(), tmp_path, is_trainable=True)
    assert type(again.peft_config["default"]) is MosLoraConfig
    assert again.peft_config["default"].peft_type is PeftType.LORA
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.base_model.model.up.lora_mixer["default"].weight.requires_grad


def test_reading_another_kind_of_configuration_is_refused(tmp_path):
    LoraConfig(r=4, target_modules=["up"]).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="found LORA; expected MOSLORA"):
        MosLoraConfig.from_pretrained(str(tmp_path))


def test_combining_adapters_without_their_mixers_is_refused():
    model = adapted(Pair())
    model.add_adapter("second", MosLoraConfig(target_modules=["up", "down"], r=8))
    with pytest.raises(Refusal, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")


def test_a_stock_lora_layer_does_not_take_a_mixer():
    """The layers of a model that was adapted with peft.LoraConfig have no W, and refuse it."""
    model = adapted(Pair(), plain=True)
    with pytest.raises(ValueError, match="mixer_init"):
        model.add_adapter("second", MosLoraConfig(target_modules=["up", "down"]))
