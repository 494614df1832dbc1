"""The model of a run on the meta device, computing as on a GPU.

On the meta device torch takes other ways than on a GPU: attention as products with a T×T matrix, norms and SwiGLU
operation by operation. Here these become operations that keep and allocate what the GPU's kernels do.

Shapes: B rows, T tokens, H heads, K key heads, D head width.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import QuickGELUActivation
from transformers.masking_utils import sdpa_mask

from llava_moslora.models.attention import LLM_FAMILIES
from llava_moslora.models.llava import Llava, TextLlm

ATTENTION = "on_meta"

_library = torch.library.Library("llava_moslora_planning", "DEF")
# "attention" in the name: selective recomputation saves the outputs of operations that are called so.
_library.define("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")


def _attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D), as it lies in memory, and the log of the softmax' denominator, float32[B, H, T]."""
    b, h, t, d = q.shape
    return q.new_empty(b, t, h, d), q.new_empty(b, h, t, dtype=torch.float32)


_library.impl("attention", _attention_op, "CompositeExplicitAutograd")


class _Attention(torch.autograd.Function):
    """Flash attention (Dao 2023; cuDNN's is alike): backward needs q, k, v and both outputs, sums dq in float32, and
    where heads share a key, dk and dv per head before it adds them up."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, log_sum = torch.ops.llava_moslora_planning.attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, log_sum = ctx.saved_tensors
        inside = [q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(log_sum)]
        if k.shape != q.shape:
            inside += [torch.empty_like(out), torch.empty_like(out)]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del inside
        return grads


def _attention(module, query, key, value, attention_mask, **others):
    return _Attention.apply(query, key, value), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _RmsNorm(torch.autograd.Function):
    """torch's fused RMSNorm: backward needs the input and one float32 per row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), None


class _SiluMul(torch.autograd.Function):
    """As the operation of the same name in :mod:`llava_moslora.models.fused_layers`."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.empty_like(gate), torch.empty_like(up)


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    return _RmsNorm.apply(x, self.weight)


def _mlp(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(_SiluMul.apply(self.gate_proj(x), self.up_proj(x)))


def compute_as_on_gpu(model: Llava | TextLlm, attention: str) -> None:
    """Replace, in a model on the meta device, what :mod:`llava_moslora.models.fused_layers` replaces on a GPU, and
    attention unless it is ``eager``."""
    if attention != "eager":
        parts = ("text_config", "vision_config") if isinstance(model, Llava) else ()
        model.set_attn_implementation(dict.fromkeys(parts, ATTENTION) if parts else ATTENTION)
    for module in getattr(model.model, "vision_tower", nn.Module()).modules():
        if isinstance(module, QuickGELUActivation):
            module.forward = _QuickGelu.apply
    config = model.config.get_text_config()
    if config.model_type not in LLM_FAMILIES:
        return
    llm: Any = getattr(model.model, "language_model", model.model)  # of an LLM alone, the model itself
    for module in llm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif type(module).__name__.endswith("MLP") and config.hidden_act == "silu":
            module.forward = MethodType(_mlp, module)
