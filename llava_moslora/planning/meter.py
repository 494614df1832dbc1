"""What a part of a model allocates in forward and backward, counted on the meta device.

There tensors have shapes and no memory, and still every operation of a step runs. A storage is counted from the
operation that made it until neither Python nor autograd refers to it, as long as torch's caching allocator counts it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDED_TO = 512  # bytes, by torch's caching allocator

Inside = Callable[[str, tuple], int]


@dataclass(frozen=True)
class Cost:
    """Bytes that a part of the model allocates in one forward and backward.

    Args:
        kept: alive between the two. The part's input counts where backward needs it; its output is the next part's.
        forward: at most alive in forward, input and output included.
        backward: at most alive in backward beyond ``kept``, gradients of output, input and parameters included.
    """

    kept: int
    forward: int
    backward: int


class Meter(TorchDispatchMode):
    """Counts the living storages of the meta device that operations inside it have made.

    Args:
        inside: name and arguments of an operation → bytes that it allocates beyond its outputs and frees before it
            returns, which a fused operation does not show.
    """

    def __init__(self, inside: Inside | None = None):
        super().__init__()
        self.inside = inside or (lambda name, args: 0)
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Count these, which exist already, as nothing."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
            self.now += size
            weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.is_meta:
                self._add(value)
        self.peak = max(self.peak, self.now + self.inside(operation._schema.name, args))
        return output


def measure(
    part: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, inside: Inside | None = None, others: Any = ()
) -> Cost:
    """The cost of ``run(x)`` and its backward; where nothing in it asks for a gradient there is none.

    Args:
        part: the module that ``run`` runs; its parameters and buffers are not counted.
        x: on the meta device. Where it requires a gradient, the gradient is computed and counted.
        others: a structure with tensors that ``run`` reads too, which are not counted.
    """
    meter = Meter(inside)
    meter.ignore([x, *part.parameters(), *part.buffers(), *(t for t in tree_leaves(others) if isinstance(t, Tensor))])
    with meter:
        output = run(x.clone())  # a copy, which only the graph may hold: a leaf is held by its gradient's accumulator
        forward, size = meter.peak, output.untyped_storage().nbytes()
        kept = meter.now - size
        backward = 0
        if output.requires_grad:
            edge, gradient = get_gradient_edge(output), torch.empty_like(output)
            del output
            meter.peak = meter.now
            torch.autograd.backward(edge, gradient)
            backward = meter.peak - kept
    for tensor in (x, *part.parameters()):
        tensor.grad = None
    return Cost(kept, forward, backward)
