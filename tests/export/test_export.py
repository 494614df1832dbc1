"""Every target of every kind of run, loaded with stock libraries: same answers, logits within 1e-5 × the largest."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForImageTextToText

from llava_moslora.export.export import TARGETS, export
from llava_moslora.export.formats import DEQUANTIZED, ORIGINAL
from llava_moslora.inference.generate import answer
from llava_moslora.inference.load import load
from llava_moslora.models.llm import load_llm
from llava_moslora.text.conversation import Turn
from support.export_runs import LLMS, METHODS, probe_here, trained_run
from support.tiny import write_llm

BOUND = 1e-5
# (LLM, bits, method): the default tier has one of each of them; the slow tier every combination.
FEW = {("llama", 16, "moslora"), ("internlm2", 4, "lora")}
MATRIX = [(llm, bits, method) for llm in LLMS for bits in (16, 4) for method in METHODS]
CASES = [
    pytest.param(*case, marks=() if case in FEW else pytest.mark.slow, id="-".join(map(str, case))) for case in MATRIX
]


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    made = {}

    def run(llm: str, bits: int, method: str):
        if (llm, bits, method) not in made:
            folder = tmp_path_factory.mktemp("run")
            # Within the trained length: beyond it the scaling depends on what the model was asked before.
            shape = {"intermediate_size": 128, "max_position_embeddings": 512} if llm == "internlm2" else {}
            base = LLMS[llm](folder / "llm", **shape)
            trained_run(folder / "run", base, parts.clip, parts.projector, bits=bits, method=method)
            made[llm, bits, method] = folder / "run"
        return made[llm, bits, method]

    return run


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("llm, bits, method", CASES)
def test_stock_libraries_compute_what_the_run_computes(runs, tmp_path, monkeypatch, llm, bits, method, kind):
    """The proof itself is what is tested here; that it can fail is tested in test_refused.py."""
    probe_here(monkeypatch)
    run = runs(llm, bits, method)
    folder = export(run, tmp_path / "out", [kind])[kind]
    report = json.loads((folder / "export_report.json").read_text())
    if llm == "internlm2" and kind == "xtuner_adapters":
        assert "InternLM2" in report["proof"]  # no stock library runs that code; see targets/test_xtuner.py
        return
    expected = {"vision": {"features"}, "projector": {"projected"}}.get(kind, {"logits", "answer"})
    assert expected <= set(report["compared"])
    for what, difference in report["largest_difference"].items():
        assert difference <= BOUND * max(1.0, report["largest_value"][what]), report
    assert report["same_greedy_answers"] in (True, None) and report["same_prompt_ids"] in (True, None)
    if bits == 4 and "logits" in expected:  # adapters of an NF4 run over the original weights: another base
        assert report["logits_difference_from_the_run_as_trained"] > 1e-4


@pytest.mark.parametrize("llm, bits, method", [case for case in CASES if "4" in case.id.split("-")])
def test_dequantised_merge_is_what_was_trained(runs, tmp_path, monkeypatch, llm, bits, method):
    probe_here(monkeypatch)
    folder = export(runs(llm, bits, method), tmp_path / "out", merge_base=DEQUANTIZED)["hf"]
    report = json.loads((folder / "export_report.json").read_text())
    largest = report["largest_value"]["logits"]
    assert report["logits_difference_from_the_run_as_trained"] <= BOUND * max(1.0, largest)
    assert "dequantised NF4 weights" in (folder / "README.md").read_text()


def test_dequantised_weights_are_those_that_training_quantised(parts, tmp_path, monkeypatch):
    """A base in float32 trained in bfloat16: bitsandbytes gets bfloat16 there, and other weights get other codes."""
    probe_here(monkeypatch)
    base = write_llm(tmp_path / "llm")
    run = tmp_path / "run"
    trained_run(run, base, parts.clip, parts.projector, ("q_proj",), bits=4)
    record = json.loads((run / "run.json").read_text())
    record["settings"]["training"]["bf16"] = True
    (run / "run.json").write_text(json.dumps(record))
    name = "layers.1.mlp.up_proj"  # without an adapter
    in_training = load_llm(base, torch.bfloat16, 4).model.get_submodule(name).weight
    codes, state = in_training.data.clone(), in_training.quant_state
    opened = load(run, dtype=torch.float32).model.get_base_model().model.language_model.get_submodule(name).weight
    assert torch.equal(opened.data.cpu(), codes.cpu())
    assert not torch.equal(load_llm(base, torch.float32, 4).model.get_submodule(name).weight.data.cpu(), codes.cpu())
    folder = export(run, tmp_path / "out", merge_base=DEQUANTIZED)["hf"]
    exported = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    weight = exported.model.language_model.get_submodule(name).weight  # rounded to what training multiplied with
    assert torch.equal(weight, dequantize_4bit(codes, state).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("merge_base", [ORIGINAL, DEQUANTIZED])
def test_gpu_a_run_over_nf4_is_exported_and_loaded_on_one_device(runs, tmp_path, monkeypatch, merge_base):
    """bitsandbytes quantises the LLM on the GPU and leaves it there; the proof is computed on the CPU."""
    probe_here(monkeypatch)
    run = runs("llama", 4, "moslora")
    report = json.loads((export(run, tmp_path / "out", merge_base=merge_base)["hf"] / "export_report.json").read_text())
    assert report["largest_difference"]["logits"] <= BOUND * max(1.0, report["largest_value"]["logits"])
    for trained in (True, False):
        assert {p.device.type for p in load(run, trained=trained).model.parameters()} == {"cuda"}


@pytest.mark.parametrize("kind", ["peft", "peft_with_base", "xtuner_adapters", "xtuner"])
def test_an_adapted_head(parts, tmp_path, monkeypatch, kind):
    """An original LLM has a head without the rows that were appended for training."""
    probe_here(monkeypatch)
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector, ("q_proj", "lm_head"))
    folder = export(tmp_path / "run", tmp_path / "out", [kind])[kind]
    report = json.loads((folder / "export_report.json").read_text())
    assert report["largest_difference"]["logits"] <= BOUND and report["same_greedy_answers"]


@pytest.mark.parametrize("kind", ["hf", "peft_with_base"])
def test_in_16_bits(parts, tmp_path, monkeypatch, kind):
    """Merged in float32 and rounded once: beyond that rounding, which is reported, nothing is lost."""
    probe_here(monkeypatch)
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    folder = export(tmp_path / "run", tmp_path / "out", [kind], dtype=torch.bfloat16)[kind]
    report = json.loads((folder / "export_report.json").read_text())
    assert report["proof"] == "passed"
    lost = report["logits_difference_from_the_run_as_trained"]
    assert report["largest_difference"]["logits"] < lost < 0.05 * report["largest_value"]["logits"]


def test_generation_settings_of_the_base_change_no_answer(parts, tmp_path, monkeypatch):
    """A base's folder recommends beams and penalties; the run, its exports, and adapters over that base ignore them."""
    probe_here(monkeypatch)
    base = write_llm(tmp_path / "llm")
    plain = write_llm(tmp_path / "plain")
    settings = {"repetition_penalty": 1.3, "num_beams": 4, "no_repeat_ngram_size": 2, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(settings))
    for folder in (base, plain):
        torch.manual_seed(0)  # the same adapters
        trained_run(tmp_path / f"run of {folder.name}", folder, parts.clip, parts.projector)
    exported = export(tmp_path / "run of llm", tmp_path / "out", ["hf", "xtuner_adapters"])
    questions = [([], [Turn("human", text)]) for text in ("what colour is the shape?", "Name a colour.")]
    said = {
        name: list(answer(load(folder, dtype=torch.float32), questions, max_new_tokens=24))
        for name, folder in (
            ("run", tmp_path / "run of llm"),
            ("export", exported["hf"]),
            ("run of a base without settings", tmp_path / "run of plain"),
        )
    }
    assert len(said["run"][0]) > 10 and len({tuple(answers) for answers in said.values()}) == 1, said
    for folder in exported.values():
        assert json.loads((folder / "export_report.json").read_text())["same_greedy_answers"]
