"""The layers under stock PEFT: the same numbers as PEFT's LoRA, and everything that PEFT's users do."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.layers import MosLoraLinear, keep_base
from llava_moslora.errors import Refusal
from support.adapter_models import IDENTITY, LINEARS, Pair, adapted, llama, randomise, relative

BF16 = torch.bfloat16
# One rounding to bf16 (8 bits) apart: PEFT rounds the branch before it adds it, the kernel sums first.
ONE_BF16_STEP = 2**-8

PARITY = {
    "fp32": ("float", torch.float32, True, 1e-6),
    "bf16": ("float", BF16, False, 2 * ONE_BF16_STEP),  # there are two layers
    "bf16, fp32 adapter": ("float", BF16, True, ONE_BF16_STEP),
    "nf4": ("nf4", torch.float32, True, 1e-6),
    "nf4, bf16": ("nf4", BF16, True, ONE_BF16_STEP),
    "nf4, single quantisation": ("nf4 single", torch.float32, True, 1e-6),
    "int8": ("int8", torch.float32, True, 1e-6),
}


@pytest.mark.parametrize("case", PARITY)
def test_frozen_identity_is_pefts_lora(case):
    """Forward and every gradient, with the same A and B, without dropout (the random streams differ)."""
    kind, dtype, autocast_adapter_dtype, tolerance = PARITY[case]
    ours = adapted(Pair(kind, dtype), autocast_adapter_dtype, **IDENTITY)
    peft = adapted(Pair(kind, dtype), autocast_adapter_dtype, plain=True)
    outputs, gradients = [], []
    for model in (ours, peft):
        torch.manual_seed(5)
        x = torch.randn(2, 9, 64, dtype=dtype, requires_grad=True)
        outputs.append(model(x))
        outputs[-1].float().square().sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        gradients.append({**named, "x": x.grad})
    assert outputs[0].dtype == outputs[1].dtype
    assert relative(*outputs) <= tolerance
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.dtype == gradients[1][name].dtype
        assert relative(gradient, gradients[1][name]) <= 2 * tolerance, name


def test_bf16_is_no_less_exact_than_pefts_lora():
    """Against the same sum in fp64: the kernel rounds the branch once less."""
    x = torch.randn(50, 64, dtype=BF16)
    distance = {}
    for name, settings in (("ours", IDENTITY), ("peft", {"plain": True})):
        layer = adapted(Pair(dtype=BF16), False, **settings).base_model.model.up
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        base = layer.base_layer.double()
        exact = base(x.double()) + 1.5 * x.double() @ a.T @ b.T
        layer.base_layer.to(BF16)
        distance[name] = relative(layer(x), exact)
    assert distance["ours"] <= distance["peft"]


@pytest.mark.parametrize("kind", ["float", "nf4", "int8"])
def test_forward_is_the_formula(kind):
    """y = base(x) + s·B·W·A·x (paper eq. 7), with a W that is far from the identity."""
    model = adapted(Pair(kind), mixer_init="normal")
    layer, x = model.base_model.model.up, torch.randn(3, 64)
    a, w, b = layer.adapter_weights("default")
    assert relative(layer(x), layer.base_layer(x) + 1.5 * x @ a.T @ w.T @ b.T) <= 1e-6


def test_autocast():
    """bf16 inside, fp32 parameters and gradients outside, the same in forward and in a backward outside autocast."""
    model, x = adapted(Pair()), torch.randn(4, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with torch.autocast("cpu", dtype=BF16):
        y = model(x)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert relative(x.grad, expected) <= 4 * ONE_BF16_STEP
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        exact = model(x)
    assert 0 < relative(y, exact) <= 4 * ONE_BF16_STEP


def test_several_adapters():
    model = adapted(Pair())
    x = torch.randn(4, 64)
    first = model(x)
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["up"]))
    model.add_adapter("second", MosLoraConfig(r=4, target_modules=["up", "down"], mixer_init="butterfly"))
    randomise(model, seed=9)
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    assert relative(second, first) > 1e-3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".second." in name for name in trained)
    assert any("lora_mixer" in name for name in trained)

    model.set_adapter("plain")
    assert relative(model(x), second) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), Pair()(x))
    model.eval()
    mixed = model(x, adapter_names=["default", "second", "__base__", "plain"])
    model.set_adapter("default")
    assert relative(mixed[0], first[0]) <= 1e-6 and relative(mixed[1], second[1]) <= 1e-6
    assert relative(mixed[2], Pair()(x)[2]) <= 1e-6

    model.delete_adapter("second")
    assert not any(".second" in name for name, _ in model.named_modules())
    assert torch.equal(model(x), first)


def test_two_active_adapters_add_up():
    model = adapted(Pair())
    model.add_adapter("second", MosLoraConfig(r=4, target_modules=["up", "down"]))
    randomise(model, seed=9)
    layer, x = model.base_model.model.up, torch.randn(4, 64)
    layer.set_adapter(["default", "second"])
    both = layer.base_layer(x) + x @ (layer.get_delta_weight("default") + layer.get_delta_weight("second")).T
    assert relative(layer(x), both) <= 1e-6


def test_frozen_mixers_stay_frozen():
    model = adapted(Pair(), mixer_init="orthogonal", train_mixer=False)
    mixer = model.base_model.model.up.lora_mixer["default"].weight
    a = model.base_model.model.up.lora_A["default"].weight
    model.add_adapter("second", MosLoraConfig(r=4, target_modules=["up"]))
    for switch in (
        lambda: None,
        lambda: model.set_adapter("second") or model.set_adapter("default"),
        lambda: model.base_model.disable_adapter_layers() or model.base_model.enable_adapter_layers(),
        lambda: model.set_requires_grad("default"),
    ):
        switch()
        assert a.requires_grad and not mixer.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(dtype, safe):
    model, x = adapted(Pair(dtype=dtype), mixer_init="orthogonal"), torch.randn(4, 64, dtype=dtype)
    layer = model.base_model.model.up
    before, base = model(x), layer.base_layer.weight.detach().clone()
    model.merge_adapter(safe_merge=safe)
    once = layer.base_layer.weight.detach().clone()
    exact = base.double() + layer.get_delta_weight("default").double()
    assert torch.equal(once, exact.to(dtype)) or relative(once, exact) <= torch.finfo(dtype).eps
    assert relative(model(x), before) <= (1e-6 if dtype == torch.float32 else 2 * ONE_BF16_STEP)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that there is nothing left to merge
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(layer.base_layer.weight, once)

    model.unmerge_adapter()
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(torch.maximum(base.abs().max(), once.abs().max())))
    assert (layer.base_layer.weight - base).abs().max() <= ulp


def test_unmerge_is_exact_with_a_kept_base():
    model = adapted(Pair())
    model.add_adapter("second", MosLoraConfig(r=4, target_modules=["up", "down"]))
    randomise(model, seed=9)
    expected = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}

    def restored():
        model.merge_adapter(adapter_names=["default", "second"])
        model.unmerge_adapter()
        return all(torch.equal(p, expected[n]) for n, p in model.named_parameters() if n in expected)

    keep_base(model)
    assert restored()
    keep_base(model, False)
    assert not restored()  # otherwise this test could not fail


def test_safe_merge_stops_before_the_weight_is_touched():
    model = adapted(Pair())
    layer = model.base_model.model.up
    layer.lora_mixer["default"].weight.data[0, 0] = float("nan")
    base = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, base)


def test_merge_and_unload_gives_the_plain_model():
    model = get_peft_model(llama(), MosLoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False)).eval()
    ids = torch.arange(1, 21)[None]
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert not any(isinstance(m, MosLoraLinear) for m in merged.modules())
    assert merged.state_dict().keys() == llama().state_dict().keys()
    assert (merged(input_ids=ids).logits - expected).abs().max() <= 1e-5


def test_int8_merges_as_in_peft():
    model, x = adapted(Pair("int8")), torch.randn(4, 64)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding, says PEFT
        model.merge_adapter()
    assert relative(model(x), before) <= 0.02  # int8: 1/127 of the largest weight of a row


def test_all_trainable_tensors_have_one_dtype():
    """ZeRO-3 asserts it; PEFT's upcast must reach the mixer."""
    for autocast_adapter_dtype, expected in ((True, torch.float32), (False, BF16)):
        model = adapted(Pair(dtype=BF16), autocast_adapter_dtype, mixer_init="orthogonal")
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_save_and_load(tmp_path, low_cpu_mem_usage):
    model = get_peft_model(llama(), MosLoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False)).eval()
    ids = torch.arange(1, 21)[None]
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(again(input_ids=ids).logits, expected)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_part_of_an_adapter_is_not_loaded(tmp_path, damage):
    """PEFT warns of a missing mixer and drops an unexpected one without a word; either way B·A would be computed."""
    model = adapted(Pair(), **(IDENTITY if damage == "missing" else {}))
    model.save_pretrained(tmp_path)
    MosLoraConfig(r=8, target_modules=["up", "down"], **(IDENTITY if damage == "unexpected" else {})).save_pretrained(
        tmp_path
    )
    with pytest.raises(Refusal, match=rf"{damage}: base_model\.model\.\w+\.lora_mixer\."):
        PeftModel.from_pretrained(Pair(), tmp_path)


