"""A frozen linear and its adapter as one operation: against the two apart, and Triton's products as formulas."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llava_moslora.adapters import dropout as masks
from llava_moslora.adapters import kernel, linear
from llava_moslora.adapters.kernel import low_rank_update
from llava_moslora.adapters.linear import adapted_linear
from support.adapter_models import Pair, adapted, hashed, relative

ROOT = Path(__file__).parents[2]
# rows, in, out, r: u kept, and recomputed where r is large next to in; W folded into B', into A', and not at all
SHAPES = [(200, 64, 32, 4), (200, 32, 64, 2), (20, 64, 96, 4), (200, 32, 48, 16)]


def inputs(rows, i, o, r, mixed=True, bias=True, dtype=torch.float32, device="cpu"):
    """x, base, a, w, b; all but the base want gradients."""
    torch.manual_seed(0)
    base = nn.Linear(i, o, bias=bias).to(device, dtype).requires_grad_(False)
    shapes = [(2, rows // 2, i), (r, i), (r, r), (o, r)]
    x, a, w, b = (torch.randn(s, dtype=dtype).to(device).requires_grad_() for s in shapes)
    return x, base, a, w if mixed else None, b


def gradients(y, tensors):
    torch.manual_seed(4)
    wanted = [t for t in tensors if isinstance(t, torch.Tensor)]
    return [y, *torch.autograd.grad(y, wanted, torch.randn(y.shape, dtype=y.dtype).to(y.device))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_it_is_the_linear_and_the_branch(shape, mixed, dropout, bias):
    tensors = inputs(*shape, mixed, bias)
    x, base, *factors = tensors
    torch.manual_seed(3)
    together = adapted_linear(x, base, *factors, 0.7, dropout)
    torch.manual_seed(3)
    apart = low_rank_update(F.linear(x, base.weight, base.bias), x, *factors, 0.7, dropout)
    for found, expected in zip(gradients(together, tensors), gradients(apart, tensors), strict=True):
        assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("shape", [(12, 16, 5, 1), (12, 5, 16, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(shape, dropout):
    x, base, *factors = inputs(*shape, dtype=torch.float64)

    def seeded(x, *factors):
        torch.manual_seed(1)
        return adapted_linear(x, base, *factors, 0.5, dropout)

    assert torch.autograd.gradcheck(seeded, (x, *factors))


def test_bf16_is_no_less_exact_than_the_two_apart():
    x, base, *factors = (t.detach() if isinstance(t, torch.Tensor) else t for t in inputs(*SHAPES[0]))
    exact = low_rank_update(base(x), x, *factors, 0.7)
    low = [t.bfloat16() for t in (x, *factors)]
    base.bfloat16()
    together = relative(adapted_linear(low[0], base, *low[1:], 0.7), exact)
    apart = relative(low_rank_update(base(low[0]), *low, 0.7), exact)
    assert together <= apart


def test_only_wanted_gradients_are_made():
    tensors = inputs(*SHAPES[0])
    x, _, *factors = tensors
    full = gradients(adapted_linear(*tensors, 0.7), tensors)[1:]
    for kept in range(4):
        for index, tensor in enumerate((x, *factors)):
            tensor.requires_grad_(index == kept)
        y = adapted_linear(*tensors, 0.7)
        torch.manual_seed(4)
        (grad,) = torch.autograd.grad(y, [(x, *factors)[kept]], torch.randn(y.shape))
        assert torch.equal(grad, full[kept])


@pytest.mark.parametrize(("shape", "kept_u"), [(SHAPES[0], [200 * 4]), (SHAPES[3], [])], ids=str)
def test_backward_keeps_x_and_a_small_u(shape, kept_u):
    tensors, kept = inputs(*shape), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_linear(*tensors, 0.7, 0.25)
    known = {t.data_ptr() for t in (tensors[0], tensors[1].weight, *tensors[2:])}
    sizes = [t.numel() for t in kept if t.numel() and t.data_ptr() not in known]
    assert sizes == kept_u  # the seed is 8 bytes of the host


@pytest.mark.parametrize("which", ["W0", "A", "W", "B"])
def test_a_weight_that_is_overwritten_before_backward_is_noticed(which):
    x, base, *factors = inputs(*SHAPES[0])
    y = adapted_linear(x, base, *factors, 0.7)
    with torch.no_grad():
        {"W0": base.weight, "A": factors[0], "W": factors[1], "B": factors[2]}[which].mul_(2)
    with pytest.raises(RuntimeError, match="overwritten between forward and backward"):
        y.sum().backward()


def test_factors_that_are_made_for_a_forward_are_not_kept_by_checkpointing():
    """PiSSA's A and B at twice the rank; autograd keeps the parameters they are made of."""
    x, base, a, w, b = inputs(*SHAPES[0])
    alive = []

    def run(x):
        doubled = torch.cat([a, a]), torch.cat([b, b], dim=1)
        alive.extend(weakref.ref(t) for t in doubled)
        return adapted_linear(x, base, doubled[0], None, doubled[1], 0.7, 0.3)

    y = checkpoint(run, x, use_reentrant=False)
    assert [reference() for reference in alive] == [None, None]
    y.sum().backward()
    assert a.grad.any() and w.grad is None


