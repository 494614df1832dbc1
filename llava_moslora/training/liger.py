"""Liger's fused kernels for the LLM's layers: RMSNorm, SwiGLU and the rotary embedding, on a GPU.

Liger is an optional package (``pip install 'llava_moslora[liger]'``), used on GPUs wherever it is installed.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from torch import Tensor, nn


def is_usable() -> bool:
    """Whether there is a GPU, and the package."""
    return torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


# What Liger is asked to replace through the Trainer. The loss is ours (models/llava.py); Liger's rotary embedding
# writes over its inputs, which selective recomputation keeps.
CONFIG = {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}


def fuse_rotary_embedding(llm: nn.Module) -> None:
    """Let the layers of ``llm`` use Liger's rotary embedding on copies of queries and keys.

    As Liger's own patches do, this replaces ``apply_rotary_pos_emb`` in the module that defines the LLM's class.
    """
    modeling = sys.modules[type(llm).__module__]
    assert hasattr(modeling, "apply_rotary_pos_emb"), f"{modeling.__name__} has another rotary embedding"
    modeling.apply_rotary_pos_emb = _rotary_embedding


def _rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q (B, heads, T, head width), k (B, key heads, T, head width), rotated; the inputs stay as they are."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb  # an optional package

    if not q.is_cuda:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return liger_rotary_pos_emb(q.clone(), k.clone(), cos, sin, unsqueeze_dim=unsqueeze_dim)
