"""What a micro-batch allocates in forward and backward: each part of the model measured on the meta device.

One layer is run, whatever the number of layers, with the given ``--recompute``; no formula has to be kept in sync with
the code.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from llava_moslora.config import parse_recompute
from llava_moslora.models.assemble import model_on_meta
from llava_moslora.models.attention import empty_mask
from llava_moslora.models.llava import Llava, TextLlm
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.planning.meter import ROUNDED_TO, Cost, Inside, measure
from llava_moslora.planning.on_meta import compute_as_on_gpu
from llava_moslora.planning.setting import Batch, Model
from llava_moslora.planning.states import NF4_BLOCK
from llava_moslora.recompute import recomputes, set_recompute

SCALARS = 4 * ROUNDED_TO  # the loss, what it is divided by, their gradients
# Of adapters.triton_dropout, which imports Triton
KERNEL = {"PROGRAMS": 528, "ROWS": 64, "COLUMNS": 64, "RANK": 128}


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one GPU.

    Args:
        inputs: the batch itself: ids, labels and positions in int64, images in the model's dtype; the rotary tables.
        tower, projector, llm: saved between forward and backward; ``llm`` of all layers.
        loss: saved by the final norm and the cross entropy.
        in_loss: peak beyond all saved tensors in the loss, including its own saved tensors.
        in_layer: peak beyond all saved tensors except the loss's, in backward of an LLM layer.
        in_tower: peak beyond the tensors saved by tower and projector, in their backward.
    """

    inputs: int
    tower: int
    projector: int
    llm: int
    loss: int
    in_loss: int
    in_layer: int
    in_tower: int

    @property
    def kept(self) -> int:
        return self.tower + self.projector + self.llm

    @property
    def working(self) -> int:
        """Peak beyond ``inputs`` and ``kept``: it is at the loss, when everything is saved, in the first layer that
        runs backward, or, if the LLM saves little, in the vision tower."""
        return max(self.in_loss, self.in_layer, self.in_tower - self.llm)


@lru_cache(maxsize=256)
def activations(model: Model, recompute: str, batch: Batch) -> Activations:
    """Activations of the largest micro-batch in ``model``."""
    mode, n = parse_recompute(recompute)
    small = _small_model(model, mode == "selective")
    # by a layer's index over vision tower and LLM, as in set_recompute: the tower's come first
    tower_layers, llm_layers = model.tower_layers, model.llm_config.num_hidden_layers
    of_tower = [recomputes(mode, n, index, in_tower=True) for index in range(tower_layers)]
    of_llm = [recomputes(mode, n, tower_layers + index, in_tower=False) for index in range(llm_layers)]
    first = _llm_layer_cost(small, batch.rows, batch.tokens, of_llm[0], small.embeddings_have_gradient)
    layers = {
        on: _llm_layer_cost(small, batch.rows, batch.tokens, on, small.llm_has_gradient) for on in set(of_llm[1:])
    }
    tower = {on: _tower_layer_cost(small, batch.images, on) for on in set(of_tower)}
    projected = Cost(0, 0, 0)
    if small.tower is not None:
        projected = _projector_cost(small, batch.images, batch.rows * batch.tokens)
    loss = _loss_cost(small, batch.rows, batch.tokens, batch.labels)
    return Activations(
        inputs=_inputs(model, batch),
        tower=sum(tower[on].kept for on in of_tower),
        projector=projected.kept,
        llm=first.kept + sum(layers[on].kept for on in of_llm[1:]),
        loss=loss.kept,
        in_loss=max(loss.forward, loss.kept + loss.backward),
        in_layer=max(cost.backward for cost in (first, *layers.values())),
        in_tower=max(projected.backward, *(max(c.backward, c.forward - c.kept) for c in tower.values()), 0),
    )


class _Small:
    """The model with one layer each in vision tower and LLM, in training mode, with or without recomputation.

    Args:
        whole: the complete model. bits: of the LLM's frozen linear layers.
    """

    def __init__(self, whole: Llava | TextLlm, bits: int, dtype: torch.dtype):
        self.whole, self.bits, self.dtype = whole, bits, dtype
        self.llm: Any = getattr(whole.model, "language_model", whole.model)  # for a text-only LLM, the model itself
        self.tower: Any = getattr(whole.model, "vision_tower", None)
        self.projector: Any = getattr(whole.model, "multi_modal_projector", None)

    @property
    def tower_trained(self) -> bool:
        return any(p.requires_grad for p in self.tower.parameters())

    @property
    def embeddings_have_gradient(self) -> bool:
        """Whether the input of the LLM's first layer has a gradient: if the projector is trained."""
        return self.projector is not None and any(p.requires_grad for p in self.projector.parameters())

    @property
    def llm_has_gradient(self) -> bool:
        """Whether the input of its other layers has one: if adapters precede them."""
        return self.embeddings_have_gradient or any(p.requires_grad for p in self.llm.layers.parameters())


@lru_cache(maxsize=16)
def _small_model(model: Model, selective: bool) -> _Small:
    llm, vision = copy.deepcopy(model.llm_config), copy.deepcopy(model.vision_config)
    if vision is not None:
        vision.num_hidden_layers = 2  # the last one is cut off
    llm.num_hidden_layers = 1
    if getattr(llm, "layer_types", None):
        llm.layer_types = llm.layer_types[:1]
    small = model_on_meta(llm, vision, model.adapter, model.dtype).train()
    inner = small.get_base_model() if isinstance(small, PeftModel) else small
    compute_as_on_gpu(inner, model.attention)
    set_recompute(small, "selective" if selective else "full")
    if model.partitioned:  # ZeRO-3 hooks every module: frozen linear layers run separately, the loss in one piece
        for module in inner.modules():
            module.register_forward_pre_hook(lambda *_: None)
        inner.lm_head.weight.ds_id = 0
    return _Small(inner, model.bits, model.dtype)


