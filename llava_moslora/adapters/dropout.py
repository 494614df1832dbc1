"""The adapter's dropout D, recomputed from a seed wherever it is needed, and its matrix products with x.

On a GPU dropout is fused into the products (:mod:`llava_moslora.adapters.triton_dropout`), which read x once and store
no mask; elsewhere the mask is drawn and applied to the bits of x. ``LLAVA_MOSLORA_KERNEL=torch`` in the environment
selects the latter on a GPU too, with different masks.

Shapes: N rows (all leading dimensions of x), I in, O out, r rank.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from llava_moslora.errors import Refusal

# Dropout probabilities are multiples of 2⁻¹⁶, so that one 64-bit draw gives the masks of four elements. A mask is 16
# bits that are ANDed with the bits of x: on a CPU ten times as fast as masked_fill in bf16, twice in fp32.
DROPOUT_STEPS = 1 << 16
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def draw_seed(dropout: float) -> tuple[int, Tensor | None]:
    """The probability as a multiple of 1 / ``DROPOUT_STEPS``, and an int64[] seed on the CPU for one call's mask."""
    if not dropout:
        return 0, None
    return min(max(round(dropout * DROPOUT_STEPS), 1), DROPOUT_STEPS - 1), torch.randint(
        torch.iinfo(torch.int64).max, (), device="cpu"
    )


class DroppedInput:
    """D(x) for rows (N, I), and the branch's three products with it. The mask is drawn and applied to the bits of x."""

    def __init__(self, rows: Tensor, seed: Tensor | None, drop: int):
        self.rows: Tensor = rows
        self.mask: Tensor | None = None
        if seed is not None:
            self.mask = _draw_mask(rows.shape, seed, drop, rows.device)
            self.rows = (rows.view(INTEGER_OF_SIZE[rows.element_size()]) & self.mask).view(rows.dtype)

    def project(self, a: Tensor) -> Tensor:
        """D(x)·Aᵀ (N, r)."""
        return self.rows @ a.T

    def gradient_of_a(self, grad_u: Tensor) -> Tensor:
        """grad_uᵀ·D(x) (r, I)."""
        return grad_u.T @ self.rows

    def add_gradient_of_x(self, grad_x: Tensor | None, grad_u: Tensor, a: Tensor) -> Tensor:
        """``grad_x`` (N, I), which may be overwritten, plus D(grad_u·A); only D(grad_u·A) if it is None."""
        branch = grad_u @ a
        if self.mask is not None:
            branch.view(INTEGER_OF_SIZE[branch.element_size()]).bitwise_and_(self.mask)
        return branch if grad_x is None else grad_x.add_(branch)


class TritonDroppedInput(DroppedInput):
    """The same on a GPU, with dropout fused into the products: no mask is stored."""

    def __init__(self, rows: Tensor, seed: Tensor, drop: int):
        from llava_moslora.adapters import triton_dropout  # imported here: needs Triton

        self.rows, self._seed_and_drop = rows.contiguous(), (seed, drop)
        self._products = triton_dropout

    def project(self, a: Tensor) -> Tensor:
        return self._products.dropped_project(self.rows, a.contiguous(), *self._seed_and_drop)

    def gradient_of_a(self, grad_u: Tensor) -> Tensor:
        return self._products.dropped_outer(grad_u.contiguous(), self.rows, *self._seed_and_drop)

    def add_gradient_of_x(self, grad_x: Tensor | None, grad_u: Tensor, a: Tensor) -> Tensor:
        grad_x = torch.zeros_like(self.rows) if grad_x is None else grad_x
        return self._products.add_dropped(grad_x, [self.product(grad_u, a)])

    def product(self, grad_u: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """grad_u·A with the dropout that :func:`triton_dropout.add_dropped` applies to it."""
        return grad_u.contiguous(), a.contiguous(), *self._seed_and_drop


def dropped_input(rows: Tensor, seed: Tensor | None, drop: int) -> DroppedInput:
    """D(x) for rows (N, I) in the adapter's dtype; without a seed nothing is dropped."""
    if seed is None or not uses_triton(rows):
        return DroppedInput(rows, seed, drop)
    return TritonDroppedInput(rows, seed, drop)


def triton_enabled() -> bool:
    """Whether Triton kernels are used on a GPU: Triton is installed, and the environment does not select torch.

    Raises:
        Refusal: C-FLAG, the environment selects something else.
    """
    selected = os.environ.get("LLAVA_MOSLORA_KERNEL", "triton")
    if selected not in ("torch", "triton"):
        key = "LLAVA_MOSLORA_KERNEL in the environment"
        raise Refusal("C-FLAG", "unknown kernels", key=key, found=selected, expected="torch or triton")
    return selected == "triton" and _HAS_TRITON


def mask_source(device: torch.device) -> str:
    """Name of the generator that computes dropout masks from their seeds: another one gives different masks."""
    return "hash of pairs" if device.type == "cuda" and triton_enabled() else f"{device.type} generator"


def uses_triton(rows: Tensor) -> bool:
    """Whether Triton computes the products with rows (N, I); it has no float64."""
    return rows.is_cuda and rows.dtype != torch.float64 and triton_enabled()


def add_low_rank(y: Tensor, v: Tensor, b: Tensor, scale: float) -> Tensor:
    """y (N, O) += scale·v·bᵀ, in place; v (N, r), b (O, r)."""
    if not uses_triton(y):
        return y.addmm_(v, b.T, alpha=scale)
    from llava_moslora.adapters import triton_dropout  # imported here: needs Triton

    return triton_dropout.add_low_rank(y, v.contiguous(), b.contiguous(), scale)


def add_dropped(grad_x: Tensor, products: list[tuple[Tensor, Tensor, Tensor, int]]) -> Tensor:
    """``grad_x`` (N, I) plus every :meth:`TritonDroppedInput.product`, in place and in one pass."""
    from llava_moslora.adapters import triton_dropout  # imported here: needs Triton

    return triton_dropout.add_dropped(grad_x, products)


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _draw_mask(shape: torch.Size, seed: Tensor, drop: int, device: torch.device) -> Tensor:
    """int16[shape]: 0 with probability ``drop`` / DROPOUT_STEPS, else all bits set. By seed, shape and device."""
    generator = torch.Generator(device).manual_seed(seed.item())
    if device.type != "cpu":
        keep = 1 - drop / DROPOUT_STEPS
        return torch.empty(shape, dtype=torch.int16, device=device).bernoulli_(keep, generator=generator).neg_()
    # The CPU's generator is serial: draw as few numbers as possible.
    count = shape.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64)
    draws.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return draws.view(torch.int16)[:count].view(shape).lt_(drop - DROPOUT_STEPS // 2).sub_(1)
