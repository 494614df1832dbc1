"""LoRA files of diffusers and of the MoSLoRA authors' SDXL runs: names, alphas, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llava_moslora.adapters.load import read_adapter
from llava_moslora.errors import Refusal

OUT, IN, RANK = 6, 8, 4
LAYER, OTHER = "unet.mid_block.attentions.0.attn1.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def tensors(layer=LAYER, down="lora.down", mixer="lora.downB", up="lora.up", rank=RANK) -> dict:
    generator = torch.Generator().manual_seed(len(layer))
    found = {
        f"{layer}.{down}.weight": torch.randn(rank, IN, generator=generator),
        f"{layer}.{up}.weight": torch.randn(OUT, rank, generator=generator),
    }
    if mixer:
        found[f"{layer}.{mixer}.weight"] = torch.randn(rank, rank, generator=generator)
    return found


def check(adapter, stored: dict, scaling: float, layer=LAYER, down="lora.down", mixer="lora.downB", up="lora.up"):
    a, b = stored[f"{layer}.{down}.weight"], stored[f"{layer}.{up}.weight"]
    w = stored[f"{layer}.{mixer}.weight"] if mixer else torch.eye(len(a))
    assert torch.allclose(adapter.layers[layer].delta_rows(0, OUT), scaling * b @ w @ a, atol=1e-5)


def test_the_authors_spelling(tmp_path):
    """Their script has alpha = rank, and no file says so."""
    stored = tensors()
    save_file(stored, tmp_path / "f.safetensors")
    adapter = read_adapter(tmp_path / "f.safetensors")
    check(adapter, stored, 1.0)
    assert adapter.config.train_mixer and adapter.config.r == RANK and adapter.config.lora_alpha == RANK
    check(read_adapter(tmp_path / "f.safetensors", lora_alpha=8), stored, 2.0)
    assert list(read_adapter(tmp_path / "f.safetensors", rename={"unet.": ""}).layers) == [LAYER.removeprefix("unet.")]


@pytest.mark.parametrize(
    ("down", "up"), [("lora.down", "lora.up"), ("lora_A", "lora_B"), ("lora_linear_layer.down", "lora_linear_layer.up")]
)
def test_spellings_of_plain_loras(tmp_path, down, up):
    names = {"down": down, "mixer": "", "up": up}
    stored = tensors(**names) | tensors(OTHER, **names, rank=2)
    save_file(stored, tmp_path / "f.safetensors")
    adapter = read_adapter(tmp_path / "f.safetensors")
    check(adapter, stored, 1.0, **names), check(adapter, stored, 1.0, OTHER, **names)


def test_alphas(tmp_path):
    names = {"down": "lora_A", "mixer": "", "up": "lora_B"}
    stored = tensors(**names) | tensors(OTHER, **names)
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"mid_block.attentions.0.attn1.to_q": 2},
            "text_encoder.lora_alpha": 8}  # fmt: skip
    save_file(stored, tmp_path / "f.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
    adapter = read_adapter(tmp_path / "f.safetensors")
    check(adapter, stored, 0.5, **names), check(adapter, stored, 2.0, OTHER, **names)
    stored[f"{LAYER}.alpha"] = torch.tensor(12.0)
    save_file(stored, tmp_path / "g.safetensors")
    adapter = read_adapter(tmp_path / "g.safetensors")
    check(adapter, stored, 3.0, **names), check(adapter, stored, 1.0, OTHER, **names)


def no_mixer(stored, said):
    del stored[f"{LAYER}.lora.downB.weight"]


def dora(stored, said):
    said["unet.use_dora"] = True


def foreign(stored, said):
    stored[f"{LAYER}.lora.downC.weight"] = torch.ones(1)


def no_up(stored, said):
    del stored[f"{LAYER}.lora.up.weight"]


def surplus(stored, said):
    stored["unet.conv_in.weight"] = torch.ones(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_mixer, "1 missing mixers.*downB"), (dora, "unet.use_dora"), (foreign, "1 unexpected tensors.*downC"),
        (no_up, "1 missing tensors"), (surplus, "1 unexpected tensors.*conv_in"),
    ],
)  # fmt: skip
def test_what_would_compute_something_else(tmp_path, spoil, message):
    stored, said = tensors() | tensors(OTHER), {}
    spoil(stored, said)
    save_file(stored, tmp_path / "f.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
    with pytest.raises(Refusal, match=rf"K-ADAPTER.*{message}"):
        read_adapter(tmp_path / "f.safetensors")
