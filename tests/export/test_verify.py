"""The proof as a user gets it: a fresh process, a report, a model card, and a script that anyone can run again."""

import json
import subprocess
import sys

import pytest

from llava_moslora.export.export import export
from llava_moslora.files.manifest import verify_manifest
from support.export_runs import trained_run


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    place = tmp_path_factory.mktemp("proof")
    trained_run(place / "run", parts.llm, parts.clip, parts.projector)
    return export(place / "run", place / "merged")["hf"]


def test_report(folder):
    report = json.loads((folder / "export_report.json").read_text())
    assert report["proof"] == "passed" and report["questions"] == 3
    assert report["same_prompt_ids"] and report["same_greedy_answers"] and len(report["answers"]) == 3
    assert 0 <= report["largest_difference"]["logits"] <= 1e-5 < report["largest_value"]["logits"]
    assert report["logits_difference_from_the_run_as_trained"] <= 1e-5
    assert verify_manifest(folder)["proof"] == "passed"  # every file of the export is hashed in it


def test_card(folder, parts):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# merged\n" in card
    for fact in (str(parts.llm), str(parts.clip), "`chatml`", "padded to a square", "LLM r 4, tower r 2",
                 "2.5 at step 1, 1.25 at step 2, lowest 1.25 at step 2", "transformers 5.", '"data.json": "0"',
                 "fresh process with stock libraries only, 3 questions"):  # fmt: skip
        assert fact in card, fact


def test_what_vllm_asks_of_the_configuration(folder):
    """It makes the LLM from text_config alone, and old readers know the rotary base by its old name."""
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert "rope_theta" in config["text_config"] and config["text_config"]["tie_word_embeddings"] is False
    expected = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    assert {name: config[name] for name in expected} == expected


def test_what_transformers_4_reads(folder):
    """4.49 stops at settings of the image in processor_config.json; ``generate`` refuses token_type_ids."""
    assert "image_processor" not in json.loads((folder / "processor_config.json").read_text())
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert (images["image_processor_type"], images["do_pad"]) == ("LlavaImageProcessor", True)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.slow
def test_anyone_can_run_it_again(folder):
    done = subprocess.run([sys.executable, folder / "probe" / "probe.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1].replace("'", '"'))) == {"answer.0", "answer.1", "answer.2"}
