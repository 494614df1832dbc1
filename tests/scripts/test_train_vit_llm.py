"""The main job as a user runs it, tiny: two ranks under ZeRO-2, export, and the answers of stock transformers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from support.launching import flags, launch, refused, run

# Two learning rates make two groups of parameters, which DeepSpeed flattens and partitions each for itself.
TWO_RANKS = {"deepspeed": "zero_configs/zero2.json", "bf16": True, "save_steps": 1, "mm_projector_lr": 1e-3}


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("main") / "run"
    launch(flags(parts, output, **TWO_RANKS))
    return output


def test_checkpoint_holds_adapters_of_both_towers_and_the_projector(trained):
    tensors = load_file(trained / "checkpoint-2" / "adapter" / "adapter_model.safetensors")
    for part in ("language_model", "vision_tower"):
        for factor in ("lora_A", "lora_mixer", "lora_B"):
            assert any(part in name and factor in name for name in tensors)
    assert sum("multi_modal_projector" in name for name in tensors) == 4
    assert all(t.dtype == torch.float32 for t in tensors.values())  # the masters, not their 16-bit image
    assert all(t.any() for name, t in tensors.items() if "lora_B" in name)  # two steps moved every B away from 0


def test_training_form_is_refused_by_stock_peft(trained):
    program = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = run([sys.executable, "-c", program, trained / "checkpoint-2" / "adapter"])
    assert done.returncode != 0 and "KeyError: 'MOSLORA'" in done.stderr


def test_run_is_on_record(trained, parts):
    record = json.loads((trained / "run.json").read_text())
    assert record["settings"]["model"]["version"] == "chatml"
    assert record["versions"]["peft"] and "--lora_r" in record["command"]
    manifest = json.loads((trained / "checkpoint-2" / "MANIFEST.json").read_text())
    assert manifest["step"] == 2 and manifest["world_size"] == 2 and "config.json" in manifest["llm"]


@pytest.fixture(scope="module")
def merged(trained) -> Path:
    folder = trained.parent / "merged"
    done = run([sys.executable, "scripts/export.py", trained, "--output_dir", folder, "--dtype", "float32"])
    assert done.returncode == 0, done.stderr
    return folder


def test_export_is_the_legacy_layout_with_a_complete_tower(merged):
    with safe_open(merged / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    roots = ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "multi_modal_projector.")
    assert all(name.startswith(roots) for name in names)
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names  # the layer training does without
    config = json.loads((merged / "config.json").read_text())
    assert config["vision_feature_layer"] == -2 and config["vision_config"]["num_hidden_layers"] == 3
    assert json.loads((merged / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]


# What a user's process does: stock transformers, nothing of ours.
STOCK = """
import sys, json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, backend="pil")
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
assert "llava_moslora" not in sys.modules
content = [{"type": "image"}, {"type": "text", "text": "what colour is the shape?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.open(image).convert("RGB"), text=prompt, return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits[0, -1].tolist()
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
json.dump({"ids": inputs["input_ids"][0].tolist(), "logits": logits, "answer": answer}, open(output, "w"))
"""


def test_stock_transformers_answers_as_the_run_does(trained, merged, parts, tmp_path):
    from llava_moslora.inference.generate import batch, first_logits
    from llava_moslora.inference.load import load_run
    from llava_moslora.text.conversation import Turn

    image = parts.images / "0.png"
    done = run([sys.executable, "-c", STOCK, merged, image, tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    stock = json.loads((tmp_path / "out.json").read_text())
    chat_model = load_run(trained)
    question = ([Image.open(image).convert("RGB")], [Turn("human", "<image>\nwhat colour is the shape?")])
    inputs = batch(chat_model, [question])
    assert inputs["input_ids"][0].tolist() == stock["ids"]
    logits = first_logits(chat_model, question)
    torch.testing.assert_close(logits, torch.tensor(stock["logits"]), rtol=1e-4, atol=1e-4)
    untrained = first_logits(load_run(trained, trained=False), question)
    assert (logits - untrained).abs().max() > 1e-2  # training did something that the export could have lost
    ids = chat_model.model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == stock["answer"]


def test_export_does_not_overwrite_unasked(trained, merged):
    done = run([sys.executable, "scripts/export.py", trained, "--output_dir", merged])
    assert done.returncode == 2 and "already exists" in done.stderr


STATE = [
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "position.json",
    "random-0.json",
    "random-1.json",
]


def test_resumed_run_ends_in_the_same_bytes(trained, parts, tmp_path):
    """Two ranks, ZeRO-2, bf16, dropout on: killed after step 1, resumed, equal to the run that was not."""
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoint-2")
    shutil.copytree(trained / "checkpoint-2" / "adapter", again / "checkpoint-3" / "adapter")  # left by a killed save
    line = refused(flags(parts, again, **TWO_RANKS, resume=True, lora_alpha=1, per_device_train_batch_size=4))
    assert "lora_alpha: the settings differ from those of the run" in line and "--allow_change lora_alpha" in line
    launch(flags(parts, again, **TWO_RANKS, resume=True))
    for name in STATE:
        assert (again / "checkpoint-2" / name).read_bytes() == (trained / "checkpoint-2" / name).read_bytes(), name


# K5: a pickle with code
def test_no_file_of_a_checkpoint_is_a_pickle(trained):
    kinds = {path.suffix for path in (trained / "checkpoint-2").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".md"}


WRONG = {
    "missing LLM": ({"model_name_or_path": "nowhere/llama"}, "nowhere/llama:--model_name_or_path: no such folder"),
    "missing tower": ({"vision_tower": "nowhere/clip"}, "nowhere/clip: no such folder"),
    "unknown flag": ({"lora_rank": 4}, "--lora_rank: unknown flag; fix: did you mean --lora_r?"),
    "missing data": ({"data_path": "nowhere.json"}, "nowhere.json: there is no such file"),
    "missing DeepSpeed file": ({"deepspeed": "nowhere.json"}, "nowhere.json:--deepspeed: no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_are_answered_in_one_line(parts, tmp_path, case):
    changes, message = WRONG[case]
    assert message in refused(flags(parts, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_wrong_content_is_answered_in_one_line(parts, tmp_path):
    from support.tiny import write_projector

    other = write_projector(tmp_path / "other.safetensors", vision=48)
    line = refused(flags(parts, tmp_path / "run", pretrain_mm_mlp_adapter=other))
    assert "other.safetensors" in line and "expected [64, 32] (vision width 32, LLM width 64)" in line

    (tmp_path / "empty.json").write_text("[]")
    assert "empty.json" in refused(flags(parts, tmp_path / "run", data_path=tmp_path / "empty.json"))

    rows = json.loads(parts.data.read_text())
    rows[0]["image"] = "gone.png"
    (tmp_path / "gone.json").write_text(json.dumps(rows))
    line = refused(flags(parts, tmp_path / "run", data_path=tmp_path / "gone.json"))
    assert "gone.png" in line and "record 0" in line
    assert not (tmp_path / "run").exists()


# C12: an output folder that is not empty
def test_a_run_is_not_overwritten_unasked(trained, parts):
    assert "the folder is not empty" in refused(flags(parts, trained))
    assert (trained / "checkpoint-2" / "MANIFEST.json").is_file()
