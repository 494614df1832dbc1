"""Exports from every layout of base folder: stock transformers answers with the logits of the trained model."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llava_moslora.export.export import export
from llava_moslora.models.llava_folder import starting_parts
from llava_moslora.models.llm import mean_row
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from support.export_runs import internlm2, trained_run
from support.tiny import tiny_tokenizer, write_llm


def binary(folder: Path) -> Path:
    write_llm(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def tied(folder: Path) -> Path:
    return write_llm(folder, tie_word_embeddings=True)


def native(kind: type, folder: Path, **changes) -> Path:
    """Another architecture that transformers composes by itself, its heads wider than Llama's would be."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(kind(**(settings | changes)))
    with torch.no_grad():  # biases and norms begin at 0 and 1, which would hide that one is lost
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


BASES = {
    "internlm2": internlm2,
    "bin": binary,
    "tied": tied,
    "qwen2": partial(native, Qwen2Config, tie_word_embeddings=True),
    "qwen3": partial(native, Qwen3Config, head_dim=32),
    "mistral": partial(native, MistralConfig, sliding_window=None),
}


@torch.no_grad()
def check_same(model, merged: Path, bound: float = 1e-4) -> None:
    tokenizer = load_tokenizer(merged)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (1, 40), generator=generator)
    ids[:, 1:17] = image_token_id(tokenizer)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    stock, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model(input_ids=ids, pixel_values=pixels).logits
    found = stock.eval()(input_ids=ids, pixel_values=pixels).logits
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj", "lm_head")], ids=["layers", "with the head"])
@pytest.mark.parametrize("base", BASES)
def test_merged_is_trained(parts, tmp_path, base, targets):
    model = trained_run(tmp_path / "run", BASES[base](tmp_path / "llm"), parts.clip, parts.projector, targets)
    check_same(model, export(tmp_path / "run", tmp_path / "merged", prove=False)["hf"])


def test_an_export_starts_a_new_run(parts, tmp_path):
    """What was exported is a complete LLaVA: it is trained further, and exported again."""
    trained_run(tmp_path / "run", internlm2(tmp_path / "llm"), parts.clip, parts.projector)
    first = export(tmp_path / "run", tmp_path / "first", prove=False)["hf"]
    model = trained_run(tmp_path / "again", first, first, first)
    check_same(model, export(tmp_path / "again", tmp_path / "second", prove=False)["hf"])


@pytest.mark.parametrize("name", ["xtuner", "llava"])
def test_other_complete_layouts_start_a_new_run(parts, tmp_path, name):
    """XTuner's folder of folders, and the original LLaVA's with its own tower inside."""
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    first = export(tmp_path / "run", tmp_path / "first", [name], prove=False)[name]
    llm, tower, projector = starting_parts(first)
    assert (llm == tower == first) == (name == "llava")
    model = trained_run(tmp_path / "again", llm, tower, projector)
    check_same(model, export(tmp_path / "again", tmp_path / "second", prove=False)["hf"])


def test_a_16_bit_base_in_float32(parts, tmp_path):
    """Every part is loaded in the dtype it was written in, and appended rows are those of the model in memory."""
    llm = write_llm(tmp_path / "llm")
    base = LlamaForCausalLM.from_pretrained(llm, dtype=torch.bfloat16)
    base.save_pretrained(llm)
    assert LlamaConfig.from_pretrained(llm).dtype == torch.bfloat16
    model = trained_run(tmp_path / "run", llm, parts.clip, parts.projector)
    merged = export(tmp_path / "run", tmp_path / "merged", dtype=torch.float32, prove=False)["hf"]
    stock = AutoModelForImageTextToText.from_pretrained(merged)
    assert {p.dtype for p in stock.parameters()} == {torch.float32}
    rows = base.get_input_embeddings().weight.float()
    expected = mean_row(rows).expand(len(stock.get_input_embeddings().weight) - len(rows), -1)
    assert len(expected) == 1 and torch.equal(stock.get_input_embeddings().weight[len(rows) :], expected)
    check_same(model, merged)
