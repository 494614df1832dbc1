"""The plan of whole models against real ones on a CPU: bytes of weights, and what forward leaves for backward.

Tiny parts in bfloat16; what stands in for the GPU's norms and SwiGLU is left out, because a CPU has none of them.
"""

from functools import cache

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from llava_moslora.config import parse_recompute
from llava_moslora.data.collate import _packed_positions
from llava_moslora.models import attention, llava
from llava_moslora.models.adapt import add_adapters
from llava_moslora.models.assemble import assemble
from llava_moslora.models.llm import read_llm_config
from llava_moslora.models.vision import read_vision_config
from llava_moslora.planning import activations as module
from llava_moslora.planning.on_meta import ATTENTION
from llava_moslora.planning.setting import Batch, Model, Zero
from llava_moslora.planning.states import count, states
from llava_moslora.recompute import set_recompute
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from support.assembled import PATCHES
from support.planned import TINY_ADAPTERS
from support.settings import parts_of

ROWS, TOKENS, LABELS = 16, 128, 64  # the planner rounds to 512 bytes: few of these tensors are no multiples
KINDS, MODES, BITS = ("images", "packed", "text"), ("none", "every:2", "selective", "full"), (16, 4)
SMALL = 0.005  # of what is kept


@pytest.fixture
def real(parts):
    @cache
    def make(kind: str, bits: int):
        images = kind != "text"
        tokenizer = load_tokenizer(parts.llm, images=images)
        paths = (parts.llm, parts.clip, parts.projector) if images else (parts.llm, None, None)
        model, _ = assemble(parts_of(*paths, bits=bits), tokenizer=tokenizer, dtype=torch.bfloat16)
        adapter = TINY_ADAPTERS if images else TINY_ADAPTERS.__class__(lora_r=4, vision_lora_r=0)
        return add_adapters(model, adapter).to(torch.bfloat16).train(), tokenizer, adapter

    return make


def planned(parts, kind: str, bits: int, adapter, vocabulary: int) -> Model:
    config = read_llm_config(parts.llm)
    config.vocab_size = max(config.vocab_size, vocabulary)  # a row for <image>
    vision = None if kind == "text" else read_vision_config(parts.clip)
    return Model(config, vision, adapter, bits=bits)


def inputs_of(kind: str, tokenizer) -> dict:
    ids = torch.randint(3, 250, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    places = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    found = {"input_ids": ids, "labels": labels, "label_positions": places[:, -LABELS // ROWS :].flatten()}
    if kind != "text":
        ids[:, 1 : 1 + PATCHES] = image_token_id(tokenizer)
        found["image_positions"] = places[:, 1 : 1 + PATCHES].flatten()
        found["pixel_values"] = torch.randn(ROWS, 3, 32, 32, dtype=torch.bfloat16)
    if kind == "packed":
        half = {"input_ids": range(TOKENS // 2)}
        found |= _packed_positions([[half, half]] * ROWS, TOKENS)
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_part_is_a_real_models(parts, real, monkeypatch, mode, kind, bits):
    """24 settings: frozen, NF4 and trained weights to the byte; what is kept between forward and backward closely."""
    monkeypatch.setattr(module, "compute_as_on_gpu", as_on_cpu)
    if kind == "packed":  # the variable-length kernel of a GPU keeps what causal attention keeps
        monkeypatch.setattr(llava, "can_omit_mask", lambda *_, **__: True)
        monkeypatch.setattr(attention, "varlen_attn", causal)
    made, tokenizer, adapter = real(kind, bits)
    model = planned(parts, kind, bits, adapter, len(tokenizer))
    at_rest = states(count(model), Zero(), gpus=1)
    assert (at_rest.trained, at_rest.frozen, at_rest.nf4) == weights_of(made)
    assert at_rest.gradients == at_rest.trained

    set_recompute(made, mode)
    inputs = inputs_of(kind, tokenizer)
    made(**inputs).loss.backward()  # what is made once
    made.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = made(**inputs)
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    output.loss.backward()
    gradients = sum(p.grad.nbytes for p in made.parameters() if p.grad is not None)
    assert gradients == at_rest.gradients
    found = module.activations(model, mode, Batch(ROWS, TOKENS, 0 if kind == "text" else ROWS, LABELS))
    beside = rotary(model, kind) + states_of_generator(model, mode)
    print(f"{mode} {kind} {bits}: planned {found.kept + found.loss + beside}, allocated {kept}")
    assert found.kept + found.loss + beside == pytest.approx(kept, rel=SMALL)


def causal(q, k, v, *_, **__):
    """In place of torch's ``varlen_attn``, of (tokens, heads, width), over all tokens at once: as many bytes."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def rotary(model: Model, kind: str) -> int:
    """Bytes of cosines and sines, which the plan counts with the batch."""
    positions = TOKENS * (ROWS if kind == "packed" else 1)
    return 2 * positions * model.llm_config.head_dim * model.dtype.itemsize


def states_of_generator(model: Model, mode: str) -> int:
    """Bytes of the random generator's states that recomputed layers keep: in the host's memory, also with a GPU."""
    name, n = parse_recompute(mode)
    layers = (0 if name == "selective" else model.tower_layers) + model.llm_config.num_hidden_layers
    return 0 if name == "none" else -(-layers // n) * torch.get_rng_state().nbytes


def weights_of(model) -> tuple[int, int, int]:
    """Bytes of trained, other frozen, and NF4 weights with their scales."""
    trained = frozen = nf4 = 0
    for p in model.parameters():
        if (state := getattr(p, "quant_state", None)) is not None:
            tensors = [p, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            nf4 += sum(t.numel() * t.element_size() for t in tensors)
        elif p.requires_grad:
            trained += p.nbytes
        else:
            frozen += p.nbytes
    return trained, frozen, nf4


def as_on_cpu(model, attention: str) -> None:
    """Attention alone: on a CPU norms and SwiGLU are transformers' own."""
    parts = ("text_config", "vision_config") if hasattr(model.model, "language_model") else ()
    model.set_attn_implementation(dict.fromkeys(parts, ATTENTION) if parts else ATTENTION)
