"""Fused norms, activations and rotary embedding (one pass over memory each), for training on a GPU.

transformers computes them operation by operation: the LLM's RMSNorm in eight passes, SwiGLU in two and the rotary
embedding in five per tensor, with float32 copies between, and CLIP's quick GELU in three. Here RMSNorm is torch's own,
and small Triton kernels do the rest.
They compute in float32 and round once, while transformers also rounds in between: the results differ by that rounding.

Shapes: B rows of a batch, T tokens, H heads, D head width, N = B·T, I width of the MLP.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation

from llava_moslora.models.attention import LLM_FAMILIES

COLUMNS = 1024  # of a block in the kernels of SwiGLU


def fuse_model(model: nn.Module) -> None:
    """Fuse these operations in a LLaVA, or in a text-only LLM."""
    inner: Any = model.model
    fuse_layers(getattr(inner, "language_model", inner))
    if hasattr(inner, "vision_tower"):
        fuse_activation(inner.vision_tower)


def fuse_layers(llm: nn.Module) -> None:
    """Replace the forward of these layers in ``llm``, a decoder of one of ``LLM_FAMILIES``; others are not changed."""
    config = llm.config
    if config.model_type not in LLM_FAMILIES:
        return
    for module in llm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)
        elif type(module).__name__.endswith("MLP") and config.hidden_act == "silu":
            module.forward = MethodType(_mlp, module)
    modeling: Any = sys.modules[type(llm).__module__]
    if not isinstance(modeling.apply_rotary_pos_emb, _ApplyRotary):
        modeling.apply_rotary_pos_emb = _ApplyRotary(modeling.apply_rotary_pos_emb)


def fuse_activation(tower: nn.Module) -> None:
    """Replace the forward of quick GELU in ``tower``, a vision tower; other activations are one operation already."""
    for module in tower.modules():
        if isinstance(module, QuickGELUActivation):
            module.forward = _quick_gelu_of


def _quick_gelu_of(x: Tensor) -> Tensor:
    return _QuickGelu.apply(x) if _has_kernel(x) else x * torch.sigmoid(1.702 * x)


def _has_kernel(x: Tensor) -> bool:
    """The kernels compute in float32: float64 is left to torch."""
    return x.is_cuda and x.dtype != torch.float64


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def _mlp(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(_SiluMul.apply(gate, up) if _has_kernel(gate) else F.silu(gate) * up)


class _ApplyRotary:
    """In place of transformers' ``apply_rotary_pos_emb`` of one family, which it still calls on a CPU."""

    def __init__(self, stock):
        self.stock = stock

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D), k (B, key heads, T, D), cos and sin (B or 1, T, D), rotated; the inputs are not changed."""
        if not q.is_cuda or unsqueeze_dim != 1 or cos.shape[-1] != q.shape[-1]:
            return self.stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class _SiluMul(torch.autograd.Function):
    """silu(gate)·up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        n, i = _rows(gate)
        _silu_mul[(n, triton.cdiv(i, COLUMNS))](gate, up, out, i, COLUMNS=COLUMNS)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        n, i = _rows(gate)
        grid = (n, triton.cdiv(i, COLUMNS))
        _silu_mul_backward[grid](grad.contiguous(), gate, up, grad_gate, grad_up, i, COLUMNS=COLUMNS)
        return grad_gate, grad_up


def _rows(x: Tensor) -> tuple[int, int]:
    assert x.is_contiguous(), "the output of a linear layer is contiguous"
    return x.shape[:-1].numel(), x.shape[-1]


@triton.jit
def _silu_mul(gate, up, out, i, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = tl.program_id(0).to(tl.int64) * i + columns
    g = tl.load(gate + offsets, mask=columns < i, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask=columns < i, other=0.0).to(tl.float32)
    tl.store(out + offsets, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=columns < i)


@triton.jit
def _silu_mul_backward(grad, gate, up, grad_gate, grad_up, i, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = tl.program_id(0).to(tl.int64) * i + columns
    d = tl.load(grad + offsets, mask=columns < i, other=0.0).to(tl.float32)
    g = tl.load(gate + offsets, mask=columns < i, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask=columns < i, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    tl.store(grad_up + offsets, (d * silu).to(grad_up.dtype.element_ty), mask=columns < i)
    derivative = s + silu * (1 - s)
    tl.store(grad_gate + offsets, (d * u * derivative).to(grad_gate.dtype.element_ty), mask=columns < i)


class _QuickGelu(torch.autograd.Function):
    """x·sigmoid(1.702·x)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        n, i = _rows(x)
        _quick_gelu[(n, triton.cdiv(i, COLUMNS))](x, out, i, COLUMNS=COLUMNS)
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        n, i = _rows(x)
        _quick_gelu_backward[(n, triton.cdiv(i, COLUMNS))](grad.contiguous(), x, out, i, COLUMNS=COLUMNS)
        return out


@triton.jit
def _quick_gelu(x, out, i, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = tl.program_id(0).to(tl.int64) * i + columns
    v = tl.load(x + offsets, mask=columns < i, other=0.0).to(tl.float32)
    tl.store(out + offsets, (v * tl.sigmoid(1.702 * v)).to(out.dtype.element_ty), mask=columns < i)


@triton.jit
def _quick_gelu_backward(grad, x, out, i, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = tl.program_id(0).to(tl.int64) * i + columns
    d = tl.load(grad + offsets, mask=columns < i, other=0.0).to(tl.float32)
    v = tl.load(x + offsets, mask=columns < i, other=0.0).to(tl.float32)
    s = tl.sigmoid(1.702 * v)
    tl.store(out + offsets, (d * (s + 1.702 * v * s * (1 - s))).to(out.dtype.element_ty), mask=columns < i)


class _Rotate(torch.autograd.Function):
    """x·cos + rotate_half(x)·sin of x (B, H, T, D), which is a view of (B, T, H, D), as a linear wrote it."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # (B, T, H, D), its layout in memory: no copy
    b, t, h, d = x.shape
    out = torch.empty_like(x)
    heads = triton.next_power_of_2(h)
    cos, sin = cos.contiguous(), sin.contiguous()
    per_row = 0 if len(cos) == 1 else t * d
    _rotate[(b * t,)](x, cos, sin, out, t, h, d, per_row, sign, HEADS=heads, HALF=triton.next_power_of_2(d // 2))
    return out.transpose(1, 2)


@triton.jit
def _rotate(x, cos, sin, out, t, h, d, per_row, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One token: all its heads."""
    token = tl.program_id(0)
    half = tl.arange(0, HALF)
    angle = (token // t) * per_row + (token % t) * d + half
    inside = half < d // 2
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)[None, :] * sign
    heads = tl.arange(0, HEADS)
    offsets = token.to(tl.int64) * h * d + (heads[:, None] * d + half[None, :])
    mask = (heads < h)[:, None] & inside[None, :]
    first = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + offsets + d // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + offsets + d // 2, (second * c + first * s).to(out.dtype.element_ty), mask=mask)
