"""An LLM without a vision tower through the same script: the numbers of stock transformers and PEFT, and refusals."""

import json

import pytest
from peft import LoraConfig

from llava_moslora.errors import Refusal
from support.text_runs import plain_loop, text_flags, write_alpaca
from support.training_runs import adapter, losses, rows, train

BOS_AND_EOS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
LORA = {"mixer_init": "identity", "train_mixer": False, "lora_dropout": 0, "lora_r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_alpaca(tmp_path_factory.mktemp("alpaca") / "alpaca.json")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("on_prompt", [True, False])
def test_losses_are_those_of_stock_transformers_and_peft(parts, data, tmp_path, monkeypatch, on_prompt, packing):
    import scripts.train_vit_llm as script

    first, original = {}, script.add_adapters

    def add_adapters(*args):
        model = original(*args)
        first.update({name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name})
        return model

    monkeypatch.setattr(script, "add_adapters", add_adapters)
    changes = LORA | {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "max_steps": 5}
    changes |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0, "data_order": "sequential"}
    changes |= {"train_on_prompt": on_prompt, "packing": packing, "model_max_length": 512, "weight_decay": 0}
    train(parts, tmp_path / "run", **text_flags(parts, data, **changes))
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
    expected = plain_loop(parts, data, lora, first, 5, on_prompt)
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    assert expected[0] - expected[-1] > 0.1  # it learns


def test_a_run_is_on_record_as_text_only(parts, data, tmp_path, capsys):
    train(parts, tmp_path / "run", **text_flags(parts, data, health_steps=1, save_steps=2))
    printed = capsys.readouterr().out
    assert "; text only" in printed and "--format llm" in printed and "vision tower  " not in printed
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["model"]["vision_tower"] is None and settings["adapter"]["vision_lora_r"] == 0
    assert {"delta/llm", "gradient/llm/lora_mixer"} <= rows(tmp_path / "run")[0].keys()
    names = adapter(tmp_path / "run", 2).keys()
    assert len(names) == 2 * 7 * 3 and all(name.startswith("base_model.model.model.layers.") for name in names)
    tokenizer = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text())
    assert "<image>" not in {token["content"] for token in tokenizer["added_tokens"]}


@pytest.mark.parametrize(
    "flag",
    [
        {"image_folder": "."}, {"pretrain_mm_mlp_adapter": "p"}, {"tune_mm_mlp_adapter": True}, {"vision_lora_r": 8},
        {"vision_lora_target_modules": ["fc1"]}, {"mm_projector_lr": 1e-3}, {"image_aspect_ratio": "crop"},
    ],
    ids=lambda flag: next(iter(flag)),
)  # fmt: skip
def test_flags_of_images_are_refused_by_name(parts, data, tmp_path, flag):
    with pytest.raises(Refusal, match=rf"--{next(iter(flag))}: has no effect without a vision tower"):
        train(parts, tmp_path / "run", **text_flags(parts, data, **flag))


def test_a_record_with_an_image_is_refused(parts, tmp_path):
    with pytest.raises(Refusal, match=r"D-IMAGES.*record 0.*but there is no vision tower"):
        train(parts, tmp_path / "run", **text_flags(parts, parts.data, version="chatml"))


def test_the_loss_of_prompts_is_for_text_only(parts, tmp_path):
    with pytest.raises(Refusal, match=r"--train_on_prompt: is for an LLM without a vision tower"):
        train(parts, tmp_path / "run", train_on_prompt=True)
