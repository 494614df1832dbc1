"""Adapted linear layers of one module that share an input x, such as q, k and v of an attention: one gradient of x.

Autograd would compute a gradient of x per layer and sum them, a pass over three tensors of x's size for each addition.
Here the layer whose backward runs first allocates it, the others accumulate into it inside their matrix products, and
the last one adds all adapter branches in one pass and returns it to autograd.

Only layers whose outputs are all used may share: the gradient is complete when each has run backward, as in the
modules listed here. If one has not, as in a backward for one of their weights only, backward fails; without
``shared_input`` on these layers autograd does the sum.

Shapes: N rows (all leading dimensions of x), I in, O out, r rank.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from llava_moslora import recompute
from llava_moslora.adapters.dropout import DroppedInput, TritonDroppedInput, add_dropped

# module of transformers → its linears with the same input, in the order in which its forward calls them
SHARING = {
    **{f"{family}Attention": ("q_proj", "k_proj", "v_proj") for family in ("Llama", "Mistral", "Qwen2", "Qwen3")},
    **{f"{family}MLP": ("gate_proj", "up_proj") for family in ("Llama", "Mistral", "Qwen2", "Qwen3")},
    **{f"{family}Attention": ("q_proj", "k_proj", "v_proj") for family in ("CLIP", "Siglip")},
}


@dataclass
class Gradient:
    """The gradient of one x, while backward goes through its linear layers.

    Attributes:
        linears: number of forward calls with x.
        done: how many of them have run backward.
        total: float[N, I], from the first one on.
        products: adapter products still to be added: the Triton kernel takes several in one pass.
        task: id of the autograd backward pass that runs through them.
    """

    linears: int = 0
    done: int = 0
    total: Tensor | None = None
    products: list[tuple[Tensor, Tensor, Tensor, int]] = field(default_factory=list)
    task: int = -1

    def add(self, grad: Tensor, frozen: Tensor, rows: DroppedInput, grad_u: Tensor, a: Tensor) -> Tensor | None:
        """Add one linear layer's contribution, grad·W₀ + D(grad_u·A).

        Args:
            grad: float[N, O], the gradient of its output.
            frozen: float[O, I], W₀.
            rows: D(x).
            grad_u: float[N, r], the gradient of D(x)·Aᵀ.
            a: float[r, I].

        Returns:
            float[N, I] from the last layer, None from the others.
        """
        if self.total is None or self.task != torch._C._current_graph_task_id():
            self._begin()
            self.total = grad @ frozen
        else:
            torch.addmm(self.total, grad, frozen, out=self.total)
        if isinstance(rows, TritonDroppedInput):
            self.products.append(rows.product(grad_u, a))
        else:
            rows.add_gradient_of_x(self.total, grad_u, a)
        self.done += 1
        if self.done < self.linears:
            return None
        total, products = self.total, self.products
        self.done, self.total, self.products = 0, None, []
        return add_dropped(total, products) if products else total

    def _begin(self) -> None:
        """Begin a backward pass, perhaps through a graph that an earlier one went through or failed in."""
        self.done, self.products, self.task = 0, [], torch._C._current_graph_task_id()
        Variable._execution_engine.queue_callback(self._check_whole)  # when this backward ends

    def _check_whole(self) -> None:
        if self.total is not None:
            raise RuntimeError(
                f"backward has gone through {self.done} of {self.linears} adapted linears with one input, whose "
                "gradient they make together; set their shared_input to None for gradients of a part of them"
            )


class SharedInput:
    """Maps the x that the linear layers of one module are called with to its :class:`Gradient`.

    Args:
        size: the number of these layers.
    """

    def __init__(self, size: int):
        self.size = size
        self._x: weakref.ref | None = None
        self._gradient = Gradient()

    def __getstate__(self) -> dict:
        return {"size": self.size, "_x": None, "_gradient": Gradient()}  # not what a forward has left

    def gradient_of(self, x: Tensor) -> Gradient | None:
        """For the next layer that is called with x; None if x needs no gradient, or if the layer is a single registered
        operation (fake tensors, the compiler, a FLOP counter), which computes its own gradients."""
        if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return None
        if type(x) is not Tensor or x.is_meta or recompute.in_foreign_mode():
            return None
        if self._x is None or self._x() is not x or self._gradient.linears == self.size:
            self._x, self._gradient = weakref.ref(x), Gradient()
        self._gradient.linears += 1
        return self._gradient


def share_inputs(model: nn.Module) -> None:
    """Let adapted linear layers with the same input share its gradient, in the listed modules of ``model``."""
    for module in model.modules():
        linears: list[Any] = [getattr(module, name, None) for name in SHARING.get(type(module).__name__, ())]
        adapted = [linear for linear in linears if hasattr(linear, "shared_input")]
        if len(adapted) > 1:
            shared = SharedInput(len(adapted))
            for linear in adapted:
                linear.shared_input = shared
