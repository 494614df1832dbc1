"""The published file in stock diffusers: it draws what the adapter draws; what must never be written is refused."""

import json

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from llava_moslora.adapters.attach import attach
from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.load import read_adapter
from llava_moslora.diffusion.lora_file import KOHYA_FILE, LORA_FILE, write_lora
from llava_moslora.errors import Refusal
from support.sdxl import PROMPT, needs_diffusers

pytestmark = needs_diffusers
REGEX = r"unet\..*\.(?:to_q|to_k|to_v|to_out\.0)"
TEXT = r"text_encoder(?:_2)?\..*\.(?:q_proj|k_proj|v_proj|out_proj)"
CASES = {
    "r4": {"r": 4, "lora_alpha": 4},
    "r16, another alpha": {"r": 16, "lora_alpha": 8},
    "ranks by module, text encoders": {
        "r": 4, "lora_alpha": 8, "target_modules": f"{REGEX}|{TEXT}",
        "rank_pattern": {r"unet\..*to_q": 2, r"text_encoder\..*v_proj": 3}, "alpha_pattern": {r"unet\..*to_k": 2},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(parts):
    return load(parts)


def load(parts):
    from llava_moslora.diffusion.probe import load_base  # imports diffusers

    return load_base({"base": str(parts.sdxl), "device": "cpu"})


def drawn(pipeline) -> torch.Tensor:
    from llava_moslora.diffusion.probe import answers

    question = {"prompt": PROMPT, "size": 64, "steps": 2, "seed": 0, "timestep": 500}
    return answers(pipeline, question)["picture"]


def holder_of(parts):
    """A fresh pipeline, and its parts under one module, as in training."""
    pipeline = load(parts)
    holder = nn.Module()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        holder.add_module(part, getattr(pipeline, part))
    return pipeline, holder


def trained(parts, folder, **settings):
    """A pipeline with a random adapter in training form, which is saved in ``folder``."""
    from peft import get_peft_model

    pipeline, holder = holder_of(parts)
    torch.manual_seed(1)
    config = MosLoraConfig(**({"target_modules": REGEX} | settings), mixer_init="orthogonal")
    model = get_peft_model(holder, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return pipeline, model


@pytest.mark.parametrize("case", CASES)
def test_stock_diffusers_draws_the_same(parts, pipeline, tmp_path, case):
    expected = drawn(trained(parts, tmp_path / "adapter", **CASES[case])[0])
    write_lora(read_adapter(tmp_path / "adapter"), tmp_path, kohya=True)
    base = drawn(pipeline)
    assert (expected - base).abs().max() > 0.05
    for name in (LORA_FILE, KOHYA_FILE):
        pipeline.load_lora_weights(str(tmp_path), weight_name=name)
        found = drawn(pipeline)
        pipeline.unload_lora_weights()
        assert (found - expected).abs().max() < 1e-5, name
    assert torch.equal(drawn(pipeline), base)
    tensors = load_file(tmp_path / LORA_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not any("mixer" in name for name in [*tensors, *load_file(tmp_path / KOHYA_FILE)])
    without = {name: tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    if len(without) == len(tensors):  # a reader that knows no metadata takes alpha = rank, which it is
        (tmp_path / "bare").mkdir()
        save_file(without, tmp_path / "bare" / LORA_FILE)
        pipeline.load_lora_weights(str(tmp_path / "bare"), weight_name=LORA_FILE)
        assert (drawn(pipeline) - expected).abs().max() < 1e-5
        pipeline.unload_lora_weights()


def test_the_published_file_is_read_back(parts, tmp_path):
    trained(parts, tmp_path / "adapter", **CASES["ranks by module, text encoders"])
    adapter = read_adapter(tmp_path / "adapter")
    write_lora(adapter, tmp_path)
    again = read_adapter(tmp_path / LORA_FILE, rename={"text_encoder.text_model.": "text_encoder."})
    assert again.layers.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        rows = layer.shape[0]
        assert torch.allclose(again.layers[name].delta_rows(0, rows), layer.delta_rows(0, rows), atol=1e-6)
    _, holder = holder_of(parts)
    attach(holder, again)  # from which training can continue


def test_what_diffusers_would_write_is_wrong_and_with_our_settings_refused(parts, pipeline, tmp_path):
    """Why the training form never gets this name: diffusers saves it, and loads it without the mixers."""
    theirs, model = trained(parts, tmp_path / "adapter", r=4, lora_alpha=8)
    expected = drawn(theirs)
    tensors = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(model).items()}
    layers = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
    pipeline.save_lora_weights(tmp_path / "silent", unet_lora_layers=layers)
    pipeline.load_lora_weights(str(tmp_path / "silent"), weight_name=LORA_FILE)
    assert (drawn(pipeline) - expected).abs().max() > 0.05
    pipeline.unload_lora_weights()
    pipeline.save_lora_weights(
        tmp_path / "refused", unet_lora_layers=layers, unet_lora_adapter_metadata=model.peft_config["default"].to_dict()
    )
    with pytest.raises(TypeError):
        pipeline.load_lora_weights(str(tmp_path / "refused"), weight_name=LORA_FILE)
    some = dict(list(tensors.items()))
    del some[next(name for name in some if "lora_mixer" in name)]
    save_file(some, tmp_path / "lacking.safetensors")
    with pytest.raises(Refusal, match=r"K-ADAPTER.*1 missing mixers"):
        read_adapter(tmp_path / "lacking.safetensors")


def test_the_authors_spelling(parts, tmp_path):
    """Read, folded and drawn: B·W·A."""
    theirs, _ = trained(parts, tmp_path / "adapter", r=4, lora_alpha=4)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    spelling = {"lora_A": "lora.down", "lora_mixer": "lora.downB", "lora_B": "lora.up"}
    renamed = {}
    for name, tensor in stored.items():
        name = name.removeprefix("base_model.model.")
        for ours, authors in spelling.items():
            name = name.replace(ours, authors)
        renamed[name] = tensor
    save_file(renamed, tmp_path / "authors.safetensors")
    adapter = read_adapter(tmp_path / "authors.safetensors")
    pipeline, _ = holder_of(parts)
    write_lora(adapter, tmp_path)
    pipeline.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    expected = drawn(theirs)
    assert (drawn(pipeline) - expected).abs().max() < 1e-5


def test_metadata_is_a_plain_loras(parts, tmp_path):
    trained(parts, tmp_path / "adapter", r=4, lora_alpha=8)
    write_lora(read_adapter(tmp_path / "adapter"), tmp_path)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        stored = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (stored["unet.peft_type"], stored["unet.r"], stored["unet.lora_alpha"]) == ("LORA", 4, 4)
    assert not any("mixer" in key for key in stored)
