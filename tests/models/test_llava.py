"""The training forward against stock transformers with a mask: the same losses and gradients, for every LLM family."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.errors import Refusal
from llava_moslora.models import attention
from llava_moslora.models.attention import MASKLESS, set_attention
from llava_moslora.models.llava import Llava
from llava_moslora.text.conversation import IGNORE_INDEX

IMAGE, PATCHES, LENGTHS = 60, 4, (23, 17, 9)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}  # the second layer's
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, window": MistralConfig(**SIZES, sliding_window=6),
    "mistral, wide window": MistralConfig(**SIZES, sliding_window=4096),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, window": Qwen2Config(**SIZES, **WINDOW),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3, window": Qwen3Config(**SIZES, head_dim=8, **WINDOW),
}


def llava_of(text, implementation: str = "sdpa") -> Llava:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=copy.deepcopy(text), image_token_index=IMAGE, vision_feature_layer=1
    )
    model = Llava(config)
    set_attention(model, implementation)
    return model


def batch_of(lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """Right-padded rows, the first with an image; labels on the second half of each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        mask[row, :length] = 1
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    ids[0, 2 : 2 + PATCHES] = IMAGE
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_needs_no_mask(family, implementation):
    model, batch = llava_of(FAMILIES[family], implementation), batch_of()
    stock = LlavaForConditionalGeneration.forward(model, **batch).loss
    expected = gradients(model, stock)
    del batch["attention_mask"]
    ours = model(**batch).loss
    found = gradients(model, ours)
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "mistral", "mistral, wide window", "qwen2", "qwen3"])
def test_torchs_causal_attention_is_asked_for(family, monkeypatch):
    """What a GPU's flash attention needs: no mask, ``is_causal``, and keys of their own number of heads."""
    model, batch, calls = llava_of(FAMILIES[family]), batch_of(), []
    real = F.scaled_dot_product_attention

    def seen(query, key, value, attn_mask=None, is_causal=False, **others):
        calls.append((attn_mask, is_causal, key.shape[1]))
        return real(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    del batch["attention_mask"]
    model(**batch)
    assert calls[-2:] == [(None, True, 2)] * 2  # the LLM's layers; the tower's are not causal


class Waits(TorchDispatchMode):
    """Operations whose result's size or value the host reads: on a GPU it would wait there for the device."""

    NAMES = ("nonzero", "masked_select", "_local_scalar_dense", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = "index" in name and any(
            isinstance(one, torch.Tensor) and one.dtype is torch.bool
            for arg in args if isinstance(arg, (list, tuple)) for one in arg
        )  # fmt: skip
        if name in self.NAMES or by_mask or "masked_scatter" in name:
            self.met.append(name)
        return func(*args, **kwargs or {})


def with_positions(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    trained = batch["labels"] != IGNORE_INDEX
    trained[:, 0] = False
    places = {"label_positions": trained, "image_positions": batch["input_ids"] == IMAGE}
    return batch | {name: mask.flatten().nonzero().squeeze(1) for name, mask in places.items()}


@pytest.mark.parametrize("images", [True, False])
def test_positions_from_the_collator_spare_every_wait(images):
    model, batch = llava_of(FAMILIES["llama"]), batch_of()
    del batch["attention_mask"]
    if not images:
        del batch["pixel_values"]
        batch["input_ids"][batch["input_ids"] == IMAGE] = 1
    expected = model(**batch).loss
    grads = gradients(model, expected)
    model.zero_grad()
    batch = with_positions(batch)
    if not images:
        del batch["image_positions"]
    with Waits() as waits:
        loss = model(**batch, num_items_in_batch=20).loss
        loss.backward()
    assert waits.met == []
    trained = len(batch["label_positions"])
    torch.testing.assert_close(loss * 20 / trained, expected)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad * 20 / trained, grads[name], rtol=1e-5, atol=1e-7)


def segments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=True):
    """What torch's ``varlen_attn`` is documented to compute, one sequence after the other. float[B·T, H or K, D]."""
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q[-1] == len(query) and enable_gqa
    lengths = cu_seq_q.diff()
    assert int(lengths.min()) > 0 and int(lengths.max()) == max_q == max_k and torch.equal(cu_seq_q, cu_seq_k)
    outputs = []
    for q, k, v in zip(*(x.split(lengths.tolist()) for x in (query, key, value)), strict=True):
        ahead = torch.arange(len(q))[:, None] - torch.arange(len(q))  # of the key, in tokens
        left, right = window_size
        seen = (ahead >= -right) & ((ahead <= left) | (left < 0))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def packed_batch() -> dict[str, torch.Tensor]:
    """Five records in two rows of the collator's, the shorter one padded."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number, length in enumerate([21, 6, 13, 9, 4]):
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]], "images": [], "shard": "", "id": "",
                     "record": number, "number": number})  # fmt: skip
    batch = Collator(0, None, ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3), pack_to=30)(rows)
    assert batch["input_ids"].shape == (2, 27)
    return {name: value for name, value in batch.items() if name not in ("record", "lengths")}


@pytest.fixture
def varlen(monkeypatch):
    """Packed rows go to the variable-length kernel, or to its twin, as on a GPU."""
    calls = []

    def kernel(*args, **settings):
        calls.append(settings["window_size"])
        return segments(*args, **settings)

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda x: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    return calls


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_need_no_block_mask(family, checkpointing, varlen, monkeypatch):
    """The kernel for sequences of unlike length computes what a block mask does; no such mask is made."""
    model, batch = llava_of(FAMILIES[family]), packed_batch()
    stock = llava_of(FAMILIES[family], "eager")
    expected = stock(**batch).loss
    grads = gradients(stock, expected)
    assert varlen == []
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", None)  # would be the mask's
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    loss = model(**batch).loss
    found = gradients(model, loss)
    windows = {None: (-1, 0), 6: (5, 0), 4096: (4095, 0)}
    layers = [windows[layer.self_attn.config.sliding_window if "mistral" in family else
                      getattr(layer.self_attn, "sliding_window", None)]
              for layer in model.model.language_model.layers]  # fmt: skip
    assert sorted(varlen) == sorted(layers * (1 + checkpointing))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in grads.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_packed_rows_are_computed_without_a_wait(varlen, monkeypatch):
    model, batch = llava_of(FAMILIES["llama"]), packed_batch()
    monkeypatch.setattr(attention, "varlen_attn", lambda query, *_, **__: query * 1.0)  # the twin reads the lengths
    with Waits() as waits:
        model(**batch).loss.backward()
    assert waits.met == []


@pytest.mark.parametrize(
    "why", ["a CPU", "attention dropout", "no lengths", "another family", "a mask"]
)  # each would be computed wrongly, or not at all
def test_where_packed_rows_keep_the_block_mask(why, varlen, monkeypatch):
    model, batch = llava_of(FAMILIES["llama"]), packed_batch()
    expected = llava_of(FAMILIES["llama"], "eager")(**batch).loss
    if why == "a CPU":
        monkeypatch.undo()
    elif why == "attention dropout":
        model.config.text_config.attention_dropout = 0.1
    elif why == "no lengths":
        for name in [name for name in batch if name[:3] in ("cu_", "max")]:
            del batch[name]
    elif why == "another family":
        model.config.text_config._attn_implementation_internal = "sdpa"  # what set_attention leaves it
    else:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        expected = llava_of(FAMILIES["llama"], "eager")(**batch).loss
    torch.testing.assert_close(model.eval()(**batch).loss, expected, rtol=1e-6, atol=1e-6)
    assert varlen == []


def test_ours_is_sdpa_for_everything_else():
    """Left-padded prompts and a cache: the same tokens as transformers' own ``sdpa`` writes."""
    model = llava_of(FAMILIES["llama"]).eval()
    assert model.config.text_config._attn_implementation == MASKLESS
    prompts = torch.tensor([[0, 0, 0, 7, 8, 9], [3, 4, 5, 6, 7, 8]])
    inputs = {"input_ids": prompts, "attention_mask": (prompts > 0).long()}
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    logits = model(**inputs).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), written)
    assert torch.equal(model(**inputs).logits, logits)


