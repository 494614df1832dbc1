"""--recompute: what backward recomputes instead of keeping it; activation checkpointing of the layers of both towers.

none       nothing: fastest, needs the most memory
every:N    every N-th layer whole
selective  in every layer what is cheap (norms, activations, rotary embedding, residuals); the outputs of linears and of
           attention are saved, so that no matrix product runs twice
full       every layer whole: slowest, needs the least memory

Losses and gradients are the same in all of them: dropout's masks are functions of a seed that recomputation restores.

Selective is torch's checkpoint with a list of saved outputs next to it. The adapted linears save theirs there and load
them themselves (adapters/linear.py); for attention and other linears a dispatch mode does so, which is on only around
them. torch's own ``create_selective_checkpoint_contexts`` uses a mode that is on all the time, which takes more of the
host's time than everything else in a layer.
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

# Layer → its last linear, whose output is only added to the residual: nothing that backward needs is computed from it.
LAST_LINEAR = {f"{name}DecoderLayer": "mlp.down_proj" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
LAST_LINEAR |= {"CLIPEncoderLayer": "mlp.fc2", "SiglipEncoderLayer": "mlp.fc2"}

_state = threading.local()  # backward recomputes in a thread of its own


class SavedOutputs:
    """Outputs of the operations of one layer in one forward, in the order in which they were computed."""

    def __init__(self):
        self.outputs: list[tuple[str, object, list[int]] | None] = []
        self.next: int | None = None  # index of the next output to load; None while the layer runs for the first time
        self.in_mode = False  # a _SaveOperations mode is on already

    @property
    def recomputing(self) -> bool:
        return self.next is not None

    def save(self, operation: str, output) -> None:
        """Save tensors, or a structure of them, without their autograd graph."""
        versions: list[int] = []

        def detached(value):
            if not isinstance(value, Tensor):
                return value
            versions.append(value._version)
            return value.detach()

        self.outputs.append((operation, tree_map(detached, output), versions))

    def load(self, operation: str):
        """The next output, once; it must be of the same operation."""
        assert self.next < len(self.outputs), f"{operation} runs only while recomputing"
        entry, self.outputs[self.next] = self.outputs[self.next], None
        assert entry is not None, "a second backward through a layer that recomputes selectively"
        saved_operation, output, versions = entry
        assert saved_operation == operation, f"while recomputing, {operation} runs in place of {saved_operation}"
        self.next += 1
        found: list[int] = []
        tree_map(lambda value: found.append(value._version) if isinstance(value, Tensor) else None, output)
        assert found == versions, "a saved output was overwritten before backward"
        return output


def saved_outputs() -> SavedOutputs | None:
    """Of the layer that runs now; None outside of selective recomputation."""
    return getattr(_state, "outputs", None)


class _LayerContext:
    """A context in which the layer that runs saves its outputs, or loads them."""

    def __init__(self, outputs: SavedOutputs, recomputing: bool):
        self.outputs, self.recomputing = outputs, recomputing

    def __enter__(self):
        self.before = saved_outputs()
        self.outputs.next = 0 if self.recomputing else None
        _state.outputs = self.outputs

    def __exit__(self, *error):
        _state.outputs = self.before


def _contexts():
    """As torch's checkpoint wants them: one for forward, one for recomputing."""
    outputs = SavedOutputs()
    return _LayerContext(outputs, False), _LayerContext(outputs, True)


class _SaveOperations(TorchDispatchMode):
    """Saves or loads the matrix products of linears, and attention; everything else runs."""

    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __init__(self, outputs: SavedOutputs):
        super().__init__()
        self.outputs = outputs

    def __enter__(self):
        self.outputs.in_mode = True
        return super().__enter__()

    def __exit__(self, *error):
        self.outputs.in_mode = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        named = any(part in operation._schema.name for part in ("attention", "attn", "gemm_4bit"))
        if not named and operation not in self.products:
            return operation(*args, **(kwargs or {}))
        name = operation._schema.name
        if self.outputs.recomputing:
            return self.outputs.load(name)
        output = operation(*args, **(kwargs or {}))
        # ZeRO-3 replaces F.linear by a product to which the bias is added in place.
        overwritten = operation in self.products and not inspect.isbuiltin(F.linear)
        self.outputs.save(name, output.clone() if overwritten else output)
        return output


def save_operations():
    """A context in which matrix products and attention are saved or loaded, if the layer that runs now does so."""
    outputs = saved_outputs()
    return nullcontext() if outputs is None or outputs.in_mode else _SaveOperations(outputs)


def _saving_forward(forward, *args, **kwargs):
    with save_operations():
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
    """Make the layers of both towers recompute according to ``--recompute``; only in training mode. Called once.

    Raises:
        Refusal: C-FLAG, see :func:`parse_recompute`.
    """
    mode, n = parse_recompute(text)
    checkpointed = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        checkpointed = partial(checkpointed, context_fn=_contexts)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers, "no layer of this model can be recomputed"
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = checkpointed
        layer.gradient_checkpointing = mode != "none" and index % n == 0
        if mode == "selective":
            _save_outputs_of(layer)


def _save_outputs_of(layer: nn.Module) -> None:
    """Make attention and the linears without an adapter save their outputs; linears with one do so themselves."""
    for name, module in layer.named_modules():
        plain_linear = isinstance(module, nn.Linear) and not re.search(r"\b(base_layer|lora_\w+)\b", name)
        if plain_linear or name == "self_attn":
            module.forward = partial(_saving_forward, module.forward)
    if (last := LAST_LINEAR.get(type(layer).__name__)) and hasattr(layer.get_submodule(last), "ends_layer"):
        layer.get_submodule(last).ends_layer = True