def test_there_is_no_second_derivative():
    x, base, *factors = inputs(*SHAPES[0])
    y = adapted_linear(x, base, *factors, 0.7, 0.3).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


def test_inference_mode_needs_no_versions():
    x, base, *factors = inputs(*SHAPES[0])
    with torch.inference_mode():
        made = [factor + 0 for factor in factors]
        assert torch.equal(adapted_linear(x + 0, base, *made, 0.7), adapted_linear(x, base, *factors, 0.7))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "plain"])
def test_flops_are_counted(shape, mixed):
    """What the linear costs, what the branch costs apart, less the u that is not recomputed."""
    rows, i, o, r = shape
    tensors = inputs(*shape, mixed)
    cost, branch = linear.flops(rows, i, o, r, mixed), kernel.flops(rows, i, o, r, mixed)
    with FlopCounterMode(display=False) as counter:
        y = adapted_linear(*tensors, 0.7, 0.25)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert (forward, counter.get_total_flops()) == (cost["forward"], cost["forward"] + cost["backward"])
    with FlopCounterMode(display=False) as counter:
        low_rank_update(tensors[1](tensors[0]), tensors[0], *tensors[2:], 0.7, 0.25).sum().backward()
    spared = 2 * rows * r * i * linear.keeps_u(r, i)
    assert counter.get_total_flops() - spared == cost["forward"] + cost["backward"]
    assert branch["forward"] + 2 * rows * i * o == cost["forward"]


