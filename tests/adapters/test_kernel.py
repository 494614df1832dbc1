"""The kernel against the plain formula, its dropout, what it keeps and costs, and torch's tools over it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llava_moslora.adapters import dropout as masks
from llava_moslora.adapters import kernel
from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.kernel import low_rank_update
from llava_moslora.errors import Refusal
from support.adapter_models import LINEARS, hashed, llama, relative

# rows, in, out: W folded into A' (out > in) and into B', and left at width r where the rows are few
SHAPES = [(200, 32, 64), (200, 64, 32), (20, 32, 64), (20, 64, 32)]
R = 8


def inputs(rows, i, o, mixed=True, dtype=torch.float32, device="cpu"):
    """result, x, a, w, b; all want gradients."""
    torch.manual_seed(0)
    shapes = [(2, rows // 2, o), (2, rows // 2, i), (R, i), (R, R), (o, R)]
    tensors = [torch.randn(s, dtype=dtype).to(device).requires_grad_() for s in shapes]
    return tensors if mixed else [*tensors[:3], None, tensors[4]]


def formula(result, x, a, w, b, scaling, dropout, seed):
    """The paper's eq. 7 in plain torch, with the mask that the kernel draws from ``seed``."""
    if dropout:
        drop = round(dropout * masks.DROPOUT_STEPS)
        if masks.uses_triton(x):
            mask = hashed(x, seed, drop)
        else:
            mask = masks._draw_mask(torch.Size((x.shape[0] * x.shape[1], x.shape[2])), seed, drop, x.device)
        x = x.masked_fill(mask.view(x.shape) == 0, 0) / (1 - drop / masks.DROPOUT_STEPS)
    u = x @ a.T
    return result + scaling * (u if w is None else u @ w.T) @ b.T


def both(tensors, dropout, scaling=0.7):
    """Outputs and gradients of the kernel and of the formula, under the same seed."""
    wanted = [t for t in tensors if t is not None]
    torch.manual_seed(3)
    y = low_rank_update(*tensors, scaling, dropout)
    torch.manual_seed(3)
    z = formula(*tensors, scaling, dropout, torch.randint(2**63 - 1, ()))
    torch.manual_seed(4)
    grad = torch.randn(y.shape, dtype=y.dtype).to(y.device)
    return (y, *torch.autograd.grad(y, wanted, grad)), (z, *torch.autograd.grad(z, wanted, grad))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_fp32_is_the_formula(shape, mixed, dropout):
    for found, expected in zip(*both(inputs(*shape, mixed), dropout), strict=True):
        assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_16_bit_is_the_formula(dtype, step, shape):
    for found, expected in zip(*both(inputs(*shape, dtype=dtype), 0.25), strict=True):
        assert found.dtype == expected.dtype == dtype
        assert relative(found, expected) <= 3 * step  # three products, each rounded


@pytest.mark.parametrize("shape", [(12, 3, 5), (12, 5, 3), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(shape, mixed, dropout):
    tensors = inputs(*shape, mixed, torch.float64)

    def seeded(*tensors):
        torch.manual_seed(1)
        return low_rank_update(*tensors, 0.5, dropout)

    assert torch.autograd.gradcheck(seeded, tensors)


@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_only_wanted_gradients_are_made(shape):
    tensors = inputs(*shape)
    (_, *full), _ = both(tensors, 0.25)
    for kept in range(1, 5):
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index == kept)
        torch.manual_seed(3)
        y = low_rank_update(*tensors, 0.7, 0.25)
        torch.manual_seed(4)
        (grad,) = torch.autograd.grad(y, [tensors[kept]], torch.randn(y.shape))
        assert torch.equal(grad, full[kept])


def test_input_dtypes_meet_in_the_adapters():
    """A bf16 base with fp32 adapters computes in fp32; an fp32 base is not rounded to bf16 adapters."""
    result, x, a, w, b = (t.detach() for t in inputs(*SHAPES[0]))
    expected = formula(result, x, a, w, b, 0.7, 0, None)
    low = low_rank_update(result.bfloat16(), x.bfloat16(), a, w, b, 0.7)
    assert low.dtype == torch.bfloat16 and relative(low, expected) <= 2**-8
    narrow = low_rank_update(result, x, a.bfloat16(), w.bfloat16(), b.bfloat16(), 0.0)
    assert torch.equal(narrow, result)


def test_dropout_is_a_function_of_the_seed_with_the_stated_probability():
    shape, device = torch.Size((1001, 999)), torch.device("cpu")
    for p in (0.05, 0.5, 0.95):
        mask = masks._draw_mask(shape, torch.tensor(7), round(p * masks.DROPOUT_STEPS), device)
        assert set(mask.unique().tolist()) == {-1, 0}  # all bits or none
        assert torch.equal(mask, masks._draw_mask(shape, torch.tensor(7), round(p * masks.DROPOUT_STEPS), device))
        assert not torch.equal(mask, masks._draw_mask(shape, torch.tensor(8), round(p * masks.DROPOUT_STEPS), device))
        dropped = (mask == 0).float().flatten()
        sigma = (p * (1 - p) / shape.numel()) ** 0.5
        assert abs(dropped.mean().item() - p) < 5 * sigma
        for lane in range(4):  # the four elements that share a draw
            assert abs(dropped[lane::4].mean().item() - p) < 5 * 2 * sigma
        assert abs((dropped[:-1] * dropped[1:]).mean().item() - p * p) < 5 * sigma  # and neighbours


def test_dropout_keeps_the_mean():
    x, eye, zero = torch.ones(1000, 64), torch.eye(64), torch.zeros(1000, 64)
    y = low_rank_update(zero, x, eye, None, eye, 1.0, dropout=0.2)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.8, rel=1e-4)]
    assert y.mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit(use_reentrant, dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)).to(dtype)
    model = get_peft_model(
        base, MosLoraConfig(r=4, target_modules=["0", "2"], lora_dropout=0.3, init_lora_weights=False)
    )
    x = torch.randn(60, 32, dtype=dtype, requires_grad=True)

    def run(checkpointed):
        torch.manual_seed(7)
        model.zero_grad()
        x.grad = None
        y = model(x) if not checkpointed else checkpoint(model, x, use_reentrant=use_reentrant, preserve_rng_state=True)
        y.float().square().sum().backward()
        return [y, x.grad] + [p.grad for p in model.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_transformers(use_reentrant):
    model = get_peft_model(
        llama(), MosLoraConfig(r=4, target_modules=LINEARS, lora_dropout=0.3, init_lora_weights=False)
    )
    model.enable_input_require_grads()
    ids = torch.arange(1, 33)[None]

    def run():
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]

    model.train()
    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant, "preserve_rng_state": True})
    assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


