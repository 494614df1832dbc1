"""Which attention each tower computes, and the LLM's without a T×T mask: torch's causal and variable-length kernels.

transformers looks the function up under the name in a configuration's ``_attn_implementation``. Ours is its ``sdpa``,
but for the training forward of :class:`~llava_moslora.models.llava.Llava`, which hands over an empty mask
(:func:`no_mask`): then causal attention within each sequence is all there is to it. Masks with four dimensions go
through transformers as they are, so none is made there, and no value of the batch is looked at.

Shapes: B lines, T tokens, H heads, K key heads, D a head's width, R records of packed lines, their padding included.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava_moslora.errors import Refusal

MASKLESS = "sdpa_maskless"
# LLMs whose attention is causal, in some layers with a window, and nothing else (others keep transformers' masks), and
# whose layers are made of RMSNorm, SwiGLU and rotary embedding.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# torch 2.11 takes fewer key heads than heads as they are, later versions when told to
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """``implementation``, one of ``config.ATTENTION_IMPLEMENTATIONS``, in the LLM and the vision tower of a loaded
    LLaVA. They were loaded with ``sdpa``, which becomes ours in an LLM of a known family.

    Raises:
        Refusal: C-MODEL, a part has no such implementation.
    """
    text = model.config.text_config
    if implementation == "sdpa":
        if text.model_type in FAMILIES and text._attn_implementation == "sdpa":
            model.set_attn_implementation({"text_config": MASKLESS})
        return
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise Refusal(
            "C-MODEL", "a part of this model cannot compute its attention so", key="--attn_implementation",
            found=f"{implementation}: {error}".splitlines()[0], fix="sdpa, which every part has",
        ) from error  # fmt: skip


def needs_no_mask(config: PreTrainedConfig, embeds: Tensor, *, packed: bool) -> bool:
    """Whether :func:`attend` can compute a batch without left padding from :func:`no_mask`.

    Args:
        config: the LLM's.
        embeds: float[B, T, width], the LLM's input.
        packed: several records in a line; for that only 16-bit numbers on a GPU have a kernel.
    """
    if config._attn_implementation != MASKLESS:
        return False
    if packed:
        return has_varlen_kernel(embeds) and not config.attention_dropout
    window = getattr(config, "sliding_window", None)
    return window is None or embeds.shape[1] < window


def has_varlen_kernel(x: Tensor) -> bool:
    """Whether torch's variable-length flash attention runs on tensors like ``x``."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 0)


def no_mask(like: Tensor) -> Tensor:
    """The mask with four dimensions and no values that :func:`attend` takes for "causal within each sequence"."""
    return like.new_empty(0, 0, 0, 0)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others,
) -> tuple[Tensor, None]:
    """transformers' signature of an attention function.

    Args:
        query, key, value: float[B, H, T, D], float[B, K, T, D] twice.
        attention_mask: bool or float[B, 1, T, T], None, or :func:`no_mask`.
        sliding_window: how many tokens, itself included, a token sees; a mask with values has it already.
        cu_seq_lens_q: int32[R+1], where the records begin in the flattened B·T, and its end; for ``no_mask`` alone.
        max_length_q: the longest record's tokens.

    Returns:
        float[B, T, H, D], and None for the weights, which are never made.
    """
    if attention_mask is not None and attention_mask.numel() == 0:
        if cu_seq_lens_q is not None:
            window = (-1 if sliding_window is None else sliding_window - 1, 0)
            flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B·T, H or K, D)
            lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
            out = varlen_attn(*flat, *lengths, scale=scaling, window_size=window, **GQA)
            return out.unflatten(0, (query.shape[0], -1)), None
        attention_mask = None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)


AttentionInterface.register(MASKLESS, attend)
AttentionMaskInterface.register(MASKLESS, sdpa_mask)
