"""The training forward against stock transformers with a mask: the same losses and gradients, for every LLM family."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llava_moslora.models.llava import IGNORE_INDEX, Llava

PICTURE, PATCHES, LENGTHS = 60, 4, (23, 17, 9)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}  # the second layer's
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": MistralConfig(**SIZES, sliding_window=6),
    "mistral, wide window": MistralConfig(**SIZES, sliding_window=4096),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, window": Qwen2Config(**SIZES, **WINDOW),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3, window": Qwen3Config(**SIZES, head_dim=8, **WINDOW),
}


def llava_of(text, attention: str = "sdpa") -> Llava:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=copy.deepcopy(text), image_token_index=PICTURE, vision_feature_layer=1
    )
    model = Llava(config)
    model.set_attn_implementation(attention)
    return model


def batch_of(lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """Right-padded rows, the first with a picture; labels on the second half of each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for line, length in enumerate(lengths):
        ids[line, length:] = 0
        mask[line, :length] = 1
        labels[line, length // 2 : length] = ids[line, length // 2 : length]
    ids[0, 2 : 2 + PATCHES] = PICTURE
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_needs_no_mask(family, attention):
    model, batch = llava_of(FAMILIES[family], attention), batch_of()
    stock = LlavaForConditionalGeneration.forward(model, **batch).loss
    expected = gradients(model, stock)
    del batch["attention_mask"]
    ours = model(**batch).loss
    found = gradients(model, ours)
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "mistral", "mistral, wide window", "qwen2", "qwen3"])
def test_torchs_causal_attention_is_asked_for(family, monkeypatch):
    """What a GPU's flash attention needs: no mask, ``is_causal``, and keys of their own number of heads."""
    model, batch, calls = llava_of(FAMILIES[family]), batch_of(), []
    real = F.scaled_dot_product_attention

    def seen(query, key, value, attn_mask=None, is_causal=False, **others):
        calls.append((attn_mask, is_causal, key.shape[1]))
        return real(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    del batch["attention_mask"]
    model(**batch)
    assert calls[-2:] == [(None, True, 2)] * 2  # the LLM's layers; the tower's are not causal
