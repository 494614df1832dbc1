"""Counts of weights and optimizer state, against real objects and DeepSpeed's own estimators."""

import math

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from llava_moslora.config import ADAPTER_METHODS, AdapterSettings
from llava_moslora.models.adapt import add_adapters, train_projector_only
from llava_moslora.models.llm import read_llm_config
from llava_moslora.models.vision import read_vision_config
from llava_moslora.planning.setting import Model, Zero
from llava_moslora.planning.states import FACTORED, Counts, count, nf4_bytes, states
from support.assembled import build
from support.planned import TINY_ADAPTERS, zero

EVERY_SETTING = {
    "both towers": TINY_ADAPTERS,
    "LLM alone": AdapterSettings(lora_r=8, vision_lora_r=0),
    "tower alone": AdapterSettings(lora_r=0, vision_lora_r=8),
    "some linears": AdapterSettings(lora_r=4, vision_lora_r=4, lora_target_modules=["q_proj", "lm_head"]),
    "fixed mixers": AdapterSettings(lora_r=4, vision_lora_r=4, train_mixer=False, mixer_init="identity"),
    "fixed, drawn mixers": AdapterSettings(lora_r=4, vision_lora_r=4, train_mixer=False, mixer_init="orthogonal"),
    "stage 1": AdapterSettings(tune_mm_mlp_adapter=True),
}
EQUAL = {"lora_r": 4, "vision_lora_r": 4, "lora_alpha": 8, "vision_lora_alpha": 8}  # as AdaLoRA needs it
EVERY_SETTING |= {name: AdapterSettings(method=name, **EQUAL) for name in ADAPTER_METHODS if name != "moslora"}


@pytest.mark.parametrize("adapter", EVERY_SETTING.values(), ids=EVERY_SETTING)
def test_counts_are_those_of_the_real_model(parts, adapter):
    real, tokenizer = build(parts)
    config = read_llm_config(parts.llm)
    config.vocab_size = max(config.vocab_size, len(tokenizer))  # a row for <image>
    counts = count(Model(config, read_vision_config(parts.clip), adapter))
    merged = sum(p.numel() for p in real.parameters())
    real = train_projector_only(real) if adapter.tune_mm_mlp_adapter else add_adapters(real, adapter)
    assert counts.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counts.frozen == sum(p.numel() for p in real.parameters() if not p.requires_grad)
    assert counts.merged == merged


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (4096, 1024), (333, 130)])
def test_nf4_bytes_are_those_of_a_quantised_weight(shape):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(shape, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
    )
    tensors = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(math.prod(shape)) == sum(t.numel() * t.element_size() for t in tensors)


def test_what_is_quantised_is_what_bitsandbytes_quantises(parts):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real, tokenizer = build(parts, bits=4)
    config = read_llm_config(parts.llm)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    real = add_adapters(real, TINY_ADAPTERS)
    quantised = [m for m in real.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    counts = count(Model(config, read_vision_config(parts.clip), TINY_ADAPTERS, bits=4))
    assert sorted(counts.nf4) == sorted(m.weight.quant_state.shape.numel() for m in quantised)
    others = {id(m.weight) for m in quantised}
    assert counts.frozen == sum(p.numel() for p in real.parameters() if not p.requires_grad and id(p) not in others)


def test_adafactors_state_is_that_of_the_real_optimizer(parts):
    """After a step, without its step counts and the RMS of the weights, which are numbers."""
    from transformers import Adafactor

    real, tokenizer = build(parts)
    config = read_llm_config(parts.llm)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    trained = [p for p in add_adapters(real, TINY_ADAPTERS).parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Adafactor(trained, lr=1e-3, scale_parameter=False, relative_step=False)  # as the Trainer makes it
    optimizer.step()
    kept = [v for state in optimizer.state.values() for n, v in state.items() if n not in ("step", "RMS")]
    found = states(count(Model(config, read_vision_config(parts.clip), TINY_ADAPTERS)), Zero(), 1, 2, FACTORED)
    assert found.moments == sum(v.numel() * v.element_size() for v in kept) > 0


def all_trained(numbers: int) -> Counts:
    return Counts(frozen=0, nf4=(), trained=numbers, factored=0, merged=0, sizes=(numbers,), flops=None)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_zero2_is_deepspeeds_estimate_where_all_is_trained(gpus):
    """Without buckets, in the step: DeepSpeed counts the gradients in float32 too."""
    numbers = 8 * 10**9
    found = states(all_trained(numbers), Zero(stage=2, bucket=0), gpus)
    _, on_gpu = estimate_zero2_model_states_mem_needs(numbers, num_gpus_per_node=gpus, cpu_offload=False)
    assert found.total + found.in_step == on_gpu


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_zero3_is_deepspeeds_estimate_where_all_is_trained(gpus):
    """Its 18 bytes a number count gradients in float32, or weights and gradients in 16 bits, not both."""
    numbers = 8 * 10**9
    found = states(all_trained(numbers), Zero(stage=3, bucket=0, live=0, prefetch=0), gpus)
    _, on_gpu, _ = estimate_zero3_model_states_mem_needs(
        numbers, 0, num_gpus_per_node=gpus, cpu_offload=False, cpu_offload_params=False
    )
    assert found.total == 16 * numbers // gpus
    assert on_gpu == found.total + 2 * numbers // gpus == found.total + found.in_step - 2 * numbers // gpus


def test_what_is_not_trained_costs_only_its_weights():
    """DeepSpeed's estimators count gradients and moments for frozen weights too."""
    counts = Counts(frozen=10**9, nf4=(), trained=10**6, factored=0, merged=0, sizes=(10**9, 10**6), flops=None)
    found = states(counts, Zero(stage=2, bucket=0), gpus=1)
    assert found.total == 2 * 10**9 + (2 + 2 + 12) * 10**6


def test_offloaded_states_are_on_the_host(parts):
    counts = all_trained(10**6)
    on_gpu = states(counts, zero("zero2"), gpus=2)
    offloaded = states(counts, zero("zero2_offload"), gpus=2)
    assert offloaded.masters == offloaded.moments == 0
    assert offloaded.host == on_gpu.masters + on_gpu.moments + 4 * 10**6 // 2


@pytest.mark.parametrize(("name", "stage", "fp32"), [("zero0", 0, False), ("zero1", 1, True), ("zero3", 3, False)])
def test_the_deepspeed_files_are_read(name, stage, fp32):
    found = zero(name)
    assert (found.stage, found.fp32_gradients) == (stage, fp32)
    if stage:
        assert found.bucket == 50_000_000 and found.overlap


def test_what_deepspeed_decides_itself_has_its_own_defaults():
    """ "auto", a part that is left out, and sizes that JSON writes as fractions."""
    own = Zero(stage=3, overlap=True)
    auto = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
         "stage3_max_live_parameters"), "auto",
    )  # fmt: skip
    assert Zero.of({"zero_optimization": {"stage": 3, **auto}}) == Zero.of({"zero_optimization": {"stage": 3}}) == own
    assert Zero.of({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}).bucket == 500_000_000
    assert Zero.of({}) == Zero.of({"zero_optimization": {}}) == Zero(stage=0)
    assert Zero.of(None) == Zero()
