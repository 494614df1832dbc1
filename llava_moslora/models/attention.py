"""The attention implementation of LLM and vision tower, and an ``sdpa`` for the LLM that needs no T×T mask.

transformers looks the attention function up by the name in a configuration's ``_attn_implementation``. This one,
``sdpa_maskless``, is its ``sdpa`` for everything except the training forward of
:class:`~llava_moslora.models.llava.Llava`, which passes an empty mask (:func:`empty_mask`): it means causal attention
within each sequence, which torch's causal and variable-length kernels compute without a mask. transformers passes
4-dimensional masks through unchanged, so it builds none, and does not synchronise. This implementation also saves its
output itself under selective recomputation.

Shapes: B rows, T tokens, H heads, K key heads, D head width, R records of packed rows, each row's padding being one.
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
from llava_moslora.recompute import SAVING_ATTENTION, save_operations

MASKLESS = "sdpa_maskless"
# LLMs with only causal attention, in some layers with a window (others keep transformers' masks), and with layers of
# RMSNorm, SwiGLU and rotary embedding.
LLM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# torch 2.11 accepts fewer key heads than heads, later versions only with this option
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention implementation of the LLM and the vision tower of a loaded LLaVA, or of an LLM alone. They were
    loaded with ``sdpa``; an LLM of a known family then gets ``sdpa_maskless``.

    Raises:
        Refusal: C-MODEL, a part has no such implementation.
    """
    text = model.config.get_text_config()
    if implementation == "sdpa":
        if text.model_type in LLM_FAMILIES and text._attn_implementation == "sdpa":
            model.set_attn_implementation(MASKLESS if text is model.config else {"text_config": MASKLESS})
        return
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise Refusal(
            "C-MODEL", "a part of this model does not support this implementation", key="--attn_implementation",
            found=f"{implementation}: {error}".splitlines()[0], fix="use sdpa, which every part supports",
        ) from error  # fmt: skip


def can_omit_mask(config: PreTrainedConfig, embeds: Tensor, *, packed: bool) -> bool:
    """Whether :func:`attention_forward` can compute a batch without left padding from :func:`empty_mask`.

    Args:
        config: the LLM's.
        embeds: float[B, T, width], the LLM's input.
        packed: several records in a row, for which there is a kernel only on a GPU in 16 bits.
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


def empty_mask(like: Tensor) -> Tensor:
    """A 4-dimensional mask without values: to :func:`attention_forward` it means causal within each sequence."""
    return like.new_empty(0, 0, 0, 0)


def attention_forward(
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
    """With the signature that transformers calls attention functions with.

    Args:
        query, key, value: float[B, H, T, D], float[B, K, T, D] twice.
        attention_mask: bool or float[B, 1, T, T], None, or :func:`empty_mask`.
        sliding_window: how many tokens, itself included, a token attends to; a mask with values contains it already.
        cu_seq_lens_q: int32[R+1], where the records begin in the flattened B·T, and its end; only with ``empty_mask``.
        max_length_q: the longest record's tokens.

    Returns:
        float[B, T, H, D], and None for the attention weights, which are not computed.
    """
    if attention_mask is not None and attention_mask.numel() == 0:
        if cu_seq_lens_q is not None:
            window = (-1 if sliding_window is None else sliding_window - 1, 0)
            flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B·T, H or K, D)
            lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
            with save_operations():
                out = varlen_attn(*flat, *lengths, scale=scaling, window_size=window, **GQA)
            return out.unflatten(0, (query.shape[0], -1)), None
        attention_mask = None
    with save_operations():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )


SAVING_ATTENTION.add(MASKLESS)
AttentionInterface.register(MASKLESS, attention_forward)
AttentionMaskInterface.register(MASKLESS, sdpa_mask)
