"""Selective recomputation: what runs twice, what is saved, and gradients equal to those without recomputation."""

import copy
import gc

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_moslora import recompute
from llava_moslora.adapters import linear
from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.shared_input import share_inputs
from llava_moslora.errors import Refusal
from llava_moslora.recompute import parse_recompute, set_recompute

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = SIZES | {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}
IMAGES = SIZES | {"image_size": 16, "patch_size": 4}
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**TEXT)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**TEXT)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**IMAGES)),
}
LINEARS = ["q_proj", "v_proj", "out_proj", "o_proj", "up_proj", "down_proj", "fc1", "fc2"]  # k and gate have none


def adapted(name: str, mode: str, linears=tuple(LINEARS)):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # also biases, which start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    targets = [suffix for suffix in linears if any(n.endswith(suffix) for n, _ in model.named_modules())]
    config = MosLoraConfig(r=2, target_modules=targets, lora_dropout=0.2, init_lora_weights=False)
    model = get_peft_model(model, config)
    share_inputs(model)
    model.enable_input_require_grads()
    set_recompute(model, mode)
    return model.train()


def run(model, name: str):
    """Output and gradients of a step."""
    torch.manual_seed(1)
    if "clip" in name or "siglip" in name:
        given = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        given = {"input_ids": torch.arange(1, 25).view(2, 12)}
    model.zero_grad()
    hidden = model(**given).last_hidden_state
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(found, expected) -> bool:
    return len(found) == len(expected) and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["full", "selective", "every:2"])
def test_no_bit_changes(name, mode):
    assert same(run(adapted(name, mode), name), run(adapted(name, "none"), name))


