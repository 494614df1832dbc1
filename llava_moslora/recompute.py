"""Activation checkpointing of the layers of LLM and vision tower: what ``--recompute`` makes backward recompute.

none       nothing: fastest, most memory
every:N    every N-th layer
selective  in every layer of the LLM, cheap operations (norms, activations, rotary embedding, residuals); outputs of
           linear layers and attention are saved, so no matrix product runs twice; nothing in the vision tower
full       every layer: slowest, least memory

All give the same losses and gradients: dropout's masks are functions of a seed that recomputation restores.

The tower's layers are small: they take a twentieth of the activation memory of a step with selective recomputation,
but they are launch-bound, and recomputation would double the number of launches.

Selective is torch's checkpoint with a list of saved outputs. Adapted linears save and load theirs themselves
(adapters/linear.py); for attention and other linear layers a dispatch mode does it, which is on only around them.
torch's own ``create_selective_checkpoint_contexts`` keeps its mode on all the time, which costs more host time than the
rest of a layer. For an adapter of stock PEFT only the frozen linear layer's output is saved, and its own products run
again: they may be as large as the weight (DoRA, LoHa).
"""

from __future__ import annotations

import inspect
import re
import threading
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_moslora.config import parse_recompute
from llava_moslora.private_api import check_private_api

check_private_api("recompute")