def test_backward_keeps_the_input_alone():
    tensors = inputs(*SHAPES[0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_update(*tensors, 0.7, 0.25)
    known = {t.data_ptr() for t in tensors[1:]}
    assert [t.numel() for t in kept if t.data_ptr() not in known] == [1]  # the seed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "plain"])
def test_flops_are_counted(shape, mixed):
    """torch's counter sees what a run of the same products in plain torch costs, plus what is recomputed."""
    rows, i, o = shape
    tensors = inputs(*shape, mixed)
    with FlopCounterMode(display=False) as counter:
        y = low_rank_update(*tensors, 0.7, 0.25)
        forward = counter.get_total_flops()
        y.sum().backward()
    cost = kernel.flops(rows, i, o, R, mixed)
    assert forward == cost["forward"]
    assert counter.get_total_flops() == cost["forward"] + cost["backward"]

    with FlopCounterMode(display=False) as counter:  # the products themselves
        _, x, a, w, b = (None if t is None else t.detach().requires_grad_() for t in tensors)
        x = x.view(rows, i)
        if mixed and kernel.folds_mixer(rows, i, o):
            a, b = (a, b @ w) if o <= i else (w @ a, b)
            w = None
        u = x @ a.T
        ((u if w is None else u @ w.T) @ b.T).sum().backward()
    assert counter.get_total_flops() == cost["forward"] + cost["backward"] - cost["recomputed"]


def test_the_mixer_is_free_where_it_is_folded():
    """LLaMA-3-8B's linears at 16,384 rows and r = 512: the mixer costs 0.9 % of LoRA's FLOPs; unfolded it is 4.4 %."""
    layer = [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)]

    def total(mixed):
        costs = [kernel.flops(16384, i, o, 512, mixed) for i, o in layer]
        return sum(c["forward"] + c["backward"] - c["recomputed"] for c in costs)

    assert total(True) / total(False) <= 1.015
    naive = 3 * 2 * 16384 * 512 * 512 * len(layer)
    assert (total(False) + naive) / total(False) == pytest.approx(1.044, abs=0.001)


@pytest.mark.parametrize("drop", [0, 3000])
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "plain"])
def test_operation_is_well_registered(mixed, drop):
    seed = torch.tensor(3) if drop else None
    arguments = (*inputs(*SHAPES[0], mixed), seed, 0.5, drop, torch.float32)
    torch.library.opcheck(torch.ops.llava_moslora.low_rank, arguments)
    with torch.no_grad():
        grad, *rest = arguments
        for needs in ([True, True, mixed, True], [False, True, False, True], [True, False, mixed, False]):
            checked = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.llava_moslora.low_rank_backward, (grad, *rest, needs), test_utils=checked)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend):
    """Forward and backward without a graph break, dropout and all, with eager's gradients."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    model = get_peft_model(base, MosLoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    x = torch.randn(100, 32, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled(x).square().sum().backward()
    assert all(relative(p.grad, expected[n]) <= 1e-5 for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        assert relative(compiled(x), model(x)) <= 1e-5

    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "default" in module and isinstance(module["default"], nn.Identity):
            module["default"] = nn.Dropout(0.5)
    torch.manual_seed(1)
    first = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(x))
    assert not torch.equal(first, compiled(x))
    first.sum().backward()


def test_unknown_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("LLAVA_MOSLORA_KERNEL", "tritn")
    with pytest.raises(Refusal, match=r"LLAVA_MOSLORA_KERNEL in the env.*found tritn; expected torch or triton"):
        masks.triton_enabled()
    monkeypatch.setenv("LLAVA_MOSLORA_KERNEL", "torch")
    assert not masks.triton_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3 * 2**-8), (torch.float16, 3 * 2**-11)]
)
@pytest.mark.parametrize("products", ["torch", "triton"])
def test_gpu_is_the_formula(shape, dtype, tolerance, products, monkeypatch):
    monkeypatch.setenv("LLAVA_MOSLORA_KERNEL", products)
    torch.backends.cuda.matmul.allow_tf32 = False
    for found, expected in zip(*both(inputs(*shape, dtype=dtype, device="cuda"), 0.25), strict=True):
        assert relative(found, expected) <= tolerance


@pytest.mark.gpu
def test_gpu_is_never_waited_for():
    """No value travels from the device to the host in forward or backward, dropout included."""
    tensors = inputs(*SHAPES[0], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        low_rank_update(*tensors, 0.7, 0.25).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
