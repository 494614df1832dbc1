"""Every spelling of an adapter that exists in the wild, and every way in which a file can be wrong."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_moslora.adapters.attach import attach, for_model
from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.fold import save
from llava_moslora.adapters.load import read_adapter
from llava_moslora.errors import Refusal
from llava_moslora.files import tensors
from support.adapter_models import LINEARS, Pair, adapted, llama
from support.mmengine_log import save_with_log

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def rewrite(folder, tensors=None, **changes):
    """Pass the tensors' dict through ``tensors`` and change keys of the configuration (None takes one out)."""
    if tensors is not None:
        save_file(tensors(load_file(folder / FILE)), folder / FILE)
    stored = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))


def ours(folder, **settings):
    model = adapted(Pair(), mixer_init="normal", **settings)
    model.save_pretrained(folder)
    return model


def stored_as_lora(folder, spelling, **changes):
    """Our training form, as another implementation would have written it."""
    for key in ("train_mixer", "mixer_init", "mixer_init_pattern", "train_mixer_pattern", "dropout_pattern"):
        changes.setdefault(key, None)
    rewrite(folder, lambda t: {k.replace("lora_mixer", spelling): v for k, v in t.items()}, peft_type="LORA", **changes)


def updates(model):
    layers = {"up": model.base_model.model.up, "down": model.base_model.model.down}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def check(adapter, model):
    expected = updates(model)
    assert adapter.layers.keys() == expected.keys()
    for name, layer in adapter.layers.items():
        assert torch.equal(layer.delta_rows(0, layer.shape[0]), expected[name])
        assert torch.allclose(layer.delta_rows(5, 9), expected[name][5:9], atol=1e-6)


def test_the_reference_repository(tmp_path):
    model = ours(tmp_path, rank_pattern={"down": 4}, alpha_pattern={"down": 3})
    stored_as_lora(tmp_path, "lora_AB", lora_use_mixer=True, lora_use_mixer_pattern={})
    adapter = read_adapter(tmp_path)
    check(adapter, model)
    assert (adapter.config.mixer_init, adapter.config.train_mixer) == ("kaiming_uniform", True)


def test_the_reference_repository_without_a_mixer_in_one_tower(tmp_path):
    model = ours(tmp_path, mixer_init_pattern={"down": "identity"}, train_mixer_pattern={"down": False})
    stored_as_lora(tmp_path, "lora_AB", lora_use_mixer=True, lora_use_mixer_pattern={"down": False})
    adapter = read_adapter(tmp_path)
    check(adapter, model)
    assert adapter.layers["down"].w is None
    check(adapter, attach(Pair(), adapter))


@pytest.mark.parametrize("value, init", [(True, "kaiming_uniform"), ("kai", "kaiming_uniform"), ("orth", "orthogonal")])
def test_the_peft_fork(tmp_path, value, init):
    model = ours(tmp_path)
    stored_as_lora(tmp_path, "lora_mixer", use_moslora=value)
    adapter = read_adapter(tmp_path)
    check(adapter, model)
    assert adapter.config.mixer_init == init


def test_plain_lora_goes_on_with_an_identity_mixer(tmp_path):
    model = adapted(Pair(), plain=True)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    check(adapter, model)
    again = attach(Pair(), adapter, is_trainable=True)
    x = torch.randn(4, 64)
    assert torch.allclose(again(x), model(x), atol=1e-6)
    mixer = again.base_model.model.up.lora_mixer["default"].weight
    assert torch.equal(mixer, torch.eye(8)) and mixer.requires_grad


