"""``scripts/convert_internlm2.py``: once on disk, the same numbers and ids, or nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch

from llava_moslora.errors import Refusal
from llava_moslora.models.llm import load_llm
from llava_moslora.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from convert_internlm2 import convert  # noqa: E402

from support.internlm2_reference import write_internlm2  # noqa: E402
from support.tiny import tiny_tokenizer  # noqa: E402


def checkpoint(folder: Path, shards: int, kind: str) -> Path:
    write_internlm2(folder, shards, kind, vocab_size=400)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("shards", "kind"), [(3, ".bin"), (2, ".safetensors"), (1, ".safetensors")])
def test_the_converted_folder_is_the_same_model_to_stock_transformers(tmp_path, shards, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint(tmp_path / "internlm2", shards, kind)
    convert(folder, tmp_path / "llama")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert type(stock).__name__ == "LlamaForCausalLM" and not info["missing_keys"] and not info["unexpected_keys"]
    ours = load_llm(folder, torch.float32)
    ids = torch.randint(3, 300, (1, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stock(ids).logits, ours(ids).logits)
    raw = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert "auto_map" not in raw and raw["rope_theta"] == 1e6  # the places where transformers 4 looks
    assert raw["rope_scaling"] == {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}
    text = "what colour is the shape"
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")(text).input_ids == load_tokenizer(folder)(text).input_ids
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) == shards


def test_nothing_is_left_where_the_conversion_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "internlm2", 3, ".bin")
    shard = folder / "pytorch_model-00002-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(Refusal, match=r"pytorch_model-00002-of-00003\.bin"):
        convert(folder, tmp_path / "llama")
    assert [p.name for p in tmp_path.iterdir()] == ["internlm2"]


def test_what_is_refused_before_anything_is_read(parts, tmp_path):
    with pytest.raises(Refusal, match="not an InternLM2; found llama; expected internlm2"):
        convert(parts.llm, tmp_path / "x")
    with pytest.raises(Refusal, match="already exists"):
        convert(checkpoint(tmp_path / "i", 1, ".bin"), tmp_path)
