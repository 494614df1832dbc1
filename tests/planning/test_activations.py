"""What the planner measures on the meta device, against what real bfloat16 layers keep on a CPU."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from llava_moslora.config import AdapterSettings
from llava_moslora.models.assemble import model_on_meta
from llava_moslora.planning import activations as module
from llava_moslora.planning.activations import activations
from llava_moslora.planning.meter import Meter, measure
from llava_moslora.planning.on_meta import ATTENTION
from llava_moslora.planning.setting import Batch
from llava_moslora.recompute import set_recompute
from support.planned import large_model, tiny_model

ROWS, TOKENS = 8, 128  # tensors are multiples of 512 bytes, to which sizes are rounded


def layer_of(device: str, mode: str):
    """A layer of the tiny LLM and its arguments; on the meta device with the attention of the planner."""
    tiny = tiny_model()
    model = model_on_meta(tiny.llm_config, tiny.vision_config, tiny.adapter)
    inner = model.get_base_model()
    if device == "meta":
        inner.set_attn_implementation({"text_config": ATTENTION})
    else:
        model.to_empty(device=device)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.02)
    set_recompute(model.train(), mode)
    llm = inner.model.language_model
    x = torch.zeros(ROWS, TOKENS, 64, dtype=torch.bfloat16, device=device)
    mask = x.new_empty(0, 0, 0, 0) if device == "meta" else None
    position_ids = torch.arange(TOKENS, device=device)[None]
    cos_sin = tuple(torch.ones(1, TOKENS, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    return llm.layers[0], x, {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": cos_sin}


def saved_bytes(layer, x, arguments) -> int:
    """Of distinct storages that autograd keeps, parameters and what the caller holds excluded."""
    held = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *arguments["position_embeddings"])}
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held and tensor.numel() > 1:  # a dropout's seed is a single number
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.clone().requires_grad_() * 1
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, **arguments)
    return sum(found.values())


def test_kept_bytes_are_the_saved_tensors_of_a_real_layer():
    expected = saved_bytes(*layer_of("cpu", "none"))
    layer, x, arguments = layer_of("meta", "none")
    cost = measure(layer, lambda x: layer(x, **arguments), x.requires_grad_(), others=arguments)
    assert cost.kept == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_kept_bytes_are_what_the_allocator_has_after_forward(mode):
    """By torch's own record of the CPU allocator, which also sees what selective recomputation saves itself."""
    layer, x, arguments = layer_of("cpu", mode)
    x = x.requires_grad_()
    layer(x.clone(), **arguments)  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = layer(x.clone(), **arguments)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events())
    layer, on_meta, arguments = layer_of("meta", mode)
    cost = measure(layer, lambda x: layer(x, **arguments), on_meta.requires_grad_(), others=arguments)
    assert cost.kept + kept.untyped_storage().nbytes() == pytest.approx(allocated, rel=0.03)


def test_a_meter_counts_living_storages_once():
    with Meter() as meter:
        x = torch.empty(1000, dtype=torch.float32, device="meta")
        y = x.view(10, 100)
        assert meter.now == 4096
        z = x + 1
        assert meter.now == 8192 and meter.peak == 8192
        del x, z
        assert meter.now == 4096  # y still has x's storage
        del y
    assert meter.now == 0 and meter.peak == 8192


def test_what_a_fused_operation_hides_is_added():
    """A linear over NF4 makes its weight in 16 bits for the product."""
    batch = Batch(1, 64, 1, 8)
    model = tiny_model()
    plain, nf4 = activations(model, "none", batch), activations(model.variant(4, False), "none", batch)
    assert nf4.in_layer >= plain.in_layer and nf4.llm == plain.llm
    assert module._inside(4)("aten::mm", ()) == 0
    triton_dropout = pytest.importorskip("llava_moslora.adapters.triton_dropout")
    assert {name: getattr(triton_dropout, name) for name in module.KERNEL} == module.KERNEL


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_more_records_keep_in_proportion(mode):
    one, four = (activations(large_model_once(), mode, Batch(n, 1024, n, 100 * n)) for n in (2, 8))
    assert four.kept == pytest.approx(4 * one.kept, rel=0.001)
    assert four.loss == pytest.approx(4 * one.loss, rel=0.001)
    assert one.working < four.working < 4 * one.working * 1.02  # weights' gradients are as large


@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "adalora", "pissa"])
def test_every_kind_of_adapter_can_be_measured(method):
    equal = {"lora_r": 4, "vision_lora_r": 4, "lora_alpha": 8, "vision_lora_alpha": 8}
    model = tiny_model(AdapterSettings(method=method, **equal))
    kept = [activations(model, mode, Batch(2, 64, 1, 8)).kept for mode in ("none", "full")]
    assert kept[0] > kept[1] > 0


def test_recomputing_more_keeps_less():
    kept = [activations(large_model_once(), mode, Batch(4, 1024, 4, 400)).kept for mode in
            ("none", "every:4", "every:2", "full")]  # fmt: skip
    assert kept == sorted(kept, reverse=True)
    selective = activations(large_model_once(), "selective", Batch(4, 1024, 4, 400)).kept
    assert kept[-1] < selective < kept[0]


def test_a_frozen_tower_keeps_nothing_but_its_positions():
    adapter = dataclasses.replace(tiny_model().adapter, vision_lora_r=0)
    found = activations(tiny_model(adapter), "none", Batch(2, 64, 2, 16))
    assert found.tower < 1024 and found.projector > 0


_models: list = []


def large_model_once():
    if not _models:
        _models.append(large_model())
    return _models[0]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_kept_bytes_are_those_of_the_gpus_allocator(mode):
    """With the kernels of a GPU, which the planner replaces on the meta device."""
    from llava_moslora.models.fused_layers import fuse_layers
    from llava_moslora.planning.on_meta import compute_as_on_gpu

    def build(device):
        tiny = tiny_model()
        tiny.llm_config.hidden_size, tiny.llm_config.head_dim = 256, 64
        model = model_on_meta(tiny.llm_config, tiny.vision_config, tiny.adapter)
        inner = model.get_base_model()
        if device == "meta":
            compute_as_on_gpu(inner, "sdpa")
        else:
            model.to_empty(device=device)
            fuse_layers(inner.model.language_model)
        set_recompute(model.train(), mode)
        x = torch.zeros(4, 512, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
        cos_sin = tuple(torch.ones(1, 512, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
        positions = torch.arange(512, device=device)[None]
        mask = x.new_empty(0, 0, 0, 0) if device == "meta" else None
        return inner.model.language_model.layers[0], x, {
            "attention_mask": mask, "position_ids": positions, "position_embeddings": cos_sin,
        }  # fmt: skip

    layer, x, arguments = build("cuda")
    layer(x.clone(), **arguments)
    before = torch.cuda.memory_allocated()
    y = layer(x.clone(), **arguments)
    allocated = torch.cuda.memory_allocated() - before
    layer, on_meta, arguments = build("meta")
    cost = measure(layer, lambda x: layer(x, **arguments), on_meta, others=arguments)
    assert allocated * 0.97 <= cost.kept + y.untyped_storage().nbytes() <= allocated * 1.05
