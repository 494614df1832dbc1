"""What backward recomputes instead of keeping it: activation checkpointing of the layers of both towers.

none       nothing: fastest, needs the most memory
every:N    every N-th layer whole
selective  in every layer what is cheap (norms, activations, rotary embedding, residuals); the outputs of linears and of
           attention are kept, so that no matrix product runs twice
full       every layer whole: slowest, needs the least memory

Losses and gradients are the same in all of them: dropout's masks are functions of a seed that recomputation restores.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_moslora.adapters import linear
from llava_moslora.errors import Refusal

MODES = "none | full | selective | every:N"

# Besides attention, whose kernel depends on the device. ``mm`` and ``addmm`` are linears without an adapter, or with
# one that is computed apart from them (ZeRO-3); the adapter's part of those is recomputed.
_KEPT = {linear.OPERATION, torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
_KEPT_NAMES = ("attention", "attn", "gemm_4bit")


def parse_recompute(text: str) -> tuple[str, int]:
    """``--recompute``'s value as (mode, N): ("none", 0), ("full", 1), ("selective", 1) or ("full", N) for every:N.

    Raises:
        Refusal: C-FLAG for anything else.
    """
    if text in ("none", "full", "selective"):
        return text, int(text != "none")
    name, _, count = text.partition(":")
    if name == "every" and count.isdecimal() and int(count) > 0:
        return "full", int(count)
    raise Refusal("C-FLAG", "unknown way to recompute", key="--recompute", found=text, expected=MODES)


def set_recompute(model: nn.Module, text: str) -> None:
    """Let every layer of both towers recompute as ``--recompute`` says; in training mode only.

    Raises:
        Refusal: C-FLAG, see :func:`parse_recompute`.
    """
    mode, n = parse_recompute(text)
    again = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers, "no layer of this model can be recomputed"
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = again
        layer.gradient_checkpointing = mode != "none" and index % n == 0


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    kept = operation in _KEPT or any(name in str(operation) for name in _KEPT_NAMES)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
