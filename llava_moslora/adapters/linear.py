"""A frozen linear layer and its adapter as one operation::

    y = x·W₀ᵀ + bias + c·D(x)·Aᵀ·Wᵀ·Bᵀ                                                     (paper eq. 7)

The branch is that of :mod:`llava_moslora.adapters.kernel`. Fused with the linear layer it costs less:

- the branch is added to the layer's output in place, in forward and in backward, in one pass over it;
- x gets one gradient instead of two that autograd would add;
- u = D(x)·Aᵀ (N, r) is saved for backward if it is small compared with x;
- y is the output of one operation, which selective recomputation can save (:mod:`llava_moslora.recompute`).

The operation is called from an autograd function, several hundred times per step: with ``torch.library.custom_op`` a
forward takes 1.7 times as much host time.

W₀ may be NF4 or FP4: it is dequantised here, in forward and again in backward.

Shapes: N rows (all leading dimensions of x), I in, O out, r rank; x (N, I), W₀ (O, I), A (r, I), W (r, r), B (O, r),
y (N, O). x, W₀ (or what it is dequantised to), A, W and B have one dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from llava_moslora import recompute
from llava_moslora.adapters import kernel
from llava_moslora.adapters.dropout import add_low_rank, draw_seed, dropped_input
from llava_moslora.adapters.kernel import Factors, branch_scale
from llava_moslora.adapters.shared_input import Gradient

KEEP_U_UP_TO = 1 / 16  # r / I up to which u is saved; above, it is recomputed to save memory


def adapted_linear(
    x: Tensor,
    base: nn.Module,
    a: Tensor,
    w: Tensor | None,
    b: Tensor,
    scaling: float,
    dropout: float = 0.0,
    ends_layer: bool = False,
    gradient: Gradient | None = None,
) -> Tensor:
    """``base(x)`` plus the adapter's branch, float[..., O].

    Args:
        x: float[..., I].
        base: the frozen layer: an ``nn.Linear``, or a ``bitsandbytes.nn.Linear4bit``.
        a: float[r, I].
        w: float[r, r], or None for plain LoRA.
        b: float[O, r].
        scaling: s.
        dropout: probability of dropping an element of x on its way into the branch; 0 outside training.
        ends_layer: y is only added to the residual, so backward needs nothing that is computed from y in this layer:
            recomputing the layer skips its product.
        gradient: of x, which other linears with the same input add to.
    """
    drop, seed = draw_seed(dropout)
    frozen = (base.weight, base.bias, *_quantisation(base))
    return _AdaptedLinear.apply(x, *frozen, a, w, b, seed, float(scaling), drop, ends_layer, gradient)


def frozen_dtype(base: nn.Module) -> torch.dtype | None:
    """The dtype of products with the frozen weight; None for a 4-bit weight that was quantised from one dtype and
    computes in another."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.dtype
    return state.dtype if base.compute_dtype in (None, state.dtype) else None


