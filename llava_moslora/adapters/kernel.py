"""The adapter branch as one custom operation with a nearly free mixer, which saves only the input for backward::

    y = result + c·D(x)·Aᵀ·Wᵀ·Bᵀ,   c = s / (1 − p),   D drops elements with probability p        (paper eq. 7)

Shapes: N rows (all leading dimensions of x), I in, O out, r rank; x (N, I), A (r, I), W (r, r), B (O, r), y (N, O).

It avoids two costs of a direct implementation:

- Time. At width r, W takes four products in forward and backward (one of them recomputed), of r²·N multiply-adds each.
  Folded into the smaller of its neighbours, B' = B·W or A' = W·A, it also takes four (one of them recomputed), of
  r²·min(I, O) each, whatever the number of rows; so it is folded when N > min(I, O). Measured just above that: 1–4 % of
  the whole layer's time.
- Memory. Dropout's output and mask, D(x)·Aᵀ and its product with W are recomputed in backward. Autograd keeps only x,
  and linears that share an input share it. The mask is a function of an int64 seed that is drawn on the CPU, so that
  the host never waits for the device; activation checkpointing restores the generator and so draws the same seed.

:mod:`llava_moslora.adapters.dropout` draws the masks, and :mod:`llava_moslora.adapters.linear` computes this branch
together with the frozen linear.

It is a custom operation, not an ``autograd.Function``: a ``torch.Generator`` inside one breaks
``torch.compile(fullgraph=True)``, and torch's FLOP counter sees only operations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from llava_moslora.adapters.dropout import DROPOUT_STEPS, DroppedInput, draw_seed, dropped_input


def low_rank_update(
    result: Tensor, x: Tensor, a: Tensor, w: Tensor | None, b: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """``result`` plus the adapter's branch, in the dtype of ``result``.

    It is computed in the dtype of ``a``, or in autocast's if autocast is on.

    Args:
        result: float[..., O], the frozen layer's output.
        x: float[..., I], the frozen layer's input, of any floating dtype; saved for backward unchanged.
        a: float[r, I].
        w: float[r, r], or None for plain LoRA.
        b: float[O, r].
        scaling: s.
        dropout: probability of dropping an element of x; 0 outside training.
    """
    device, dtype = x.device.type, a.dtype
    if not x.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    drop, seed = draw_seed(dropout)
    # Generation calls this once per layer and token: without gradients the operation's overhead is avoided.
    run = _low_rank if torch.is_grad_enabled() or drop else _forward
    return run(result, x, a, w, b, seed, float(scaling), drop, dtype)


def _forward(result, x, a, w, b, seed, scaling, drop, dtype):
    with _no_autocast(x):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, I)
        f = Factors(a.to(dtype), None if w is None else w.to(dtype), b.to(dtype), len(rows))
        v = f.apply_mixer(dropped_input(rows, seed, drop).project(f.a))  # (N, r)
        return _add_branch(result, v, f.b.T, branch_scale(scaling, drop))


_low_rank = torch.library.custom_op(
    "llava_moslora::low_rank",
    _forward,
    mutates_args=(),
    schema="(Tensor result, Tensor x, Tensor a, Tensor? w, Tensor b, Tensor? seed, float scaling, int drop, "
    "ScalarType dtype) -> Tensor",
)


@torch.library.custom_op(
    "llava_moslora::low_rank_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor a, Tensor? w, Tensor b, Tensor? seed, float scaling, int drop, "
    "ScalarType dtype, bool[] needs) -> Tensor[]",
)
def _low_rank_backward(grad, x, a, w, b, seed, scaling, drop, dtype, needs):
    """Gradients of x, a, w, b as far as ``needs`` says; an empty tensor in place of the others."""
    with _no_autocast(x):
        rows = dropped_input(x.reshape(-1, x.shape[-1]).to(dtype), seed, drop)  # (N, I)
        f = Factors(a.to(dtype), None if w is None else w.to(dtype), b.to(dtype), len(rows.rows))
        grad = grad.reshape(-1, grad.shape[-1]).to(dtype)  # (N, O)
        u = rows.project(f.a)  # (N, r), recomputed
        grad_u, *grads = f.gradients(grad, u, rows, branch_scale(scaling, drop), needs[1:])
        grads.insert(0, rows.add_gradient_of_x(None, grad_u, f.a).view(x.shape) if needs[0] else None)
    likes = _tensors_like_gradients(x, a, w, b)
    return [like.new_empty(0) if g is None else g.to(like.dtype) for g, like in zip(grads, likes, strict=True)]


def _no_autocast(x: Tensor) -> AbstractContextManager:
    """Disables autocast, which would cast the operands of every product again, in backward only if run inside it."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _tensors_like_gradients(x, a, w, b):
    """Tensors of the gradients' shapes and dtypes; without W the third gradient is never needed."""
    return x, a, a if w is None else w, b


