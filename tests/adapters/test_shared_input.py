"""One gradient of an input that several adapted linears share: the sum of theirs, made in place."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.dropout import DroppedInput
from llava_moslora.adapters.shared_input import SHARING, Gradient, share_inputs
from support.launching import ROOT

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
    given = {key: value.to(model.device) for key, value in given.items()}
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
    assert errors[0] < errors[1]


def test_a_graph_can_be_gone_through_twice(passes):
    model = adapted("llama", True)
    torch.manual_seed(1)
    loss = model(input_ids=torch.arange(1, 25).view(2, 12)).last_hidden_state.square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    for two, one in zip((p.grad for p in model.parameters() if p.grad is not None), once, strict=True):
        torch.testing.assert_close(two, 2 * one)
    assert sorted(passes) == [2] * 4 + [3] * 4


def attention_inputs() -> tuple[nn.Module, torch.Tensor]:
    """An attention whose q, k and v share their input's gradient, and an input."""
    layer = adapted("llama", True).base_model.model.layers[0].self_attn
    assert layer.q_proj.shared_input is layer.k_proj.shared_input is layer.v_proj.shared_input is not None
    return layer, torch.randn(3, 32, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many linears each gradient that was handed to autograd was made of."""
    found, add = [], Gradient.add

    def noted(self, *args):
        whole = add(self, *args)
        if whole is not None:
            found.append(self.linears)
        return whole

    monkeypatch.setattr(Gradient, "add", noted)
    return found


def test_an_output_that_is_not_used_is_noticed():
    layer, x = attention_inputs()
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    with pytest.raises(RuntimeError, match=r"gone through 2 of 3 adapted linears.*shared_input to None"):
        (q.sum() + v.sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone through 1 of 3"):  # and nothing of it is left
        q.sum().backward(retain_graph=True)
    results = []
    for outputs in ((q, k, v), [linear.base_layer(x) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)]):
        x.grad = None
        sum(output.sum() for output in outputs).backward()
        results.append(x.grad)
    assert not torch.equal(*results) and k.requires_grad  # the branches are in it


def test_a_backward_that_fails_leaves_nothing(monkeypatch):
    """For another one through the same graph."""
    layer, x = attention_inputs()
    loss = layer.q_proj(x).sum() + layer.k_proj(x).sum() + layer.v_proj(x).sum()
    loss.backward(retain_graph=True)
    expected, x.grad = x.grad, None
    add, failures = DroppedInput.add_gradient_of_x, [True]

    def failing(self, *args):
        if failures and failures.pop():
            raise torch.OutOfMemoryError("there is not enough memory")
        return add(self, *args)

    monkeypatch.setattr(DroppedInput, "add_gradient_of_x", failing)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward(retain_graph=True)
    x.grad = None
    loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_other_inputs_are_not_mixed(passes):
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
    assert passes == [3, 3]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(use_reentrant, passes):
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
    assert passes == [3, 3] and len(results[0]) == 10 and all(torch.equal(*pair) for pair in zip(*results, strict=True))


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
    assert layer.q_proj.shared_input._gradient.linears == 0
    assert layer.q_proj.shared_input.gradient_of(x.detach()) is None


def test_where_operations_are_watched_each_is_seen():
    """All FLOPs are counted, as without sharing."""
    counts = []
    for shared in (True, False):
        model = adapted("llama", shared)
        with FlopCounterMode(display=False) as counter:
            gradients(model, "llama")
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_a_model_can_be_copied_after_a_forward():
    layer, x = attention_inputs()
    layer.q_proj(x)
    shared = pickle.loads(pickle.dumps(layer.q_proj.shared_input))
    assert (shared.size, shared._x, shared._gradient.linears) == (3, None, 0)
    again = copy.deepcopy(layer)
    assert again.q_proj.shared_input is again.k_proj.shared_input is not layer.q_proj.shared_input


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


INTERPRETED = """
import torch
from adapters import test_shared_input as tests
from llava_moslora.adapters import dropout

dropout.uses_triton = lambda rows: rows.dtype != torch.float64
for name in ("llama", "clip"):
    results = [tests.gradients(tests.adapted(name, s, dtype=torch.float32), name, torch.float32) for s in (True, False)]
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm(), name
"""


def test_tritons_products_are_added_in_one_pass():
    """As on a GPU, here by Triton's interpreter, which must be asked for before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_gpu_gradients_are_autograds(name):
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for shared in (True, False):
        model = adapted(name, shared, dtype=torch.float32).cuda()
        results.append(gradients(model, name, torch.float32))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 2e-5 * expected.norm()
