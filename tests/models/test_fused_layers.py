"""Norms, SwiGLU and rotary embedding in one pass: transformers' own numbers, by Triton's interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}
INTERPRETED = """
import torch
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from llava_moslora.models import fused_layers

def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()

torch.manual_seed(0)
gate, up, grad = (torch.randn(3, 5, 1500, requires_grad=True) for _ in range(3))
fused, plain = fused_layers._SiluMul.apply(gate, up), F.silu(gate) * up
results = [(y, *torch.autograd.grad(y, (gate, up), grad)) for y in (fused, plain)]
assert all(relative(*pair) <= 1e-6 for pair in zip(*results))

x, grad = (torch.randn(3, 5, 1500, requires_grad=True) for _ in range(2))
results = [(y, *torch.autograd.grad(y, x, grad)) for y in (fused_layers._QuickGelu.apply(x), QuickGELUActivation()(x))]
assert all(relative(*pair) <= 1e-6 for pair in zip(*results))

for rows, heads, width in ((1, 4, 16), (2, 3, 6)):
    x, grad = (torch.randn(2, 7, heads, width, requires_grad=True).transpose(1, 2) for _ in range(2))
    angles = torch.randn(rows, 7, width // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    before = x.detach().clone()
    fused, plain = fused_layers._Rotate.apply(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0]
    assert relative(fused, plain) <= 1e-6 and torch.equal(x, before)
    pair = (torch.autograd.grad(y, x, grad)[0] for y in (fused, plain))
    assert relative(*pair) <= 1e-6
"""


def test_the_kernels_are_transformers_formulas():
    """On a CPU by Triton's interpreter, which must be asked for before Triton is imported: in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def models():
    for config, model in (
        (LlamaConfig, LlamaModel),
        (MistralConfig, MistralModel),
        (Qwen2Config, Qwen2Model),
        (Qwen3Config, Qwen3Model),
    ):
        torch.manual_seed(0)
        yield model(config(**SIZES))


def compared(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Hidden states and every gradient before and after, in every family."""
    from llava_moslora.models.fused_layers import fuse_layers

    for model in models():
        model.to(device, dtype)
        ids = torch.arange(1, 33, device=device).view(2, 16)
        weights = torch.randn(2, 16, SIZES["hidden_size"])  # the sum of squares after a norm is constant: no gradient
        results = []
        for fused in (False, True):
            if fused:
                fuse_layers(model)
            model.zero_grad()
            hidden = model(input_ids=ids).last_hidden_state
            (hidden.float() * weights.to(device)).sum().backward()
            results.append([hidden, *(p.grad for p in model.parameters())])
        for one, other in zip(*results, strict=True):
            assert ((one - other).float().norm() / one.float().norm()).item() <= tolerance, type(model)


def compared_tower(device: str, dtype: torch.dtype, tolerance: float) -> None:
    from llava_moslora.models.fused_layers import fuse_activation

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=4)).to(device, dtype)
    images, results = torch.randn(2, 3, 16, 16).to(device, dtype), []
    for fused in (False, True):
        if fused:
            fuse_activation(model)
        model.zero_grad()
        hidden = model(images).last_hidden_state
        hidden.float().square().sum().backward()
        results.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None and p.grad.any())])
    for one, other in zip(*results, strict=True):
        assert ((one - other).float().norm() / one.float().norm()).item() <= tolerance


def test_models_compute_the_same():
    compared("cpu", torch.float32, 1e-5)
    compared_tower("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_gpu_models_compute_the_same(dtype, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = False
    compared("cuda", dtype, tolerance)
    compared_tower("cuda", dtype, tolerance)
