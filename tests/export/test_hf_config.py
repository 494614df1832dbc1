import torch
from tiny import tiny_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig

from llava_moslora.export.hf import _llava_config, _with_rows
from llava_moslora.models.assemble import mean_row


def test_every_part_is_loaded_in_the_dtype_it_was_written_in():
    """A 16-bit base exported in float32: a part that still says bfloat16 would be rounded again by stock loading."""
    llm = LlamaConfig(vocab_size=400, hidden_size=64, num_attention_heads=4, dtype="bfloat16")
    vision = CLIPVisionConfig(image_size=32, patch_size=8, dtype="float16")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    written = _llava_config(llm, vision, tokenizer, torch.float32).to_dict()
    assert [written["dtype"], written["text_config"]["dtype"], written["vision_config"]["dtype"]] == ["float32"] * 3


def test_appended_rows_are_those_of_the_model_in_memory():
    base = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = mean_row(base.float())  # what assembling in float32 appends
    assert torch.equal(_with_rows(base, 2)[50:], expected.expand(2, -1))
    assert torch.equal(_with_rows(base, 0), base)