@pytest.mark.parametrize("drop", [0, 3000])
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "plain"])
def test_operations_are_well_registered(mixed, drop):
    x, base, a, w, b = inputs(*SHAPES[0], mixed)
    seed, checked = torch.tensor(3) if drop else None, ("test_schema", "test_faketensor")
    frozen = (base.weight, base.bias, None, None, None, None, [32, 64], "")
    with torch.no_grad():  # autograd's part is a function around them
        x, a, b = x.detach(), a.detach(), b.detach()
        w = w.detach() if mixed else None
        arguments = (x, *frozen, a, w, b, seed, 0.5, drop)
        torch.library.opcheck(torch.ops.llava_moslora.adapted_linear, arguments, test_utils=checked)
        grad, u = torch.randn(*x.shape[:2], 32), torch.randn(200, 4)
        for needs in ([True, True, mixed, True], [False, True, False, True]):
            arguments = (grad, x, base.weight, *frozen[2:], a, w, b, seed, u, 0.5, drop, needs)
            torch.library.opcheck(torch.ops.llava_moslora.adapted_linear_backward, arguments, test_utils=checked)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(use_reentrant):
    tensors = inputs(*SHAPES[0])

    def run(x, a, w, b):
        return adapted_linear(x, tensors[1], a, w, b, 0.7, 0.3)

    results = []
    for recomputed in (True, False):
        torch.manual_seed(7)
        x, _, *factors = tensors
        y = checkpoint(run, x, *factors, use_reentrant=use_reentrant) if recomputed else run(x, *factors)
        x.grad = None
        for factor in factors:
            factor.grad = None
        y.square().sum().backward()
        results.append([y, x.grad, *(factor.grad for factor in factors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def calls(model, x, monkeypatch) -> int:
    """How often the layers of ``model`` take the one operation."""
    from llava_moslora.adapters import layers

    made = []
    monkeypatch.setattr(layers, "adapted_linear", lambda *args: made.append(1) or adapted_linear(*args))
    model(x)
    return len(made)


@pytest.mark.parametrize("kind", ["float", "nf4", "nf4 single"])
def test_layers_in_training_take_it(kind, monkeypatch):
    assert calls(adapted(Pair(kind)), torch.randn(3, 64), monkeypatch) == 2


def test_layers_that_ask_for_more_do_not(monkeypatch):
    """Each of these needs PEFT's own forward: hooks on the base, several adapters, autocast, 8 bits, generation."""
    x = torch.randn(3, 64)
    hooked = adapted(Pair())
    hooked.base_model.model.up.base_layer.register_forward_pre_hook(lambda *_: None)
    assert calls(hooked, x, monkeypatch) == 1
    offloaded = adapted(Pair())
    layer = offloaded.base_model.model.up.base_layer
    layer.forward = layer.forward  # as accelerate's offloading replaces it
    assert calls(offloaded, x, monkeypatch) == 1
    two = adapted(Pair())
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    assert calls(two, x, monkeypatch) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls(adapted(Pair()), x, monkeypatch) == 0
    assert calls(adapted(Pair("int8")), x, monkeypatch) == 0
    with torch.no_grad():
        assert calls(adapted(Pair()).eval(), x, monkeypatch) == 0
    mixed = adapted(Pair(dtype=torch.bfloat16), autocast_adapter_dtype=True)  # float32 adapters over a 16-bit base
    assert calls(mixed, x.bfloat16(), monkeypatch) == 0


INTERPRETED = """
import torch
from support.adapter_models import hashed
from llava_moslora.adapters import triton_dropout as products

for n, i, r in ((100, 96, 8), (130, 200, 64), (70, 130, 150)):
    torch.manual_seed(n)
    x, a, grad_u, grad_x, b, y = (torch.randn(s) for s in ((n, i), (r, i), (n, r), (n, i), (50, r), (n, 50)))
    for drop in (3277, 40000):
        seed = torch.randint(2**63 - 1, ())
        mask = hashed(x, seed, drop)
        for found, expected in (
            (products.dropped_project(x, a, seed, drop), (x * mask) @ a.T),
            (products.dropped_outer(grad_u, x, seed, drop), grad_u.T @ (x * mask)),
            (products.add_dropped(grad_x.clone(), [(grad_u, a, seed, drop)]), grad_x + (grad_u @ a) * mask),
            (products.add_low_rank(y.clone(), grad_u, b, 0.7), y + 0.7 * grad_u @ b.T),
        ):
            assert (found - expected).norm() <= 1e-6 * expected.norm(), (n, i, r)

# of linears with one input: up to three in one pass, also of other ranks or probabilities, and more than three
n, i = 100, 200
cases = [[(8, 3277)] * 2, [(8, 3277)] * 3, [(8, 3277), (16, 3277)], [(8, 3277), (8, 40000)], [(8, 3277)] * 4]
for case in cases:
    torch.manual_seed(len(case))
    grad_x, x = torch.randn(n, i), torch.empty(n, i)
    branches = [(torch.randn(n, r), torch.randn(r, i), torch.randint(2**63 - 1, ()), drop) for r, drop in case]
    expected = grad_x + sum((gu @ a) * hashed(x, seed, drop) for gu, a, seed, drop in branches)
    found = products.add_dropped(grad_x.clone(), branches)
    assert (found - expected).norm() <= 1e-6 * expected.norm(), case
"""


def test_triton_products_drop_what_the_hash_says():
    """On a CPU by Triton's interpreter, which must be asked for before Triton is imported: in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_hash_drops_as_a_generator_would():
    """The rate, and no correlation between neighbours, within rows and columns, nor between masks of other seeds."""
    x, p = torch.empty(1024, 1024), 3277 / 65536
    masks = [hashed(x, torch.tensor(seed), 3277) for seed in (0, 1, 2, 2**32, 2**32 + 1, 3**39)]
    deviations = [(~mask).float() - p for mask in masks]
    bound = 5 * p * (1 - p) / x.numel() ** 0.5  # five standard deviations of a mean of products

    for one in deviations:
        assert abs(one.mean()) <= 5 * (p * (1 - p) / x.numel()) ** 0.5
        flat = one.flatten()
        for lag in (1, 2, 4, 8, 16, 32, 64, 1023, 1024, 1025, 2048, 3072, 4096):
            assert abs((flat[:-lag] * flat[lag:]).mean()) <= bound, lag
        of_one_hash = (one[:, ::2] * one[:, 1::2]).mean()
        assert abs(of_one_hash) <= bound * 2**0.5
        for means in (one.mean(0), one.mean(1)):
            assert abs(means.square().mean() / (p * (1 - p) / 1024) - 1) <= 5 * (2 / 1024) ** 0.5
    for index, one in enumerate(deviations):
        for other in deviations[:index]:
            assert abs((one * other).mean()) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 1024, 4096, 64), (1000, 4096, 1024, 150)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 4 * 2**-8)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gpu_is_the_formula_in_float64(shape, dtype, tolerance, dropout):
    torch.backends.cuda.matmul.allow_tf32 = False
    tensors = inputs(*shape, dtype=dtype, device="cuda")
    torch.manual_seed(3)
    y = adapted_linear(*tensors, 0.7, dropout)
    x, base, *factors = tensors
    x, a, w, b = (t.detach().double().requires_grad_() for t in (x, *factors))
    dropped = x
    if dropout:
        torch.manual_seed(3)
        drop, seed = masks.draw_seed(dropout)
        dropped = x * hashed(x, seed, drop) / (1 - drop / masks.DROPOUT_STEPS)
    z = F.linear(x, base.weight.double(), base.bias.double()) + 0.7 * dropped @ a.T @ w.T @ b.T
    torch.manual_seed(4)
    grad = torch.randn(y.shape).cuda()
    found = [y, *torch.autograd.grad(y, [t for t in tensors if isinstance(t, torch.Tensor)], grad.to(dtype))]
    expected = [z, *torch.autograd.grad(z, [x, a, w, b], grad.to(dtype).double())]
    for one, other in zip(found, expected, strict=True):
        assert relative(one.double(), other) <= tolerance


@pytest.mark.gpu
def test_gpu_is_never_waited_for():
    tensors = inputs(*SHAPES[0], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        adapted_linear(*tensors, 0.7, 0.25).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
