"""Exports of a run on text alone: ``llm`` and ``peft`` in stock libraries; the other formats are refused."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_moslora.errors import Refusal
from llava_moslora.export.export import TARGETS, export
from llava_moslora.inference.generate import answer, first_logits
from llava_moslora.inference.load import load
from llava_moslora.inference.stream import stream
from llava_moslora.text.conversation import Turn
from support.export_runs import probe_here
from support.text_runs import text_flags, write_alpaca
from support.training_runs import train

BOUND = 1e-5
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "                ### Instruction:\n                Name a colour.\n                \n"
    "                ### Response:\n                "
)


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    changes = {"max_steps": 4, "save_steps": 4, "train_on_prompt": True, "lora_target_modules": ["q_proj", "down_proj"]}
    train(parts, folder / "run", **text_flags(parts, write_alpaca(folder / "alpaca.json"), **changes))
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run) -> torch.Tensor:
    """The run's first-token logits after :data:`PROMPT`."""
    return first_logits(load(run), ([], [Turn("human", "Name a colour.")]))


def stock_logits(model, tokenizer, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(prompt, return_tensors="pt", add_special_tokens=False)).logits[0, -1]


def test_the_merged_llm(run, expected, tmp_path, monkeypatch, parts):
    probe_here(monkeypatch)
    folder = export(run, tmp_path / "llm", ["llm"])["llm"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Name a colour."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == PROMPT
    difference = (stock_logits(model, tokenizer, PROMPT) - expected).abs().max()
    assert difference <= BOUND * expected.abs().max()
    base = AutoModelForCausalLM.from_pretrained(parts.llm)
    assert model.config.vocab_size == base.config.vocab_size  # nothing is appended without images
    assert (stock_logits(base, tokenizer, PROMPT) - expected).abs().max() > 1e-2  # and it has learned something
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and "### Instruction:" in lines[1] and len(lines) == 4  # no second FROM
    report = json.loads((folder / "export_report.json").read_text())
    assert report["proof"] == "passed" and {"ids", "logits", "answer"} <= set(report["compared"])
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "An LLM tuned with MoSLoRA" in card and "vision" not in card
    question = ([], [Turn("human", "Name a colour.")])  # and our own loader opens it
    (whole,) = answer(load(folder), [question])
    assert [whole] == list(answer(load(run), [question]))
    assert "".join(stream(load(folder), question, max_new_tokens=64)) == whole


def test_the_plain_lora(run, expected, tmp_path, monkeypatch, parts):
    probe_here(monkeypatch)
    folder = export(run, tmp_path / "peft", ["peft"])["peft"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["llm_adapter", "probe"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(parts.llm), folder / "llm_adapter")
    logits = stock_logits(model, AutoTokenizer.from_pretrained(run / "tokenizer"), PROMPT)
    assert (logits - expected).abs().max() <= BOUND * expected.abs().max()
    assert json.loads((folder / "export_report.json").read_text())["proof"] == "passed"


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"llm", "peft"}))
def test_other_formats_are_refused(run, tmp_path, name):
    with pytest.raises(Refusal, match=rf"--format {name}: the run is text-only.*--format llm"):
        export(run, tmp_path / "out", [name])
    assert not (tmp_path / "out").exists()


def test_an_image_is_refused(run):
    turns = [Turn("human", "<image>\nWhat is this?")]
    with pytest.raises(Refusal, match=r"D-IMAGES.*text-only"):
        list(answer(load(run), [([torch.zeros(3, 32, 32)], turns)]))


def test_another_base_is_refused(run, tmp_path, parts):
    with pytest.raises(Refusal, match="--vision_tower: the run has no vision tower"):
        export(run, tmp_path / "out", ["llm"], vision_tower=str(parts.clip))
