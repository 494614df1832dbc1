"""Exports from every layout of base folder: stock transformers answers with the logits of the trained model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from internlm2_reference import write_internlm2
from safetensors.torch import load_file
from tiny import tiny_tokenizer, write_llm
from transformers import AutoModelForImageTextToText

from llava_moslora.data.tokenizer import image_token_id, load_tokenizer
from llava_moslora.errors import Refusal
from llava_moslora.export.hf import export_hf
from llava_moslora.models.assemble import TowerAdapter, add_adapters, assemble
from llava_moslora.runs import publish
from llava_moslora.runs.record import TOKENIZER, write_run


def internlm2(folder: Path) -> Path:
    write_internlm2(folder, shards=3, kind=".bin", vocab_size=320, bias=True)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def binary(folder: Path) -> Path:
    write_llm(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def tied(folder: Path) -> Path:
    return write_llm(folder, tie_word_embeddings=True)


BASES = {"internlm2": internlm2, "bin": binary, "tied": tied}


def trained_run(run: Path, llm: Path, vision, projector, targets: tuple[str, ...] = ()) -> torch.nn.Module:
    """A run folder as training leaves it, with random adapters instead of trained ones; and the adapted model."""
    tokenizer = load_tokenizer(llm)
    model, preprocessor = assemble(
        llm, vision, projector, tokenizer=tokenizer, image_token_id=image_token_id(tokenizer), dtype=torch.float32
    )
    model = add_adapters(model, TowerAdapter(4, 8, target_modules=targets), TowerAdapter(2, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    run.mkdir()
    parts = {"model_name_or_path": str(llm), "vision_tower": str(vision), "version": "chatml", "bits": 16}
    parts["pretrain_mm_mlp_adapter"] = str(projector)
    write_run(run, {"model": parts, "data": {"image_aspect_ratio": "pad"}, "preprocessor": preprocessor})
    tokenizer.save_pretrained(run / TOKENIZER)

    def save(folder: Path) -> None:  # as the trainer does, what was trained and nothing else
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)

    publish.publish(run / "checkpoint-1", save, lambda: {"step": 1})
    return model.eval()


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
    check_same(model, export_hf(tmp_path / "run", tmp_path / "merged"))


def test_an_export_starts_a_new_run(parts, tmp_path):
    """What was exported is a complete LLaVA: it is trained further, and exported again."""
    trained_run(tmp_path / "run", internlm2(tmp_path / "llm"), parts.clip, parts.projector)
    first = export_hf(tmp_path / "run", tmp_path / "first")
    model = trained_run(tmp_path / "again", first, first, first)
    check_same(model, export_hf(tmp_path / "again", tmp_path / "second"))


def test_a_base_that_is_gone_or_changed_is_named(parts, tmp_path):
    llm = internlm2(tmp_path / "llm")
    trained_run(tmp_path / "run", llm, parts.clip, parts.projector)
    shard = llm / "pytorch_model-00003-of-00003.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(Refusal, match=r"K-DAMAGED.*pytorch_model-00003-of-00003\.bin"):
        export_hf(tmp_path / "run", tmp_path / "merged")
    shard.unlink()
    with pytest.raises(Refusal, match=r"K-MISSING.*pytorch_model-00003-of-00003\.bin"):
        export_hf(tmp_path / "run", tmp_path / "merged")
    shutil.rmtree(llm)
    with pytest.raises(Refusal, match=r"llm.*no such folder"):
        export_hf(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
