"""Runs over a SigLIP tower: every target that can hold one, proven by stock libraries; the others refused."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, SiglipVisionModel

from llava_moslora.errors import Refusal
from llava_moslora.export.export import export
from llava_moslora.inference.load import load
from support.export_runs import probe_here, trained_run

CLIP_ONLY = ["xtuner", "xtuner_adapters", "llava"]


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip") / "run"
    trained_run(folder, parts.llm, parts.siglip, parts.projector)
    return folder


@pytest.mark.parametrize("kind", ["hf", "peft", "peft_with_base", "vllm", "vision", "llm", "projector"])
def test_stock_libraries_compute_what_the_run_computes(run, tmp_path, monkeypatch, kind):
    probe_here(monkeypatch)
    folder = export(run, tmp_path / "out", [kind])[kind]
    report = json.loads((folder / "export_report.json").read_text())
    expected = {"vision": {"features"}, "projector": {"projected"}}.get(kind, {"logits", "answer"})
    assert expected <= set(report["compared"])
    assert all(difference <= 1e-5 for difference in report["largest_difference"].values()), report
    assert report["same_greedy_answers"] in (True, None) and report["same_prompt_ids"] in (True, None)


@pytest.mark.parametrize("name", CLIP_ONLY)
def test_targets_whose_readers_know_clip_only(run, parts, tmp_path, name):
    said = (
        rf"C-FORMAT\] {re.escape(str(parts.siglip))}:--format {name}: its readers support only CLIP towers; found Sig"
    )
    with pytest.raises(Refusal, match=said):
        export(run, tmp_path / "out", ["hf", name])
    assert not list(tmp_path.iterdir())


def test_what_readers_ask_of_the_folder(run, tmp_path):
    folder = export(run, tmp_path / "out", prove=False)["hf"]
    config = json.loads((folder / "config.json").read_text())
    expected = {"vision_feature_layer": -2, "vision_feature_select_strategy": "full", "image_seq_length": 16}
    assert {key: config[key] for key in expected} == expected
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    assert config["vision_config"]["num_hidden_layers"] == 3
    names = {n for n in load_file(folder / "model.safetensors") if n.startswith("vision_tower.")}
    assert "vision_tower.vision_model.head.attention.in_proj_weight" in names  # complete, with what training dropped
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names
    processor = json.loads((folder / "processor_config.json").read_text())
    assert (processor["num_additional_image_tokens"], processor["vision_feature_select_strategy"]) == (0, "full")
    old = json.loads((folder / "preprocessor_config.json").read_text())
    assert (old["image_processor_type"], old["do_pad"], old["do_center_crop"]) == ("LlavaImageProcessor", True, False)


@pytest.mark.parametrize(("ratio", "kind"), [("pad", "LlavaImageProcessorPil"), ("crop", "SiglipImageProcessorPil")])
def test_a_stock_processor_makes_the_images_and_tokens_of_training(run, tmp_path, ratio, kind):
    record = json.loads((run / "run.json").read_text())
    record["settings"]["data"]["image_aspect_ratio"] = ratio
    changed = tmp_path / "run"
    changed.mkdir()
    (changed / "run.json").write_text(json.dumps(record))
    for name in ("tokenizer", "checkpoint-1"):
        (changed / name).symlink_to(run / name)
    folder = export(changed, tmp_path / "out", prove=False)["hf"]
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert type(processor.image_processor).__name__ == kind
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    inputs = processor(images=image, text="<image>what colour?", return_tensors="pt")
    chat_model = load(folder)
    assert (
        int((inputs["input_ids"] == chat_model.model.config.image_token_id).sum()) == 16 == chat_model.tokens_per_image
    )
    assert torch.equal(inputs["pixel_values"][0], chat_model.transform(image))
    assert chat_model.transform.aspect_ratio == ratio
    images = {"pad": "padded to a square", "crop": "scaled to a square"}[ratio]
    assert f"| images | {images} |" in (folder / "README.md").read_text()
    assert processor._get_num_multimodal_tokens([(50, 90)])["num_image_tokens"] == [16]  # what vLLM reserves


def test_the_tower_alone(run, parts, tmp_path):
    folder = export(run, tmp_path / "out", ["vision"], prove=False)["vision"]
    tower, info = SiglipVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = SiglipVisionModel.from_pretrained(parts.siglip)
    changed = {
        n for (n, a), b in zip(tower.named_parameters(), before.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert len(changed) == 2 * 6 and all(n.startswith(("encoder.layers.0.", "encoder.layers.1.")) for n in changed)
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")).__name__ == "SiglipImageProcessorPil"
    card = (folder / "README.md").read_text()
    assert "SiglipVisionModel.from_pretrained(FOLDER" in card and "hidden_states[-2][:, 0:]" in card