def test_deepcopy_and_eval_mode():
    model, x = adapted(Pair(), lora_dropout=0.9), torch.randn(4, 64)
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
    assert not torch.equal(model.train()(x), model.train()(x))


def test_layers_that_share_an_input_keep_it_once():
    """Backward keeps x itself, in its own dtype, though the adapter computes in fp32."""
    model = get_peft_model(
        nn.ModuleDict({"q": nn.Linear(32, 32), "k": nn.Linear(32, 16)}).to(BF16),
        MosLoraConfig(r=4, target_modules=["q", "k"], lora_dropout=0.5),
    )
    x = torch.randn(10, 32, dtype=BF16, requires_grad=True)
    kept = set()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add((t.untyped_storage().data_ptr(), t.dtype)) or t, lambda t: t
    ):
        layers = model.base_model.model
        y = layers["q"](x).sum() + layers["k"](x).sum()
    activations = {(p, d) for p, d in kept if p not in weights and d != torch.int64}
    assert activations == {(x.untyped_storage().data_ptr(), BF16)}
    y.backward()
    assert x.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["bf16", "bf16, fp32 adapter", "nf4, bf16", "nf4, single quantisation", "int8"])
def test_gpu_frozen_identity_is_pefts_lora(case):
    kind, dtype, autocast_adapter_dtype, tolerance = PARITY[case]
    if kind == "int8":
        dtype, tolerance = torch.float16, 2**-10  # the CUDA kernel's input dtype
    outputs, gradients = [], []
    for settings in (IDENTITY, {"plain": True}):
        model = adapted(Pair(kind, dtype, "cuda"), autocast_adapter_dtype, **settings)
        torch.manual_seed(5)
        x = torch.randn(2, 9, 64, dtype=dtype).cuda().requires_grad_()
        outputs.append(model(x))
        outputs[-1].float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad] + [x.grad])
    assert relative(*outputs) <= max(tolerance, 1e-5)  # TF32 and cuBLAS's choice of sums
    for ours, pefts in zip(*gradients, strict=True):
        assert relative(ours, pefts) <= 2 * max(tolerance, 1e-5)