def test_xtuner_file_with_both_towers(tmp_path):
    """Live names with the towers' prefixes, no configuration, a projector next to the adapters, mmengine's wrapping."""
    model = ours(tmp_path)
    towers = {"up": "llm.base_model.model.model.layers.0", "down": "visual_encoder.base_model.model.vision_model.fc"}
    state = {"projector.model.0.weight": torch.ones(2, 2)}
    for name, tensor in load_file(tmp_path / FILE).items():
        _, _, module, part, _ = name.split(".")
        state[f"{towers[module]}.{part.replace('mixer', 'AB')}.default.weight"] = tensor
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "iter_1.pth")

    file = tmp_path / "iter_1.pth"
    with pytest.raises(Refusal, match="contain the lora_alpha"):
        read_adapter(file)
    with pytest.raises(Refusal, match=r"visual_encoder\.vision_model\.fc: the file does not contain"):
        read_adapter(file, lora_alpha={"llm.": 12})
    adapter = read_adapter(
        file,
        lora_alpha={"llm.": 12, "visual_encoder.": 4},
        rename={"llm.": "model.language_model.", "visual_encoder.": "model.vision_tower.", "projector.": "model.mmp."},
    )
    assert set(adapter.layers) == {"model.language_model.model.layers.0", "model.vision_tower.vision_model.fc"}
    assert set(adapter.others) == {"model.mmp.model.0.weight"}
    for name, source in zip(sorted(adapter.layers), ("up", "down"), strict=True):
        layer = adapter.layers[name]
        assert layer.scaling == {"up": 12 / 8, "down": 4 / 8}[source]
        expected = updates(model)[source] / (12 / 8)
        assert torch.allclose(layer.delta_rows(0, layer.shape[0]) / layer.scaling, expected)
    assert adapter.config.settings_of("model.vision_tower.vision_model.fc")["lora_alpha"] == 4


def test_xtuner_file_with_the_trainers_log(tmp_path):
    model = ours(tmp_path)
    save_with_log(load_file(tmp_path / FILE), tmp_path / "iter_1.pth")
    check(read_adapter(tmp_path / "iter_1.pth", lora_alpha=12), model)
    assert "mmengine" not in sys.modules


def test_no_tensor_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    ours(tmp_path)
    read = []
    real = tensors._read_one
    monkeypatch.setattr(tensors, "_read_one", lambda file, name: read.append(name) or real(file, name))
    layer = read_adapter(tmp_path).layers["up"]
    assert (layer.shape, layer.rank, read) == ((96, 64), 8, [])
    for begin in range(0, 96, 32):
        layer.delta_rows(begin, begin + 32)
    assert sorted(read) == [f"base_model.model.up.lora_{part}.weight" for part in ("A", "B", "mixer")]  # once each


def clip():
    torch.manual_seed(0)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )


@pytest.mark.parametrize("level", ["vision_model.", ""], ids=["transformers 4 names", "transformers 5 names"])
def test_vit_names_of_either_transformers(tmp_path, level):
    model = get_peft_model(
        clip(), MosLoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False, mixer_init="normal")
    ).eval()
    model.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda t: {
            k.replace("vision_model.", "").replace("model.encoder", f"model.{level}encoder"): v for k, v in t.items()
        },
    )
    assert any("model.encoder" in k if not level else "vision_model" in k for k in load_file(tmp_path / FILE))
    pixels = torch.randn(1, 3, 28, 28)
    again = attach(clip(), read_adapter(tmp_path)).eval()
    assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_names_that_the_model_lacks(tmp_path):
    ours(tmp_path)
    with pytest.raises(Refusal, match=r"1 of 2 adapted layers are not in the model; found down;.*rename"):
        for_model(read_adapter(tmp_path), ["up", "norm"])


def test_attach_as_a_second_adapter(tmp_path):
    model = ours(tmp_path)
    both = attach(adapted(Pair(), plain=False, mixer_init="orthogonal"), read_adapter(tmp_path), "second")
    both.set_adapter("second")
    x = torch.randn(3, 64)
    assert torch.equal(both(x), model(x))


def test_attach_after_renaming_and_saving(tmp_path):
    """A converted adapter is an ordinary folder again: PeftModel.from_pretrained reads it."""
    model = get_peft_model(llama(), MosLoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "a")
    rewrite(
        tmp_path / "a", lambda t: {k.replace("base_model.model.", "base_model.model.llm.", 1): v for k, v in t.items()}
    )
    save(read_adapter(tmp_path / "a", rename={"llm.": ""}), tmp_path / "b")
    ids = torch.arange(1, 21)[None]
    again = PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def without(*endings):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(endings)}