def _quantisation(base: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[int], str]:
    """The quantisation state of a 4-bit weight, in types that an operation takes; empty for an ordinary weight."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return None, None, None, None, list(base.weight.shape), ""
    outer = state.state2 if state.nested else None
    layout = [*state.shape, state.blocksize, outer.blocksize if outer else 0]
    if outer is None:
        return state.absmax, None, None, None, layout, state.quant_type
    return state.absmax, outer.absmax, outer.code, state.offset, layout, state.quant_type


def _frozen_weight(weight, absmax, outer_absmax, outer_code, offset, layout, quant_type, dtype) -> Tensor:
    """W₀ (O, I) in ``dtype``."""
    if absmax is None:
        return weight
    out, i, block, outer_block = layout
    if outer_absmax is not None:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, outer_absmax, outer_code, outer_block, torch.float32
        )
        absmax = absmax + offset
    return torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, block, quant_type, [out, i], dtype)


def _adapted_linear(
    x, weight, bias, absmax, outer_absmax, outer_code, offset, layout, quant_type, a, w, b, seed, scaling, drop
):
    """y, and u (N, r) if it is kept for backward, else an empty tensor."""
    rows = x.reshape(-1, x.shape[-1])
    frozen = _frozen_weight(weight, absmax, outer_absmax, outer_code, offset, layout, quant_type, x.dtype)
    f = Factors(a, w, b, len(rows))
    u = dropped_input(rows, seed, drop).project(f.a)
    y = add_low_rank(F.linear(rows, frozen, bias), f.apply_mixer(u), f.b, branch_scale(scaling, drop))
    return y.view(*x.shape[:-1], len(b)), u if keeps_u(len(a), x.shape[-1]) else u.new_empty(0)


def _adapted_linear_backward(
    grad, x, weight, absmax, outer_absmax, outer_code, offset, layout, quant_type, a, w, b, seed, u, scaling, drop,
    needs, gradient: Gradient | None = None,
):  # fmt: skip
    """Gradients of x, a, w, b as far as ``needs`` says; an empty tensor in place of the others. With ``gradient`` that
    of x is added to it, and is empty until it is whole."""
    rows = dropped_input(x.reshape(-1, x.shape[-1]), seed, drop)
    f = Factors(a, w, b, len(rows.rows))
    grad = grad.reshape(-1, grad.shape[-1])
    if not u.numel():
        u = rows.project(f.a)
    grad_u, *grads = f.gradients(grad, u, rows, branch_scale(scaling, drop), needs[1:])
    grad_x = None
    if needs[0]:
        frozen = _frozen_weight(weight, absmax, outer_absmax, outer_code, offset, layout, quant_type, x.dtype)
        if gradient is None:
            grad_x = rows.add_gradient_of_x(grad @ frozen, grad_u, f.a)
        else:
            grad_x = gradient.add(grad, frozen, rows, grad_u, f.a)
        grad_x = None if grad_x is None else grad_x.view(x.shape)
    needed = zip((grad_x, *grads), needs, strict=True)
    return [g if need and g is not None else x.new_empty(0) for g, need in needed]


def _kept_u(x: Tensor, a: Tensor, w: Tensor | None, b: Tensor, seed: Tensor | None, drop: int) -> Tensor:
    """u (N, r), or an empty tensor if it is not kept for backward."""
    if not keeps_u(len(a), x.shape[-1]):
        return x.new_empty(0)
    rows = x.reshape(-1, x.shape[-1])
    return dropped_input(rows, seed, drop).project(Factors(a, w, b, len(rows)).a)


def keeps_u(r: int, i: int) -> bool:
    """Whether u is kept for backward."""
    return r <= KEEP_U_UP_TO * i


_library = torch.library.Library("llava_moslora", "FRAGMENT")
_library.define(
    "adapted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? absmax, Tensor? outer_absmax, Tensor? outer_code, "
    "Tensor? offset, int[] layout, str quant_type, Tensor a, Tensor? w, Tensor b, Tensor? seed, float scaling, "
    "int drop) -> (Tensor, Tensor)"
)
_library.define(
    "adapted_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? absmax, Tensor? outer_absmax, "
    "Tensor? outer_code, Tensor? offset, int[] layout, str quant_type, Tensor a, Tensor? w, Tensor b, Tensor? seed, "
    "Tensor u, float scaling, int drop, bool[] needs) -> Tensor[]"
)
_library.impl("adapted_linear", _adapted_linear, "CompositeExplicitAutograd")
_library.impl("adapted_linear_backward", _adapted_linear_backward, "CompositeExplicitAutograd")


def _run_forward(x: Tensor, *operands) -> tuple[Tensor, Tensor]:
    run = torch.ops.llava_moslora.adapted_linear.default if _is_watched(x) else _adapted_linear
    return run(x, *operands)


def _run_backward(gradient: Gradient | None, *operands) -> list[Tensor | None]:
    """Gradients of x, a, w, b; None where there is none."""
    if gradient is None and _is_watched(operands[0]):
        found = torch.ops.llava_moslora.adapted_linear_backward.default(*operands)
    else:
        found = _adapted_linear_backward(*(*operands, gradient))
    return [g if need and g.numel() else None for g, need in zip(found, operands[-1], strict=True)]


def _is_watched(x: Tensor) -> bool:
    """Whether something must see a single registered operation instead of the plain Python function, which takes half
    as long to call: a torch mode (FLOP counter, fake tensors), a tensor subclass, the meta device, the compiler."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def _versions(parameters: tuple[Tensor | None, ...]) -> list[int]:
    """Version counters, which grow when a tensor is overwritten; inference tensors have none, and no backward."""
    return [t._version for t in parameters if t is not None and not t.is_inference()]


