"""What backward recomputes instead of keeping it: activation checkpointing of the layers of both towers.

none       nothing: fastest, needs the most memory
every:N    every N-th layer whole
selective  in every layer what is cheap (norms, activations, rotary embedding, residuals); the outputs of linears and of
           attention are kept, so that no matrix product runs twice
full       every layer whole: slowest, needs the least memory

Losses and gradients are the same in all of them: dropout's masks are functions of a seed that recomputation restores.

Selective is torch's checkpoint with a list of kept outputs beside it. The adapted linears put theirs there and take
them back themselves (adapters/linear.py); operations of attention and of other linears do so through a dispatch mode
that is on around them alone. torch's own ``create_selective_checkpoint_contexts`` does the same through a mode that is
on all the time, which takes more of the host's time than everything else in a layer.
"""

from __future__ import annotations

import inspect
import re
import threading
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_moslora.config import RECOMPUTE_MODES
from llava_moslora.errors import Refusal
from llava_moslora.private_api import check_private_api

check_private_api("recompute")

_state = threading.local()  # backward recomputes in a thread of its own


class Kept:
    """Outputs of one forward of one layer, in the order in which they were made."""

    def __init__(self):
        self.outputs: list[tuple[str, object, list[int]] | None] = []
        self.next: int | None = None  # while recomputing: which comes next
        self.watched = False  # a mode is on already

    @property
    def recomputing(self) -> bool:
        return self.next is not None

    def put(self, operation: str, output) -> None:
        """Keep tensors, or a structure of them, without the graph that made them."""
        versions: list[int] = []

        def detached(value):
            if not isinstance(value, Tensor):
                return value
            versions.append(value._version)
            return value.detach()

        self.outputs.append((operation, tree_map(detached, output), versions))

    def take(self, operation: str):
        """The next output, once; it must be of the same operation."""
        assert self.next < len(self.outputs), f"{operation} runs only where backward recomputes"
        entry, self.outputs[self.next] = self.outputs[self.next], None
        assert entry is not None, "a second backward through a layer that recomputes selectively"
        kept_operation, output, versions = entry
        assert kept_operation == operation, f"recomputing, {operation} comes in the place of {kept_operation}"
        self.next += 1
        found: list[int] = []
        tree_map(lambda value: found.append(value._version) if isinstance(value, Tensor) else None, output)
        assert found == versions, "an output that is kept for backward was written over"
        return output


def kept() -> Kept | None:
    """Where the layer that runs now keeps outputs; None outside of selective recomputation."""
    return getattr(_state, "kept", None)


class _Keeping:
    """A context in which the layer that runs keeps its outputs, or takes them back."""

    def __init__(self, outputs: Kept, recomputing: bool):
        self.outputs, self.recomputing = outputs, recomputing

    def __enter__(self):
        self.before = kept()
        self.outputs.next = 0 if self.recomputing else None
        _state.kept = self.outputs

    def __exit__(self, *error):
        _state.kept = self.before


def _contexts():
    outputs = Kept()
    return _Keeping(outputs, False), _Keeping(outputs, True)


class _KeepOperations(TorchDispatchMode):
    """Matrix products of linears, and attention, are kept or taken back; everything else runs."""

    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __init__(self, outputs: Kept):
        super().__init__()
        self.outputs = outputs

    def __enter__(self):
        self.outputs.watched = True
        return super().__enter__()

    def __exit__(self, *error):
        self.outputs.watched = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        named = any(part in operation._schema.name for part in ("attention", "attn", "gemm_4bit"))
        if not named and operation not in self.products:
            return operation(*args, **(kwargs or {}))
        name = operation._schema.name
        if self.outputs.recomputing:
            return self.outputs.take(name)
        output = operation(*args, **(kwargs or {}))
        # ZeRO-3 replaces F.linear by a product to which the bias is added in place.
        overwritten = operation in self.products and not inspect.isbuiltin(F.linear)
        self.outputs.put(name, output.clone() if overwritten else output)
        return output


def keep_operations():
    """A context in which matrix products and attention are kept, if the layer that runs now keeps outputs."""
    outputs = kept()
    return nullcontext() if outputs is None or outputs.watched else _KeepOperations(outputs)


def _kept_forward(forward, *args, **kwargs):
    with keep_operations():
        return forward(*args, **kwargs)


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
    raise Refusal("C-FLAG", "unknown way to recompute", key="--recompute", found=text, expected=RECOMPUTE_MODES)


def set_recompute(model: nn.Module, text: str) -> None:
    """Let every layer of both towers recompute as ``--recompute`` says; in training mode only. Called once.

    Raises:
        Refusal: C-FLAG, see :func:`parse_recompute`.
    """
    mode, n = parse_recompute(text)
    again = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        again = partial(again, context_fn=_contexts)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers, "no layer of this model can be recomputed"
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = again
        layer.gradient_checkpointing = mode != "none" and index % n == 0
        if mode == "selective":
            _keep_in(layer)


def _keep_in(layer: nn.Module) -> None:
    """Attention and linears without an adapter keep their outputs; linears with one do that themselves."""
    for name, module in layer.named_modules():
        own_linear = isinstance(module, nn.Linear) and not re.search(r"\b(base_layer|lora_\w+)\b", name)
        if own_linear or name == "self_attn":
            module.forward = partial(_kept_forward, module.forward)
    if (last := _LAST_LINEAR.get(type(layer).__name__)) and hasattr(layer.get_submodule(last), "ends_layer"):
        layer.get_submodule(last).ends_layer = True


# Layer → its last linear, where what that returns is only added to the residual: nothing that backward needs needs it.
_LAST_LINEAR = {f"{name}DecoderLayer": "mlp.down_proj" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
_LAST_LINEAR |= {"CLIPEncoderLayer": "mlp.fc2", "SiglipEncoderLayer": "mlp.fc2"}