class _Stop(Exception):
    """Ends a forward at the layer whose arguments are recorded."""


def _layer_arguments(part: nn.Module, layer: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
    """What ``layer`` is called with when ``part`` is called."""
    found = []

    def note(module, args, kwargs):
        found.append((args, kwargs))
        raise _Stop

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        part(*args, **kwargs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _layer_cost(
    layer: nn.Module, arguments: tuple[tuple, dict], recomputed: bool, requires_grad: bool, inside: Inside
) -> Cost:
    (x, *args), kwargs = arguments
    layer.gradient_checkpointing = recomputed

    def run(x: Tensor) -> Tensor:
        output = layer(x, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    return measure(layer, run, torch.empty_like(x).requires_grad_(requires_grad), inside, (args, kwargs))


@lru_cache(maxsize=256)
def _llm_layer_cost(small: _Small, rows: int, tokens: int, recomputed: bool, requires_grad: bool) -> Cost:
    x = torch.empty(rows, tokens, small.llm.config.hidden_size, dtype=small.dtype, device="meta")
    layer, settings = small.llm.layers[0], {"attention_mask": empty_mask(x), "use_cache": False}
    with torch.no_grad():
        arguments = _layer_arguments(small.llm, layer, inputs_embeds=x, **settings)
    return _layer_cost(layer, arguments, recomputed, requires_grad, _inside(small.bits))


@lru_cache(maxsize=256)
def _tower_layer_cost(small: _Small, images: int, recomputed: bool) -> Cost:
    layer, size = small.tower.encoder.layers[0], small.whole.config.vision_config.image_size
    with torch.no_grad():
        pixels = torch.empty(images, 3, size, size, dtype=small.dtype, device="meta")
        arguments = _layer_arguments(small.tower, layer, pixels)
    return _layer_cost(layer, arguments, recomputed, small.tower_trained, _inside(16))


@lru_cache(maxsize=256)
def _projector_cost(small: _Small, images: int, positions: int) -> Cost:
    """From the tower's patches to the LLM's input; inserting the features saves them (``index_copy``).

    Args:
        positions: of all rows of the batch.
    """
    config = small.whole.config
    patches = images * tokens_per_image(config.vision_config)
    x = torch.empty(patches, config.vision_config.hidden_size, dtype=small.dtype, device="meta")
    embeds = torch.empty(positions, config.text_config.hidden_size, dtype=small.dtype, device="meta")
    places = torch.empty(patches, dtype=torch.long, device="meta")

    def run(x: Tensor) -> Tensor:
        return embeds.index_copy(0, places, small.projector(x))

    return measure(small.projector, run, x.requires_grad_(small.tower_trained), others=(embeds, places))


@lru_cache(maxsize=256)
def _loss_cost(small: _Small, rows: int, tokens: int, labels: int) -> Cost:
    """Of the LLM's final norm and the loss at the positions with a label."""
    positions = torch.empty(labels, dtype=torch.long, device="meta")
    x = torch.empty(rows, tokens, small.llm.config.hidden_size, dtype=small.dtype, device="meta")

    def run(x: Tensor) -> Tensor:
        hidden = small.llm.norm(x).flatten(0, 1).index_select(0, positions)
        return small.whole._summed_loss(hidden, positions)[0]

    return measure(small.whole, run, x.requires_grad_(), others=positions)


def _inputs(model: Model, batch: Batch) -> int:
    """Ids and labels (B, T), positions of labels and placeholders, images in the model's dtype; and what the LLM makes
    of the tokens' positions, (1, T), or (B, T) of packed rows: cosines and sines for each dimension of a head."""
    pixels = 0 if model.vision_config is None else batch.images * 3 * model.vision_config.image_size**2
    places = batch.images * model.image_tokens + 3 * batch.labels  # where they are, the tokens before them, the labels
    llm = model.llm_config
    head = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    positions = batch.tokens * (batch.rows if batch.packed else 1)
    rotary = positions * (8 + 2 * head * model.dtype.itemsize)
    return SCALARS + rotary + 8 * (2 * batch.rows * batch.tokens + places) + pixels * model.dtype.itemsize


def _inside(bits: int) -> Inside:
    """Allocations inside adapted linear layers (:mod:`llava_moslora.adapters.linear`), N rows, rank r, widths I and O.

    Both ways u and its product with the mixer (N, r); backward their gradient, and the gradient of A (r, I) in float32,
    which a GPU sums in parts. Over NF4 the weight in 16 bits and its scales in float32, made for one product and freed.
    """

    def inside(name: str, args: tuple) -> int:
        if not name.startswith("llava_moslora::adapted_linear"):
            return 0
        backward = name.endswith("backward")
        (x, weight), a = args[backward : backward + 2], args[9]
        rows = x.shape[:-1].numel()
        size = rows * len(a) * x.element_size() * (3 if backward else 2)
        if backward:
            size += gradient_parts(rows, *a.shape)
        if bits == 4:
            size += weight.element_size() * weight.numel() + 4 * (weight.numel() // NF4_BLOCK)
        return size

    return inside


def gradient_parts(n: int, r: int, i: int) -> int:
    """Bytes of the parts in which ``adapters.triton_dropout.dropped_outer`` sums A's gradient, and of their sum."""
    blocks = math.ceil(i / KERNEL["COLUMNS"]) * math.ceil(r / KERNEL["RANK"])
    rows = math.ceil(math.ceil(n / max(KERNEL["PROGRAMS"] // blocks, 1)) / KERNEL["ROWS"]) * KERNEL["ROWS"]
    return 4 * r * i * (math.ceil(n / rows) + 1)
