"""Small models for the adapter tests; every one is the same each time it is built."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_moslora.adapters.config import MosLoraConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Plain LoRA in this package's terms: nothing mixed, nothing stored
IDENTITY = {"mixer_init": "identity", "train_mixer": False}


def llama(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


class Pair(nn.Module):
    """Two linears of different shapes (64→96→64): "float", "nf4" (with double quantisation), "nf4 single" or "int8"."""

    def __init__(self, kind="float", dtype=torch.float32, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96).to(dtype), nn.Linear(96, 64).to(dtype)
        for name in ("up", "down") if kind != "float" else ():
            setattr(self, name, quantised(getattr(self, name), kind, device))
        self.to(device)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def quantised(linear: nn.Linear, kind: str, device: str) -> nn.Module:
    """bitsandbytes quantises when the layer is moved, and 8-bit layers stay where that was."""
    bnb = pytest.importorskip("bitsandbytes")
    i, o, dtype = linear.in_features, linear.out_features, linear.weight.dtype
    if kind.startswith("nf4"):
        double = kind == "nf4"
        new = bnb.nn.Linear4bit(i, o, compute_dtype=dtype, quant_type="nf4", compress_statistics=double)
        new.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double, module=new
        )
    else:
        new = bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = linear.bias
    return new.to(device)


def adapted(model: nn.Module, autocast_adapter_dtype=True, plain=False, **settings) -> nn.Module:
    """``model`` with a random adapter (B is not zero): MoSLoRA, or stock PEFT's LoRA if ``plain``."""
    torch.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 12, "target_modules": ["up", "down"], **settings}
    config = (LoraConfig if plain else MosLoraConfig)(**settings)
    model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(model)
    return model


def randomise(model: nn.Module, seed: int = 2) -> None:
    """Random values for all adapter weights, the same in every model that has the same parameter names."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            generator = torch.Generator().manual_seed(seed + sum(name.encode()))
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.2).to(parameter)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the size of what is expected, in the 2-norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def hashed(x, seed, drop):
    """The mask of :mod:`triton_dropout` for x (..., I), in integer tensors on x's device."""
    from llava_moslora.adapters.triton_dropout import keys

    def mixed(h):
        h = ((h ^ h >> 16) * 0x21F0AAAD) & 0xFFFFFFFF
        h = ((h ^ h >> 15) * 0x735A2D97) & 0xFFFFFFFF
        return h ^ h >> 15

    key, key2 = (k & 0xFFFFFFFF for k in keys(seed))
    rows, columns = (torch.arange(count, device=x.device) for count in (x[..., 0].numel(), x.shape[-1]))
    row = mixed(rows ^ (mixed(key) + key2 & 0xFFFFFFFF))
    column = mixed(columns // 2 ^ (mixed(key2 + 0x1E3779B9 & 0xFFFFFFFF) + key & 0xFFFFFFFF))
    h = ((row[:, None] ^ column) * 0x21F0AAAD) & 0xFFFFFFFF
    h = ((h ^ h >> 15) * 0x735A2D97) & 0xFFFFFFFF
    halves = torch.where(columns % 2 == 0, h >> 16, (h >> 16) ^ (h & 0xFFFF))
    return (halves >= drop).view(x.shape)