def test_answers_need_the_logits_of_one_position():
    """Of a prompt: with a vocabulary of 128,000 tokens the logits of the others would take gigabytes."""
    model, positions = llava_of(FAMILIES["llama"]).eval(), []
    model.lm_head.register_forward_hook(lambda module, args, logits: positions.append(logits.shape[1]))
    batch = {name: tensor for name, tensor in batch_of((17, 17, 17)).items() if name != "labels"}
    model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert positions == [1, 1, 1]
    every, last = model(**batch).logits, model(**batch, logits_to_keep=1).logits
    assert every.shape[1] == 17 and last.shape[1] == 1
    torch.testing.assert_close(last, every[:, -1:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_is_set_in_both_towers(implementation):
    model = llava_of(FAMILIES["llama"], implementation)
    llm, tower = model.model.language_model.config, model.model.vision_tower.config
    assert llm._attn_implementation == (MASKLESS if implementation == "sdpa" else "eager")
    assert tower._attn_implementation == implementation
    assert "_attn_implementation" not in model.config.to_json_string()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed here")
def test_an_implementation_that_a_part_does_not_have():
    with pytest.raises(
        Refusal, match=r"C-MODEL\] --attn_implementation: a part .*; found flash_attention_2: .*; fix: use sdpa"
    ):
        llava_of(FAMILIES["llama"], "flash_attention_2")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_gpu_variable_length_kernel(window, dtype, tolerance):
    """Output and gradients against the same attention in float64, with fewer key heads than heads."""
    torch.manual_seed(0)
    starts = torch.tensor([0, 70, 75, 140, 260, 280], dtype=torch.int32)
    inputs = [torch.randn(2, heads, 140, 64, dtype=dtype) for heads in (8, 2, 2)]
    weights = torch.randn(2, 140, 8, 64, dtype=dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    flat = (x.transpose(1, 2).flatten(0, 1) for x in exact)
    bounds = (starts, starts, 120, 120)
    expected = segments(*flat, *bounds, scale=0.125, window_size=(-1 if window is None else window - 1, 0))
    expected = expected.view(2, 140, 8, 64)
    (expected * weights.double()).sum().backward()
    there = [x.cuda().requires_grad_() for x in inputs]
    settings = {"scaling": 0.125, "sliding_window": window, "cu_seq_lens_q": starts.cuda(), "max_length_q": 120}
    found, _ = attention.attention_forward(torch.nn.Module(), *there, attention.empty_mask(there[0]), **settings)
    (found * weights.cuda()).sum().backward()
    pairs = [(found, expected), *((ours.grad, right.grad) for ours, right in zip(there, exact, strict=True))]
    for ours, right in pairs:
        error = (ours.detach().cpu().double() - right.detach()).norm() / right.detach().norm()
        assert error <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_gpu_flash_attention_and_no_wait(family, packed):
    """Nothing but flash kernels is allowed, which take no mask, and no value travels to the host; the loss is right."""
    batch = packed_batch() if packed else with_positions(batch_of())
    batch.pop("attention_mask", None)
    model = llava_of(FAMILIES[family])
    expected = model(**batch).loss
    model = model.to("cuda", torch.bfloat16)
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    model(**batch).loss.backward()  # libraries are loaded, workspaces made
    torch.cuda.set_sync_debug_mode("error")
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            loss = model(**batch).loss
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(loss) == pytest.approx(float(expected), rel=2e-2)


@pytest.mark.parametrize("trained_head", [False, True])
def test_many_labels_are_a_loss_in_chunks(monkeypatch, trained_head):
    """The same sum and gradients as all logits at once, and the logits of one chunk at a time."""
    monkeypatch.setattr("llava_moslora.models.llava.LOSS_CHUNK", 4)
    torch.manual_seed(0)
    hidden, targets = torch.randn(10, 32, requires_grad=True), torch.randint(0, 50, (10,))  # (S, D), (S)
    head, seen = torch.nn.Linear(32, 50, bias=False).requires_grad_(trained_head), []
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model = SimpleNamespace(lm_head=head)
    model._chunk_loss = lambda *chunk: Llava._chunk_loss(model, *chunk)
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    loss, correct = Llava._summed_loss(model, hidden, targets)
    assert correct is None
    with torch.no_grad():
        assert Llava._summed_loss(model, hidden, targets)[1] == (head(hidden).argmax(-1) == targets).sum()
    del seen[3:]  # those without gradients
    gradients = torch.autograd.grad(loss, wanted)
    assert seen[:3] == [4, 4, 2] and sorted(seen[3:]) == [2, 4, 4]  # and again in backward
    whole = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, whole, atol=1e-6, rtol=1e-6)
    for one, other in zip(gradients, torch.autograd.grad(whole, wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