@torch.library.register_fake("llava_moslora::adapted_linear", lib=_library)
def _(x, weight, bias, absmax, outer_absmax, outer_code, offset, layout, quant_type, a, w, b, seed, scaling, drop):
    u = x.new_empty(x.shape[:-1].numel(), len(a)) if keeps_u(len(a), x.shape[-1]) else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], len(b)), u


@torch.library.register_fake("llava_moslora::adapted_linear_backward", lib=_library)
def _(
    grad, x, weight, absmax, outer_absmax, outer_code, offset, layout, quant_type, a, w, b, seed, u, scaling, drop,
    needs,
):  # fmt: skip
    like = (x, a, a if w is None else w, b)
    return [x.new_empty(t.shape) if need else x.new_empty(0) for t, need in zip(like, needs, strict=True)]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *operands, ends_layer, gradient = inputs
        x, weight, _, *quantisation, layout, quant_type, a, w, b, seed, scaling, drop = operands
        saved = recompute.saved_outputs()
        if saved is None or not saved.recomputing:
            y, u = _run_forward(*operands)
            if saved is not None:
                saved.save("adapted_linear", (None if ends_layer else y, u))
        elif saved.selective:
            y, u = saved.load("adapted_linear")
        elif ends_layer and not _is_watched(x):
            y, u = None, _kept_u(x, a, w, b, seed, drop)
        else:
            y, u = _run_forward(*operands)
        if y is None:
            y = x.new_empty(*x.shape[:-1], len(b))  # nobody reads it
        ctx.settings = layout, quant_type, scaling, drop
        ctx.gradient = gradient
        parameters = (weight, *quantisation, a, w, b, seed)
        ctx.parameters = None
        if torch.compiler.is_compiling() or not (a.is_leaf and b.is_leaf):  # PiSSA's are made for each forward
            ctx.save_for_backward(x, u, *parameters)
        else:
            # Checkpointing calls a Python hook for every saved tensor, so only activations are saved: parameters are
            # alive anyway, and backward checks itself that they have not changed since forward.
            ctx.parameters, ctx.versions = parameters, _versions(parameters)
            ctx.save_for_backward(x, u)
        return y

    @staticmethod
    def backward(ctx, grad):
        needs_input = ctx.needs_input_grad
        needs = [needs_input[0], *needs_input[9:12]]
        layout, quant_type, scaling, drop = ctx.settings
        x, u, *parameters = ctx.saved_tensors
        if ctx.parameters is not None:
            parameters = ctx.parameters
            if _versions(parameters) != ctx.versions:
                raise RuntimeError("a weight of an adapted linear layer was overwritten between forward and backward")
            if torch.is_grad_enabled():
                raise RuntimeError("an adapted linear layer has no second derivative")
        weight, *quantisation, a, w, b, seed = parameters
        operands = (x, weight, *quantisation, layout, quant_type, a, w, b, seed, u, scaling, drop)
        grads = _run_backward(ctx.gradient, grad, *operands, needs)
        return grads[0], *[None] * 8, *grads[1:], None, None, None, None, None


def flops(rows: int, i: int, o: int, r: int, mixed: bool, need_x: bool = True) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of the whole layer in ``forward`` and ``backward``, frozen linear and branch."""
    branch, frozen = kernel.flops(rows, i, o, r, mixed, need_x), 2 * rows * i * o
    # The branch on its own recomputes u; here u is kept, unless it is too large.
    not_recomputed = 2 * rows * r * i if keeps_u(r, i) else 0
    return {"forward": branch["forward"] + frozen, "backward": branch["backward"] - not_recomputed + need_x * frozen}


@register_flop_formula(torch.ops.llava_moslora.adapted_linear)
def _(x, weight, bias, absmax, outer_absmax, outer_code, offset, layout, quant_type, a, w, b, *rest, **kwargs) -> int:
    return flops(x[:-1].numel(), a[1], b[0], a[0], w is not None)["forward"]


@register_flop_formula(torch.ops.llava_moslora.adapted_linear_backward)
def _(
    grad, x, weight, absmax, outer_absmax, outer_code, offset, layout, quant_type, a, w, b, seed, u, scaling, drop,
    needs, **kwargs,
) -> int:  # fmt: skip
    return flops(x[:-1].numel(), a[1], b[0], a[0], w is not None, needs[0])["backward"]