@pytest.mark.parametrize("linears", [["q_proj", "v_proj"], ["o_proj", "out_proj"], ["up_proj", "fc1"]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes_where_the_last_linear_has_no_adapter(name, linears):
    models = [adapted(name, mode, linears) for mode in ("selective", "none")]
    assert same(*(run(model, name) for model in models))


def test_a_bias_that_is_added_in_place_is_added_once(monkeypatch):
    """As ZeRO-3 does, which replaces ``F.linear``; its hooks also keep linear and adapter apart."""

    def linear_of_zero3(x, weight, bias=None):
        y = x.matmul(weight.t())
        if bias is not None:
            y += bias
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", linear_of_zero3)
    results = []
    for mode in ("selective", "none"):
        model = adapted("clip", mode)
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_pre_hook(lambda *_: None)
        results.append(run(model, "clip"))
    assert same(*results)


STOCK = {
    "dora": LoraConfig(r=2, lora_dropout=0.2, use_dora=True, init_lora_weights=False, target_modules=LINEARS),
    "loha": LoHaConfig(r=2, init_weights=False, target_modules=LINEARS),
    "lokr": LoKrConfig(r=2, init_weights=False, target_modules=LINEARS),
    "adalora": AdaLoraConfig(
        init_r=2, target_r=2, total_step=9, lora_dropout=0.2, init_lora_weights=False, target_modules=LINEARS
    ),
}


def with_stock(method: str, name: str, mode: str):
    """A model with an adapter of stock PEFT."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = get_peft_model(model, copy.deepcopy(STOCK[method]))
    model.enable_input_require_grads()
    set_recompute(model, mode)
    return model.train()


@pytest.mark.parametrize("name", ["llama", "clip"])
@pytest.mark.parametrize("method", STOCK)
def test_no_bit_changes_over_adapters_of_stock_peft(method, name):
    """AdaLoRA adds its branch in place to the linear's output, with a bias (clip) and without one."""
    results, counts = {}, {}
    for mode in ("none", "selective", "full"):
        model = with_stock(method, name, mode)
        with Products() as counter:
            results[mode] = run(model, name)
        counts[mode] = counter.count
    assert same(results["selective"], results["none"]) and same(results["full"], results["none"])
    assert any(gradient.any() for gradient in results["none"][1:])
    assert counts["none"] <= counts["selective"] < counts["full"]
    assert counts["full"] - counts["selective"] >= 3 * 7  # the frozen linears and the attention of three layers


@pytest.mark.parametrize("method", STOCK)
def test_no_product_as_large_as_a_weight_is_saved(monkeypatch, method):
    shapes, save = [], recompute.SavedOutputs.save

    def noted(self, operation, output):
        shapes.extend(t.shape for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor))
        save(self, operation, output)

    monkeypatch.setattr(recompute.SavedOutputs, "save", noted)
    run(with_stock(method, "llama", "selective"), "llama")
    assert shapes and not {(32, 32), (16, 32), (48, 32), (32, 48)} & {tuple(shape) for shape in shapes}


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the products and attentions that really run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        plain = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.count += plain or name == "llava_moslora::adapted_linear" or name.endswith("attention_for_cpu")
        return operation(*args, **(kwargs or {}))


def forward_products(name: str, mode: str) -> int:
    """Products in the step beyond those of backward's own, which are the same in every mode."""
    with Products() as counter:
        run(adapted(name, mode), name)
    return counter.count


@pytest.mark.parametrize("name", MODELS)
def test_no_product_of_a_layer_runs_twice(name):
    none, selective, full = (forward_products(name, mode) for mode in ("none", "selective", "full"))
    assert none == selective < full


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_memory_lies_between(name):
    """Bytes that autograd and the saved outputs hold after forward."""

    def held(mode: str) -> int:
        model, storages = adapted(name, mode), {}

        def note(value):
            if isinstance(value, torch.Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        save = recompute.SavedOutputs.save
        recompute.SavedOutputs.save = lambda self, name, output: save(
            self, name, torch.utils._pytree.tree_map(note, output)
        )
        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
                given = torch.randn(2, 3, 16, 16) if name == "clip" else torch.arange(1, 25).view(2, 12)
                model(given)
        finally:
            recompute.SavedOutputs.save = save
        return sum(storages.values())

    none, selective, full = held("none"), held("selective"), held("full")
    assert full < selective < none


def test_saved_outputs_are_freed_by_backward():
    """Nothing waits for the garbage collector: gigabytes would."""
    model, alive = adapted("llama", "selective"), []
    save = recompute.SavedOutputs.save

    def noted(self, name, output):
        save(self, name, output)
        tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        alive.extend(StorageWeakRef(t.untyped_storage()) for t in tensors)

    gc.collect()
    gc.disable()
    recompute.SavedOutputs.save = noted
    try:
        run(model, "llama")
        assert alive and all(reference.expired() for reference in alive)
    finally:
        recompute.SavedOutputs.save = save
        gc.enable()


def test_the_last_linear_of_a_layer_is_not_saved():
    """Its output is only added to the residual; in a layer that is not known to end like that, it is saved."""
    for name, model in (("llama", adapted("llama", "selective")), ("clip", adapted("clip", "selective"))):
        last = [n for n, m in model.named_modules() if getattr(m, "ends_layer", False)]
        assert [n.rsplit(".", 1)[1] for n in last] == ["down_proj" if name == "llama" else "fc2"] * 3


def test_an_output_that_is_overwritten_is_noticed():
    saved = recompute.SavedOutputs()
    y = torch.ones(3)
    saved.save("mm", (y, torch.ones(2)))
    y.add_(1)
    saved.next = 0
    with pytest.raises(RuntimeError, match="overwritten before backward"):
        saved.load("mm")


def test_an_output_of_another_operation_is_noticed():
    saved = recompute.SavedOutputs()
    saved.save("mm", torch.ones(3))
    saved.next = 0
    with pytest.raises(RuntimeError, match="addmm runs in place of mm"):
        saved.load("addmm")


def test_a_second_backward_is_noticed():
    model = adapted("llama", "selective")
    loss = model(input_ids=torch.arange(1, 25).view(2, 12)).last_hidden_state.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward"):
        loss.backward()


def test_what_is_no_mode_is_refused():
    assert parse_recompute("every:3") == ("full", 3)
    for text in ("every", "every:0", "every:-1", "half", "Full"):
        with pytest.raises(Refusal, match=r"--recompute: unknown mode; found .*; expected auto \| none"):
            parse_recompute(text)
    with pytest.raises(AssertionError, match="auto is decided before"):
        parse_recompute("auto")


def test_outside_of_it_nothing_is_saved():
    assert recompute.saved_outputs() is None
    run(adapted("llama", "selective"), "llama")
    assert recompute.saved_outputs() is None
    assert linear.recompute.saved_outputs() is None
