"""The paper's row: found where a run or an export says enough, and claimed for no other model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.evaluation.paper_row import recognise_row
from llava_moslora.evaluation.results import PAPER_ROWS
from llava_moslora.runs.record import RunSettings, write_run

SIZES = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336,
    "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_3 = SIZES | {"vocab_size": 128256, "max_position_embeddings": 8192}
LLAMA_3_ROPE, LLAMA_31_ROPE = (
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
)  # fmt: skip
INTERNLM2 = SIZES | {
    "model_type": "internlm2", "vocab_size": 92544, "max_position_embeddings": 32768, "bias": False,
    "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0},
}  # fmt: skip
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"image_size": 336, "patch_size": 14}
LLAMA_NAME, INTERNLM2_NAME, CLIP_NAME = "Meta-Llama-3-8B-Instruct", "internlm2-chat-7b", "clip-vit-large-patch14-336"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = {"mixer_init": "identity", "train_mixer": False}
TABLE_8 = {"learning_rate": 2e-5, "num_train_epochs": 1.0, "max_steps": -1, "mm_projector_lr": None}
RANK_512 = {"lora_r": 512, "lora_alpha": 256, "lora_target_modules": LINEARS}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Configurations of the real parts, no weights."""
    folder = tmp_path_factory.mktemp("models")
    llama = LlamaConfig(**LLAMA_3, rope_parameters=LLAMA_3_ROPE)
    llama_31 = LlamaConfig(**LLAMA_3 | {"max_position_embeddings": 131072}, rope_parameters=LLAMA_31_ROPE)
    llama.save_pretrained(folder / LLAMA_NAME)
    llama.save_pretrained(folder / f"models--meta-llama--{LLAMA_NAME}/snapshots/e1945c40")
    llama.save_pretrained(folder / "Hermes-3-Llama-3-8B")
    llama_31.save_pretrained(folder / "Meta-Llama-3.1-8B-Instruct")
    llama_31.save_pretrained(folder / "renamed" / LLAMA_NAME)
    LlamaConfig(**SIZES | {"intermediate_size": 11008, "num_key_value_heads": 32}).save_pretrained(folder / "vicuna-7b")
    CLIPVisionConfig(**CLIP_L).save_pretrained(folder / CLIP_NAME)
    CLIPVisionConfig(**CLIP_L | {"image_size": 224}).save_pretrained(folder / "small" / CLIP_NAME)
    for name in (INTERNLM2_NAME, "internlm2_5-7b-chat"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(INTERNLM2))
    return folder


def run(folder, models, llm=LLAMA_NAME, *, tower=CLIP_NAME, bits=16, batch=64, training=None, **adapter):
    base = ModelSettings(str(models / llm), str(models / tower), "projector", "llama3", bits)
    parts = (base, DataSettings(["data.json"]), AdapterSettings(**adapter))
    folder.mkdir()
    write_run(folder, RunSettings(*parts, TABLE_8 if training is None else training, {}, batch))
    return folder


@pytest.mark.parametrize("llm, bits, adapter, row", [
    (LLAMA_NAME, 16, PLAIN, "llama-3-lora"),
    (LLAMA_NAME, 16, {}, "llama-3-moslora-kaiming"),
    (LLAMA_NAME, 16, {"mixer_init": "orthogonal"}, "llama-3-moslora-orthogonal"),
    (f"models--meta-llama--{LLAMA_NAME}/snapshots/e1945c40", 16, {}, "llama-3-moslora-kaiming"),
    (INTERNLM2_NAME, 4, RANK_512 | PLAIN, "internlm2-qlora"),
    (INTERNLM2_NAME, 4, RANK_512, "internlm2-qmoslora-kaiming"),
    (INTERNLM2_NAME, 4, RANK_512 | {"mixer_init": "orthogonal"}, "internlm2-qmoslora-orthogonal"),
])  # fmt: skip
def test_the_papers_own_runs_have_their_rows(tmp_path, models, llm, bits, adapter, row):
    found, sentence = recognise_row(run(tmp_path / "run", models, llm, bits=bits, **adapter))
    assert found == row in PAPER_ROWS
    assert sentence == f"{row}: the paper's row of this LLM and method, recognised from its record."