DAMAGES = {
    "no mixer": (without("up.lora_mixer.weight"), {}, r"1 missing tensors; expected up\.lora_mixer"),
    "no A": (without("up.lora_A.weight"), {}, r"1 missing tensors; expected up\.lora_A"),
    "a target without a layer": (
        without("down.lora_A.weight", "down.lora_mixer.weight", "down.lora_B.weight"),
        {},
        r"missing tensors; expected down\.lora_A",
    ),
    "a mixer too many": (
        None,
        {"mixer_init": "identity", "train_mixer": False},
        r"2 unexpected tensors; found \w+\.lora_mixer",
    ),
    "a stray tensor": (
        lambda t: t | {"base_model.model.up.weight": torch.ones(1)},
        {},
        r"1 unexpected tensors; found up\.weight",
    ),
    "no saved module": (None, {"modules_to_save": ["head"]}, "1 missing tensors; expected head"),
    "a magnitude vector": (
        lambda t: t | {"base_model.model.up.lora_magnitude_vector": torch.ones(1)},
        {},
        "unexpected tensors; found .*magnitude",
    ),
    "another rank": (None, {"r": 4}, r"\w+: shape of A; found \(8, \d+\); expected \(4, \d+\)"),
    "a wrong mixer": (lambda t: t | {"base_model.model.up.lora_mixer.weight": torch.ones(8, 4)}, {}, "up: shape of W"),
    "a shard of A": (
        lambda t: t | {"base_model.model.up.lora_A.weight": torch.ones(0)},
        {},
        r"up: shape of A; found \(0,\)",
    ),
    "a task that PEFT does not know": (None, {"task_type": "SING"}, "a setting that PEFT refuses: Invalid task type"),
    "another method": (None, {"peft_type": "OFT"}, "not a LoRA; found OFT"),
    "plain LoRA with mixers": (
        None,
        {"peft_type": "LORA"},
        r"2 mixers, but the configuration is a plain LoRA's: B·A would be wrong",
    ),
    "DoRA with mixers": (None, {"use_dora": True}, "use_dora: cannot be combined with a mixer"),
    "a setting from the future": (None, {"use_telepathy": True}, "use_telepathy: unknown settings"),
    "modules to save that are no list": (None, {"modules_to_save": 5}, "modules_to_save: not a list; found 5"),
    "an unknown fork": (None, {"peft_type": "LORA", "use_moslora": "xavier"}, "unknown mixer; found xavier"),
    "no LoRA at all": (lambda t: {"base_model.model.up.weight": torch.ones(1)}, {}, "no LoRA tensors"),
}


# K12: missing, extra or damaged tensors
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    ours(tmp_path)
    tensors, changes, message = DAMAGES[damage]
    rewrite(tmp_path, tensors, **changes)
    with pytest.raises(Refusal, match=message) as refusal:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(refusal.value) or refusal.value.code == "C-ADAPTER"


def test_an_empty_setting_from_the_future_changes_nothing(tmp_path):
    model = ours(tmp_path)
    rewrite(tmp_path, use_telepathy=False)
    check(read_adapter(tmp_path), model)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: (f / CONFIG).unlink(), "no adapter here"),
        (lambda f: (f / FILE).unlink(), "no adapter weights here"),
        (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json: not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "adapter_config.json: not a JSON object; found list"),
        (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-9]), "the weights cannot be read"),
    ],
)
def test_an_unreadable_folder_is_refused(tmp_path, break_it, message):
    ours(tmp_path)
    break_it(tmp_path)
    with pytest.raises(Refusal, match=message):
        read_adapter(tmp_path)


def test_a_mixer_that_is_no_tensor_is_refused(tmp_path):
    """Ignored, the layer would become a LoRA without a mixer."""
    tensors = {f"up.lora_{part}.weight": torch.ones(1, 1) for part in ("A", "B")}
    torch.save(tensors | {"up.lora_AB.weight": [1.0]}, tmp_path / "a.pth")
    with pytest.raises(Refusal, match=r"K-ADAPTER\] .*a\.pth: the weights cannot be read; found up\.lora_AB\.weight"):
        read_adapter(tmp_path / "a.pth", lora_alpha=1)


# K5: a pickle with code
def test_a_pickle_runs_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"lora_A": Trap()}, tmp_path / "iter_1.pth")
    with pytest.raises(Refusal, match="the weights cannot be read"):
        read_adapter(tmp_path / "iter_1.pth", lora_alpha=1)
    assert not (tmp_path / "trapped").exists()


def test_two_adapters_in_one_file(tmp_path):
    torch.save({f"up.lora_{p}.{n}.weight": torch.ones(1, 1) for p in "AB" for n in "xy"}, tmp_path / "a.pth")
    with pytest.raises(Refusal, match="several adapters in one file; found x, y"):
        read_adapter(tmp_path / "a.pth", lora_alpha=1)


def test_stock_lora_beside_ours_is_read_back_as_itself(tmp_path):
    """PEFT writes each adapter to its own folder; the plain one stays plain."""
    model = adapted(Pair())
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["up"]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["peft_type"] == "LORA"
    assert read_adapter(tmp_path / "plain").layers.keys() == {"up"}