class Factors:
    """A, W, B, or A' = W·A, B, or A, B' = B·W: whichever is cheapest for N rows. All of one dtype."""

    def __init__(self, a: Tensor, w: Tensor | None, b: Tensor, rows: int):
        self.a, self.w, self.b, self.folded_into = a, w, b, None
        if w is not None and folds_mixer(rows, a.shape[1], len(b)):
            self.unfolded = (a, w, b)
            self.w = None
            if len(b) <= a.shape[1]:
                self.b, self.folded_into = b @ w, "b"
            else:
                self.a, self.folded_into = w @ a, "a"

    def apply_mixer(self, u: Tensor) -> Tensor:
        """u·Wᵀ (N, r), or u itself if W is folded or None."""
        return u if self.w is None else u @ self.w.T

    def gradients(
        self, grad: Tensor, u: Tensor, rows: DroppedInput, scale: float, needs: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of u (N, r), A, W and B, the last three as far as ``needs`` says, from ``grad`` (N, O)."""
        need_a, need_w, need_b = needs
        grad_a = grad_w = grad_b = None
        grad_u = _scaled_product(grad, self.b, scale)  # (N, r), of u·Wᵀ
        if need_b or self.folded_into == "b":
            grad_b = _scaled_product(grad.T, self.apply_mixer(u), scale)
        if self.w is not None:
            if need_w:
                grad_w = grad_u.T @ u
            grad_u = grad_u @ self.w
        if need_a or self.folded_into == "a":
            grad_a = rows.gradient_of_a(grad_u)
        return grad_u, *self.unfold_gradients(grad_a, grad_w, grad_b, needs)

    def unfold_gradients(self, grad_a, grad_w, grad_b, needs: list[bool]) -> tuple[Tensor | None, ...]:
        """The gradients of A, W and B, as far as they are needed, from those of these factors."""
        if self.folded_into is None:
            return grad_a, grad_w, grad_b
        (a, w, b), (need_a, need_w, need_b) = self.unfolded, needs
        if self.folded_into == "b":
            return grad_a, b.T @ grad_b if need_w else None, grad_b @ w.T if need_b else None
        return w.T @ grad_a if need_a else None, grad_a @ a.T if need_w else None, grad_b


def folds_mixer(rows: int, i: int, o: int) -> bool:
    """Whether W is multiplied into A or B for this number of rows, in a layer from I to O."""
    return rows > min(i, o)


def branch_scale(scaling: float, drop: int) -> float:
    """c = s / (1 − p)."""
    return scaling * DROPOUT_STEPS / (DROPOUT_STEPS - drop)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale·left·right in one operation, rounded once; left (n, k), right (k, m)."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def _add_branch(result: Tensor, v: Tensor, bt: Tensor, scale: float) -> Tensor:
    """``result + scale·v·bt`` (…, O), summed in the wider of their dtypes, returned in that of ``result``."""
    flat = result.contiguous().view(-1, result.shape[-1])
    if torch.promote_types(result.dtype, v.dtype) == v.dtype:
        total = torch.addmm(flat.to(v.dtype), v, bt, alpha=scale).to(result.dtype)
    else:
        total = flat.add(v @ bt, alpha=scale)
    return total.view(result.shape)


@_low_rank.register_fake
def _(result, x, a, w, b, seed, scaling, drop, dtype):
    return torch.empty_like(result, memory_format=torch.contiguous_format)


@_low_rank_backward.register_fake
def _(grad, x, a, w, b, seed, scaling, drop, dtype, needs):
    return [
        torch.empty_like(like, memory_format=torch.contiguous_format) if need else like.new_empty(0)
        for like, need in zip(_tensors_like_gradients(x, a, w, b), needs, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    _, x, a, w, b, seed, ctx.scaling, ctx.drop, ctx.dtype = inputs
    ctx.save_for_backward(x, a, w, b, seed)


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[1:5])
    grads = [None] * 4
    if any(needs):
        gradients = _low_rank_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.drop, ctx.dtype, needs)
        grads = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return grad, *grads, None, None, None, None


_low_rank.register_autograd(_backward, setup_context=_setup_context)


def flops(rows: int, i: int, o: int, r: int, mixed: bool, need_x: bool = True) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of one layer's branch in ``forward`` and ``backward``, and how many of the latter
    recompute forward's intermediates: ``recomputed``."""
    down, up = 2 * rows * r * i, 2 * rows * r * o
    mixer = mixed * 2 * r * r * (min(i, o) if folds_mixer(rows, i, o) else rows)  # one product with W
    recomputed = down + mixer
    return {
        "forward": down + mixer + up,
        "backward": recomputed + 2 * up + 2 * mixer + (1 + need_x) * down,
        "recomputed": recomputed,
    }


@register_flop_formula(torch.ops.llava_moslora.low_rank)
def _(result, x, a, w, b, seed, scaling, drop, dtype, out_shape=None, **kwargs) -> int:
    return flops(x[:-1].numel(), a[1], b[0], a[0], w is not None)["forward"]


@register_flop_formula(torch.ops.llava_moslora.low_rank_backward)
def _(grad, x, a, w, b, seed, scaling, drop, dtype, needs, out_shape=None, **kwargs) -> int:
    return flops(x[:-1].numel(), a[1], b[0], a[0], w is not None, needs[0])["backward"]
