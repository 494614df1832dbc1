"""``playground/any_vlm.py``: MoSLoRA by plain PEFT in tiny Qwen2.5-VL, Qwen3-VL and LLaVA; stock PEFT loads it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_moslora.export.export import export
from support.export_runs import trained_run

sys.path.insert(0, str(Path(__file__).parents[2] / "playground"))

import any_vlm

TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8, "out_hidden_size": 64}
# kind → its vision tower's own settings, and the linears of one of the tower's layers
QWENS = {
    "qwen2_5_vl": ({"fullatt_block_indexes": [1], "window_size": 16}, 5),
    "qwen3_vl": ({"deepstack_visual_indexes": [0], "num_position_embeddings": 64}, 4),
}


def tiny_qwen(kind: str):
    torch.manual_seed(0)
    tokens = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
    config = AutoConfig.for_model(kind, text_config=TEXT, vision_config=TOWER | QWENS[kind][0], **tokens)
    return AutoModelForImageTextToText.from_config(config).eval()


def inputs() -> dict:
    """A picture of 4×4 patches, which become 4 tokens, in a sentence."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[5, 6, 102, *[100] * 4, 103, 7, 8, 9]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 100).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def randomise(model: PeftModel) -> None:
    """As if trained: B is not zero any more."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("kind", QWENS)
def test_stock_peft_computes_what_was_trained(kind, tmp_path):
    model = any_vlm.add_moslora(tiny_qwen(kind), r=4, tower_r=2)
    randomise(model)
    with torch.no_grad():
        expected = model(**inputs()).logits
        original = tiny_qwen(kind)(**inputs()).logits
    assert (expected - original).abs().max() > 0.01
    any_vlm.publish(model, tmp_path)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if "lora_mixer" in name}
    tower = {name for name in ranks if "visual" in name}
    assert len(ranks) == 2 * 7 + 2 * QWENS[kind][1] and len(tower) == 2 * QWENS[kind][1]
    assert all(rank == (2 if name in tower else 4) for name, rank in ranks.items())
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["peft_type"] == "LORA"

    stock = PeftModel.from_pretrained(tiny_qwen(kind), str(tmp_path / "plain"))
    with torch.no_grad():
        found = stock(**inputs()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_loop_trains(parts, tmp_path, monkeypatch, capsys):
    """On a complete LLaVA folder with its processor: the same record five times, at a falling loss."""
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    folder = export(tmp_path / "run", tmp_path / "llava", prove=False)["hf"]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    question = [{"type": "image"}, {"type": "text", "text": "what colour is the shape?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": messages, "image": str(tmp_path / "red.png")}] * 5))
    arguments = ["--model", folder, "--data", tmp_path / "rows.json", "--output_dir", tmp_path / "out", "--r", "4"]
    arguments += ["--tower_r", "2", "--learning_rate", "1e-2"]
    monkeypatch.setattr(sys, "argv", ["any_vlm.py", *map(str, arguments)])
    any_vlm.main()
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.5
    base = AutoModelForImageTextToText.from_pretrained(folder)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "out/plain"))
    assert len([name for name, _ in stock.named_modules() if name.endswith("lora_A")]) == 2 * 7 + 3 * 6
