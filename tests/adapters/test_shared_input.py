"""One gradient of an input that several adapted linears share: the sum of theirs, made in place."""

import gc
import weakref
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.shared_input import SHARING, share_inputs

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**TEXT)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**TEXT)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=16, patch_size=4)),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]


def adapted(name: str, shared: bool, targets=tuple(ALL), dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    here = [suffix for suffix in targets if any(n.endswith(suffix) for n, _ in model.named_modules())]
    model = get_peft_model(
        model.to(dtype), MosLoraConfig(r=2, target_modules=here, lora_dropout=0.2, init_lora_weights=False),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    model.enable_input_require_grads()
    if shared:
        share_inputs(model)
    return model.train()


def gradients(model, name: str, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    if name == "clip":
        given = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    else:
        given = {"input_ids": torch.arange(1, 25).view(2, 12)}
    model.zero_grad()
    model(**given).last_hidden_state.square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["k_proj", "up_proj"]], ids=len)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_autograds(name, targets):
    for found, expected in zip(*(gradients(adapted(name, s, targets), name) for s in (True, False)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_added_without_a_pass_of_their_own(name):
    counts = []
    for shared in (True, False):
        model = adapted(name, shared)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            gradients(model, name)
        counts.append(sum(event.name in ("aten::add", "aten::add_") for event in profile.events()))
    # in each layer those of v and k are added to q's, and up's to gate's
    per_layer = 2 if name == "clip" else 3
    assert counts[1] - counts[0] == per_layer * SIZES["num_hidden_layers"]


def test_they_are_rounded_less_often_in_16_bits():
    exact = gradients(adapted("llama", False), "llama")
    errors = []
    for shared in (True, False):
        found = gradients(adapted("llama", shared, dtype=torch.bfloat16), "llama", torch.bfloat16)
        errors.append(sum(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)))
    assert errors[0] <= 1.1 * errors[1]


def test_a_graph_can_be_gone_through_twice():
    model = adapted("llama", True)
    torch.manual_seed(1)
    loss = model(input_ids=torch.arange(1, 25).view(2, 12)).last_hidden_state.square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    for two, one in zip((p.grad for p in model.parameters() if p.grad is not None), once, strict=True):
        torch.testing.assert_close(two, 2 * one)


def attention_inputs() -> tuple[nn.Module, torch.Tensor]:
    layer = adapted("llama", True).base_model.model.layers[0].self_attn
    return layer, torch.randn(3, 32, dtype=torch.float64, requires_grad=True)


def test_an_output_that_is_not_used_is_noticed():
    layer, x = attention_inputs()
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    with pytest.raises(AssertionError, match="gone through 2 of 3 linears"):
        (q.sum() + v.sum()).backward()
    assert k.requires_grad


def test_other_inputs_are_not_mixed():
    """Of two calls in a row, and of a call that ends after its first linear, as recomputation may."""
    layer, x = attention_inputs()
    other = torch.randn_like(x, requires_grad=True)
    layer.q_proj(other)
    results = []
    for shared in (True, False):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer, name).shared_input = getattr(layer, name).shared_input if shared else None
        torch.manual_seed(2)
        outputs = [getattr(layer, name)(y) for y in (x, other) for name in ("q_proj", "k_proj", "v_proj")]
        results.append(torch.autograd.grad(sum(o.square().sum() for o in outputs), (x, other)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(use_reentrant):
    results = []
    for recomputed in (True, False):
        layer, _ = attention_inputs()
        torch.manual_seed(3)
        x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)

        def run(x, layer=layer):
            return layer.q_proj(x) * 2 + torch.cat([layer.k_proj(x), layer.v_proj(x)], -1)

        torch.manual_seed(4)
        y = checkpoint(run, x, use_reentrant=use_reentrant) if recomputed else run(x)
        y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == 10 and all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_nothing_keeps_an_input_alive():
    layer, x = attention_inputs()
    layer.q_proj(x), layer.k_proj(x)
    alive = weakref.ref(x)
    gc.collect()
    del x
    assert alive() is None


def test_without_gradients_there_is_nothing_to_share():
    layer, x = attention_inputs()
    with torch.no_grad():
        layer.q_proj(x)
    assert layer.q_proj.shared_input.gradient_of(x.detach()) is None


def note(seen: list, place: str, module, args) -> None:
    seen.append((place, id(args[0])))


def test_the_listed_linears_are_called_with_one_input():
    """In the order of the list, and nothing between them changes it."""
    for name in MODELS:
        model, seen = adapted(name, True), []
        for path, module in model.named_modules():
            if hasattr(module, "shared_input") and module.shared_input is not None:
                place = path.rsplit(".", 1)[1]
                module.register_forward_pre_hook(partial(note, seen, place))
        kinds = {type(m).__name__: SHARING[type(m).__name__] for m in model.modules() if type(m).__name__ in SHARING}
        gradients(model, name)
        for linears in kinds.values():
            calls = [(place, identity) for place, identity in seen if place in linears]
            for start in range(0, len(calls), len(linears)):
                group = calls[start : start + len(linears)]
                assert tuple(linear for linear, _ in group) == linears and len({i for _, i in group}) == 1
