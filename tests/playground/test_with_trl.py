"""``playground/with_trl.py`` under TRL's own trainers, where TRL is installed (written for 1.16)."""

import json
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from llava_moslora.export.export import export
from support.export_runs import trained_run

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
sys.path.insert(0, str(Path(__file__).parents[2] / "playground"))

import with_trl

QUESTION = [{"type": "image"}, {"type": "text", "text": "what colour is the shape?"}]


def rows(method: str, folder: Path) -> list[dict]:
    found = []
    for colour in ("red", "green", "blue", "yellow"):
        image = folder / f"{colour}.png"
        Image.new("RGB", (40, 30), colour).save(image)
        asked = [{"role": "user", "content": QUESTION}]
        right, wrong = ([{"role": "assistant", "content": [{"type": "text", "text": t}]}] for t in (colour, "square"))
        row = {"messages": asked + right} if method == "sft" else {"prompt": asked, "chosen": right, "rejected": wrong}
        found.append({"images": [str(image)]} | row)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_loss_falls_and_stock_peft_loads_the_adapter(parts, tmp_path, monkeypatch, method):
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    model = export(tmp_path / "run", tmp_path / "llava", prove=False)["hf"]
    (tmp_path / "rows.json").write_text(json.dumps(rows(method, tmp_path)))
    out = tmp_path / "out"
    arguments = [method, "--model", model, "--data", tmp_path / "rows.json", "--output_dir", out, "--max_steps", "4"]
    arguments += ["--r", "4", "--learning_rate", "1e-2", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["with_trl.py", *map(str, arguments)])
    with_trl.main()
    log = json.loads((out / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "MOSLORA"
    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), str(out / "plain"))
    assert len([name for name, _ in stock.named_modules() if name.endswith("lora_A")]) == 2 * 7
