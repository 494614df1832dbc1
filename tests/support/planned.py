"""Models for the planner: LLaMA-3-8B with CLIP-L/336 and tiny ones, as configurations."""

from __future__ import annotations

import json

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_moslora.config import AdapterSettings
from llava_moslora.planning.setting import Choice, Model, Zero
from support.launching import ROOT
from support.tiny import TOWER

LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "bos_token_id": 128000}
CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L_336 |= {"image_size": 336, "patch_size": 14}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 400}
TINY_ADAPTERS = AdapterSettings(lora_r=4, vision_lora_r=4)


def large_model(**changes) -> Model:
    return Model(LlamaConfig(**LLAMA_3_8B), CLIPVisionConfig(**CLIP_L_336), AdapterSettings(), **changes)


def tiny_model(adapter: AdapterSettings = TINY_ADAPTERS, **changes) -> Model:
    return Model(LlamaConfig(**TINY), CLIPVisionConfig(**TOWER), adapter, torch.bfloat16, **changes)


def zero(name: str) -> Zero:
    """What a file of zero_configs/ says."""
    return Zero.of(json.loads((ROOT / "zero_configs" / f"{name}.json").read_text()))


def choice(micro_batch: int = 8, recompute: str = "full", bits: int = 16, stage: str = "zero1", **changes) -> Choice:
    settings = {"accumulation": 1, "zero_file": f"zero_configs/{stage}.json"} | changes
    return Choice(micro_batch=micro_batch, recompute=recompute, bits=bits, zero=zero(stage), **settings)


def plan_words(parts, *more: object) -> list:
    """Flags of scripts/plan.py for tiny parts, and more of them."""
    words = ["--model_name_or_path", parts.llm, "--vision_tower", parts.clip, "--gpu", "rtx4090", "--tokens", "64"]
    return [*words, "--records", "100", "--labels", "8", "--lora_r", "4", "--vision_lora_r", "2", *more]