@pytest.mark.parametrize("llm, more, why", [
    ("vicuna-7b", {}, "vicuna-7b is not an LLM of its Table 5"),
    ("Meta-Llama-3.1-8B-Instruct", {}, "Meta-Llama-3.1-8B-Instruct is not an LLM"),
    ("Hermes-3-Llama-3-8B", {}, "Hermes-3-Llama-3-8B is not an LLM"),
    ("internlm2_5-7b-chat", {"bits": 4}, "internlm2_5-7b-chat is not an LLM"),
    (f"renamed/{LLAMA_NAME}", {}, "its configuration is of another"),
    (f"moved/{LLAMA_NAME}", {}, "a configuration cannot be read (no such folder: "),
    (LLAMA_NAME, {"bits": 4}, "LLaMA-3 was trained with 4 bits, in the paper with 16"),
    (INTERNLM2_NAME, {"bits": 16}, "InternLM2 was trained with 16 bits, in the paper with 4"),
    (LLAMA_NAME, {"tower": f"small/{CLIP_NAME}"}, f"the vision tower is not known as {CLIP_NAME}"),
    (LLAMA_NAME, {"tower": "open_clip:ViT-L-14-336@openai"}, f"the vision tower is not known as {CLIP_NAME}"),
    (LLAMA_NAME, {"mixer_init": "normal"}, "no row has trained mixers with init normal"),
    (LLAMA_NAME, {"mixer_init": "identity"}, "no row has trained mixers with init identity"),
    (LLAMA_NAME, {"mixer_init": "orthogonal", "train_mixer": False}, "no row has fixed mixers with init ortho"),
    (LLAMA_NAME, {"vision_mixer_init": "orthogonal"}, "no row has other mixers in the vision tower than in the LLM"),
    (LLAMA_NAME, {"lora_r": 0}, "the LLM has no adapter"),
    (LLAMA_NAME, {"tune_mm_mlp_adapter": True}, "the LLM has no adapter"),
])  # fmt: skip
def test_no_row_is_claimed_for_another_model(tmp_path, models, llm, more, why):
    found, sentence = recognise_row(run(tmp_path / "run", models, llm, **more))
    assert found == "" and why in sentence
    assert sentence.startswith("No matching row of the paper: ") and sentence.endswith("--paper ROW shows one.")


def test_what_differs_from_table_8_is_named(tmp_path, models):
    plain = {"vision_mixer_init": "identity", "vision_train_mixer": False}  # as the authors' own configuration file
    _, sentence = recognise_row(run(tmp_path / "a", models, INTERNLM2_NAME, bits=4, **RANK_512, **plain))
    assert sentence.endswith("Different from the paper's Table 8: plain LoRA in the vision tower.")
    changes = {"lora_r": 16, "lora_alpha": 32.5, "vision_lora_r": 0, "lora_target_modules": ["q_proj", "v_proj"]}
    found, sentence = recognise_row(run(tmp_path / "b", models, **changes))
    assert found == "llama-3-moslora-kaiming" and sentence.endswith(
        "Table 8: --lora_r 16 (64), --lora_alpha 32.5 (128), --vision_lora_r 0 (64), --lora_target_modules q_proj"
        " v_proj (every linear)."
    )


@pytest.mark.parametrize("changes, batch, named", [
    ({}, 64, ""),
    ({}, None, ""),  # of an early version, which did not record it
    ({"mixer_lr": "None", "lora_plus_ratio": 1.0, "vision_lr": 2e-5}, 64, ""),
    ({"learning_rate": 2e-4}, 32, "--learning_rate 0.0002 (2e-05), --global_batch_size 32 (64)"),
    ({"num_train_epochs": 2, "max_steps": 100}, 64, "--num_train_epochs 2 (1), --max_steps 100 (none)"),
    ({"mixer_lr": 1e-3, "lora_plus_ratio": 16.0}, 64, "--mixer_lr 0.001 (none), --lora_plus_ratio 16 (none)"),
])  # fmt: skip
def test_another_training_than_in_table_8_is_named(tmp_path, models, changes, batch, named):
    found, sentence = recognise_row(run(tmp_path / "run", models, batch=batch, training=TABLE_8 | changes))
    assert found == "llama-3-moslora-kaiming"
    assert sentence.endswith(f"Different from the paper's Table 8: {named}." if named else "from its record.")


def test_a_run_that_states_no_training_is_not_compared(tmp_path, models):
    assert recognise_row(run(tmp_path / "run", models, batch=None, training={}))[1].endswith("from its record.")


def test_an_export_says_it_too_wherever_its_base_is_now(tmp_path, models):
    """Its own config.json is looked at: the base may be on another machine. Without its adapters nothing is certain."""
    export = tmp_path / "export"
    # The export's vocabulary is padded.
    text = LlamaConfig(**LLAMA_3 | {"vocab_size": 128320}, rope_parameters=LLAMA_3_ROPE)
    vision = CLIPVisionConfig(**CLIP_L)
    config = LlavaConfig(vision_config=vision, text_config=text, architectures=["LlavaForConditionalGeneration"])
    config.save_pretrained(export)
    save_file({"lm_head.weight": torch.zeros(1)}, export / "model.safetensors")
    base = ModelSettings(f"/elsewhere/{LLAMA_NAME}", f"/elsewhere/{CLIP_NAME}", "projector", "llama3")
    facts = {"format": "hf", "base": asdict(base), "adapter": asdict(AdapterSettings()) | {"unknown_setting": 1}}
    (export / "export.json").write_text(json.dumps(facts))
    assert recognise_row(export)[1].endswith("recognised from its record.")  # an old one, without its training
    training = {"training": {"learning_rate": 1e-4, "global_batch_size": 64, "num_train_epochs": 1, "max_steps": -1}}
    (export / "export.json").write_text(json.dumps(facts | training))
    assert recognise_row(export)[1].endswith("Table 8: --learning_rate 0.0001 (2e-05).")
    other = asdict(replace(base, model_name_or_path="/elsewhere/vicuna-7b"))
    for changed in (
        {"base": other},
        {"adapter": None},
        {"adapter": {"mixer_init": "new"}},
        {"base": {}},
        {"base": 3},
        {"base": "x"},
        {"training": 3},
    ):
        (export / "export.json").write_text(json.dumps(facts | changed))
        assert recognise_row(export)[0] == ""
    (export / "export.json").unlink()
    assert "neither a run nor an export that records its base" in recognise_row(export)[1]
