"""Sizes on paper: published models and adapters, counted on the meta device through the code that assembles them."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_moslora.config import TowerAdapter
from llava_moslora.models.adapt import linear_suffixes
from llava_moslora.models.assemble import model_on_meta
from llava_moslora.models.internlm2 import llama_config
from llava_moslora.models.names import LLM, LM_HEAD, PROJECTOR, VISION_TOWER
from support.internlm2_reference import CONFIG
from support.settings import adapters

CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L_336 |= {"image_size": 336, "patch_size": 14}
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES |= {"num_key_value_heads": 8}


def count(model, part: str, *kinds: str) -> int:
    """Trained parameters of a part whose name has one of ``kinds``; without kinds all trained ones."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if part + "." in name and p.requires_grad and (not kinds or any(kind in name for kind in kinds))
    )


def test_llama3_8b_r64_and_clip_r64():
    llm = LlamaConfig(**SIZES, vocab_size=128256)
    model = model_on_meta(llm, CLIPVisionConfig(**CLIP_L_336), adapters(TowerAdapter(64, 128), TowerAdapter(64, 16)))
    assert count(model, LLM, "lora_A", "lora_B") == 167_772_160  # 167.8M
    assert count(model, LLM, "lora_mixer") == 917_504  # 0.92M
    # The reference also adapts the tower's last layer, whose output is never used: 24 layers against 23.
    assert count(model, VISION_TOWER, "lora_A", "lora_B") * 24 // 23 == 28_311_552  # 28.3M
    assert count(model, VISION_TOWER, "lora_mixer") * 24 // 23 == 589_824  # 0.59M
    assert count(model, PROJECTOR) == 20_979_712  # 20.98M
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n and (LLM in n or LM_HEAD in n))
    assert base == 8_030_261_248  # Meta-Llama-3-8B


def test_internlm2_7b_r512():
    llm = llama_config(CONFIG | SIZES | {"vocab_size": 92544, "max_position_embeddings": 32768}, Path("config.json"))
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapter = TowerAdapter(512, 256, target_modules=(*linears, LM_HEAD))
    model = model_on_meta(llm, CLIPVisionConfig(**CLIP_L_336), adapters(adapter, TowerAdapter(64, 16)))
    factors = count(model, LLM, "lora_A", "lora_B") + count(model, LM_HEAD, "lora_A", "lora_B")
    mixers = count(model, LLM, "lora_mixer") + count(model, LM_HEAD, "lora_mixer")
    assert count(model, LM_HEAD, "lora_A", "lora_B") == 49_479_680  # 49.5M of it on `output`
    # The reference adapts wqkv as one linear; here q, k and v have an A and a mixer each, two more per layer.
    assert factors - 32 * 2 * 512 * 4096 == 1_257_439_232  # 1,257M
    assert mixers - 32 * 2 * 512 * 512 == 42_205_184  # 42.2M


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head")])
def test_the_head_is_adapted_only_where_it_is_named(targets):
    llm, clip = LlamaConfig(**SIZES | {"num_hidden_layers": 2}), CLIPVisionConfig(**CLIP_L_336)
    model = model_on_meta(llm, clip, adapters(TowerAdapter(8, 8, target_modules=targets)))
    assert count(model, LM_HEAD, "lora_A") == 8 * 4096
    assert count(model, LLM, "lora_A") == (len(targets) - 1) * 2 * 8 * 4096
    plain = model_on_meta(llm, clip, adapters(TowerAdapter(8, 8)))
    assert count(plain, LM_HEAD) == 0 and count(plain, LLM, "lora_A") > 0
    assert "q_proj" in " ".join(linear_suffixes(plain.base_model.model, LLM))