# Layer → its last linear, whose output backward does not need: it is only added to the residual.
LAST_LINEAR = {f"{name}DecoderLayer": "mlp.down_proj" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
LAST_LINEAR |= {"CLIPEncoderLayer": "mlp.fc2", "SiglipEncoderLayer": "mlp.fc2"}
VISION_TOWER = re.compile(r"\bvision_tower\b")  # in the name of a layer
SAVING_ATTENTION: set[str] = set()  # implementations whose function saves its output itself
Output = Any  # of an operation: a tensor, or a flat tuple or list of tensors and others
_state = threading.local()  # backward recomputes in a thread of its own


class SavedOutputs:
    """Outputs of operations of one layer in one forward, in the order of computation.

    Args:
        selective: False: nothing is saved, and everything runs again.
    """

    def __init__(self, selective: bool = True):
        self.selective = selective
        self.outputs: list[tuple[str, Output, list[int]] | None] = []
        self.next: int | None = None  # index of the next output to load; None while the layer runs for the first time
        self.in_mode = False  # a _SaveOperations mode is on already
        self.paused = False  # inside an adapter of stock PEFT: its operations just run again
        self.overwritten = False  # what is saved may be overwritten by its caller

    @property
    def recomputing(self) -> bool:
        return self.next is not None

    def save(self, operation: str, output: Output) -> None:
        """Save a tensor, or a flat tuple with tensors in it, without the autograd graph."""
        if not self.selective:
            return
        detached = tuple(part.detach() if isinstance(part, Tensor) else part for part in _parts(output))
        saved = detached if isinstance(output, tuple | list) else detached[0]
        self.outputs.append((operation, saved, _versions(detached)))

    def load(self, operation: str) -> Output:
        """The next output, which must be of this operation, and is released here."""
        if self.next is None or self.next >= len(self.outputs):
            raise RuntimeError(f"{operation} runs only while recomputing")
        entry, self.outputs[self.next] = self.outputs[self.next], None
        if entry is None:
            raise RuntimeError("a second backward through a layer that recomputes selectively")
        saved_operation, output, versions = entry
        if saved_operation != operation:
            raise RuntimeError(f"while recomputing, {operation} runs in place of {saved_operation}")
        self.next += 1
        if _versions(_parts(output)) != versions:
            raise RuntimeError("a saved output was overwritten before backward")
        return output


def _parts(output: Output) -> tuple | list:
    return output if isinstance(output, tuple | list) else (output,)


def _versions(parts: tuple | list) -> list[int]:
    """They grow when a tensor is overwritten."""
    return [part._version for part in parts if isinstance(part, Tensor)]


def saved_outputs() -> SavedOutputs | None:
    """Of the layer that is running; None in a layer that recomputes nothing."""
    return getattr(_state, "outputs", None)


class _LayerContext:
    """Tells the layer that runs inside whether to save outputs, or to recompute and load what was saved."""

    def __init__(self, outputs: SavedOutputs, recomputing: bool):
        self.outputs, self.recomputing = outputs, recomputing

    def __enter__(self):
        self.before = saved_outputs()
        self.outputs.next = 0 if self.recomputing else None
        _state.outputs = self.outputs

    def __exit__(self, *error):
        _state.outputs = self.before


def _contexts(selective: bool):
    """``context_fn`` of torch's checkpoint: contexts for forward and for recomputing."""
    outputs = SavedOutputs(selective)
    return _LayerContext(outputs, False), _LayerContext(outputs, True)


class _SaveOperations(TorchDispatchMode):
    """Saves or loads the outputs of matrix products and attention; other operations just run."""

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
        if self.outputs.paused or not (named or operation in self.products):
            return operation(*args, **(kwargs or {}))
        name = operation._schema.name
        if self.outputs.recomputing:
            return self.outputs.load(name)
        output = operation(*args, **(kwargs or {}))
        # ZeRO-3 replaces F.linear by a product to which the bias is added in place.
        overwritten = self.outputs.overwritten or not inspect.isbuiltin(F.linear)
        self.outputs.save(name, output.clone() if overwritten and operation in self.products else output)
        return output


def in_foreign_mode() -> bool:
    """Whether a dispatch mode is on that is not this module's, such as torch's FLOP counter."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(not isinstance(mode, _SaveOperations) for mode in _get_current_dispatch_mode_stack())


def save_operations():
    """A context that saves or loads matrix products and attention, under selective recomputation; else an empty one."""
    outputs = saved_outputs()
    if outputs is None or outputs.in_mode or not outputs.selective:
        return nullcontext()
    return _SaveOperations(outputs)


def _saving_forward(forward, *args, **kwargs):
    with save_operations():
        return forward(*args, **kwargs)


def _stock_forward(forward, in_adapter, *args, **kwargs):
    """``forward`` of an adapter of stock PEFT (``in_adapter``), or of the frozen linear inside it: PEFT may add the
    adapter's branch to the linear's output in place (AdaLoRA)."""
    outputs = saved_outputs()
    if outputs is None:
        return forward(*args, **kwargs)
    before = outputs.paused, outputs.overwritten
    outputs.paused, outputs.overwritten = in_adapter, True
    try:
        with nullcontext() if in_adapter else save_operations():
            return forward(*args, **kwargs)
    finally:
        outputs.paused, outputs.overwritten = before


def set_recompute(model: nn.Module, text: str) -> None:
    """Set ``--recompute`` for the layers of LLM and vision tower; it acts in training mode only. Called once, on the
    complete model: the vision tower is recognised by its name in it.

    Raises:
        Refusal: C-FLAG, see :func:`parse_recompute`.
    """
    mode, n = parse_recompute(text)
    checkpointed = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, mode == "selective"))
    named = model.named_modules()
    layers = {name: module for name, module in named if isinstance(module, GradientCheckpointingLayer)}
    assert layers, "no layer of this model can be recomputed"
    for index, (name, layer) in enumerate(layers.items()):
        layer._gradient_checkpointing_func = checkpointed
        layer.gradient_checkpointing = recomputes(mode, n, index, in_tower=bool(VISION_TOWER.search(name)))
        if mode == "selective" and layer.gradient_checkpointing:
            _save_outputs_of(layer)
        if (last := LAST_LINEAR.get(type(layer).__name__)) and hasattr(layer.get_submodule(last), "ends_layer"):
            layer.get_submodule(last).ends_layer = True


def recomputes(mode: str, n: int, index: int, *, in_tower: bool) -> bool:
    """Whether a layer recomputes anything; ``index`` counts over both towers, ``mode`` and ``n`` are those of
    :func:`parse_recompute`."""
    if mode == "selective":
        return not in_tower
    return mode != "none" and index % n == 0


def _save_outputs_of(layer: nn.Module) -> None:
    """Make attention and linears without an adapter save their outputs; adapted linears do so themselves."""
    for name, module in layer.named_modules():
        plain_linear = isinstance(module, nn.Linear) and not re.search(r"\b(base_layer|lora_\w+)\b", name)
        if plain_linear or (name == "self_attn" and not _saves_itself(module)):
            module.forward = partial(_saving_forward, module.forward)
        elif isinstance(module, BaseTunerLayer) and not hasattr(module, "ends_layer"):  # no layer of this package
            module.forward = partial(_stock_forward, module.forward, True)
            base = module.get_base_layer()
            base.forward = partial(_stock_forward, base.forward, False)


def _saves_itself(attention: nn.Module) -> bool:
    """Whether the attention function of this module saves its output (models/attention.py): the mode is then on for
    that function alone, and not for the linears around it."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None) in SAVING_ATTENTION
