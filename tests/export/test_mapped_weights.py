"""The proof where memory is short: 16-bit weights stay in their files, and the sums are those of a model in float32."""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llava_moslora.errors import Refusal
from llava_moslora.export import mapped_weights, probe, verify
from llava_moslora.export.export import TARGETS, export
from llava_moslora.export.formats import DEQUANTIZED, ORIGINAL
from support.export_runs import internlm2, probe_here, trained_run
from support.tiny import write_llm


def in_bfloat16(llm):
    """The LLM's folder with its weights rounded, as published ones are."""
    for file in llm.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for file in llm.glob("*.bin"):
        torch.save({name: tensor.bfloat16() for name, tensor in torch.load(file, weights_only=True).items()}, file)
    config = json.loads((llm / "config.json").read_text())
    config.pop("dtype", None)
    (llm / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    return llm


@pytest.fixture(scope="module", params=[16, pytest.param(4, marks=pytest.mark.slow)])
def run(parts, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("run")
    llm = in_bfloat16(write_llm(folder / "llm"))
    trained_run(folder / "run", llm, parts.clip, parts.projector, bits=request.param)
    return SimpleNamespace(folder=folder / "run", llm=llm, bits=request.param)


def short_of_memory(monkeypatch, megabytes: float) -> None:
    monkeypatch.setattr(mapped_weights, "OVERHEAD", 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(megabytes * 1e6)))


def reports(run, folder, kind: str, **how) -> dict:
    out = export(run.folder, folder, [kind], **how)[kind]
    return json.loads((out / "export_report.json").read_text())


@pytest.mark.parametrize("kind", TARGETS)
def test_it_proves_what_the_whole_model_in_memory_does(run, tmp_path, monkeypatch, kind):
    """Over NF4 also into the dequantised weights; the figures of both ways are the same up to the order of sums."""
    probe_here(monkeypatch)
    bases = [ORIGINAL] if run.bits == 16 or "llm" not in TARGETS[kind].merged else [ORIGINAL, DEQUANTIZED]
    for base in bases:
        held = reports(run, tmp_path / f"held-{base}", kind, merge_base=base)
        with monkeypatch.context() as patch:
            patch.setattr(mapped_weights, "needed", lambda *_: True)
            mapped = reports(run, tmp_path / f"mapped-{base}", kind, merge_base=base)
        assert held["llm_weights"] == "held in float32" and mapped["llm_weights"].startswith("memory-mapped")
        assert mapped["proof"] == "passed" and mapped["compared"] == held["compared"]
        assert mapped.get("answers") == held.get("answers")
        for what, largest in held["largest_value"].items():
            assert mapped["largest_value"][what] == pytest.approx(largest, rel=1e-5)
        if (difference := held["logits_difference_from_the_run_as_trained"]) is not None:
            assert mapped["logits_difference_from_the_run_as_trained"] == pytest.approx(difference, rel=0.05)


def test_a_wrong_export_is_still_found(run, tmp_path, monkeypatch):
    """One weight of the written LLM changed by a tenth."""
    probe_here(monkeypatch)
    answer_questions = probe.answer_questions

    def spoilt(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["language_model.model.layers.0.mlp.up_proj.weight"] *= 1.1
        save_file(tensors, file, metadata={"format": "pt"})
        return answer_questions(folder)

    monkeypatch.setattr(verify, "_run_probe", spoilt)
    monkeypatch.setattr(mapped_weights, "needed", lambda *_: True)
    with pytest.raises(Refusal, match=r"K-PROOF.*logits"):
        export(run.folder, tmp_path / "out")


def test_it_is_chosen_where_float32_does_not_fit(run, tmp_path, monkeypatch):
    """The tiny model takes 0.7 MB in float32."""
    probe_here(monkeypatch)
    short_of_memory(monkeypatch, 100)
    assert reports(run, tmp_path / "roomy", "llm")["llm_weights"] == "held in float32"
    if run.bits == 16:
        short_of_memory(monkeypatch, 0.5)
        assert reports(run, tmp_path / "short", "llm")["llm_weights"].startswith("mapped")
    short_of_memory(monkeypatch, 0.1)
    with pytest.raises(Refusal, match=r"E-MEMORY\] too little memory.*expected 0.0 GB, or 0.0 GB; fix: --no_proof"):
        export(run.folder, tmp_path / "none")
    with pytest.raises(Refusal, match=r"E-MEMORY\] too little memory.*expected 0.0 GB; fix: --no_proof"):
        export(run.folder, tmp_path / "none", dtype=torch.float32)  # there is nothing to map of that dtype
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_over_an_internlm2(parts, tmp_path, monkeypatch, kind):
    probe_here(monkeypatch)
    monkeypatch.setattr(mapped_weights, "needed", lambda *_: True)
    llm = in_bfloat16(internlm2(tmp_path / "llm", intermediate_size=128, max_position_embeddings=512))
    trained_run(tmp_path / "run", llm, parts.clip, parts.projector)
    report = reports(SimpleNamespace(folder=tmp_path / "run"), tmp_path / "out", kind)
    assert report["proof"] == "passed" or kind == "xtuner_adapters"


def test_mapped_weights_compute_what_float32_ones_do(run):
    """Against stock transformers in float32, block by block and loaded at once."""
    ids = torch.arange(5)[None]
    held = AutoModelForCausalLM.from_pretrained(run.llm, dtype=torch.float32)(ids).logits
    for block in (64, probe.BLOCK):
        model = AutoModelForCausalLM.from_pretrained(run.llm, dtype="auto")
        assert model.dtype == torch.bfloat16
        probe.compute_in_float32(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "BLOCK", block)
            torch.testing.assert_close(model(ids).logits, held, atol=1e-6, rtol=1e-6)
        assert model.lm_head.weight.dtype == torch.bfloat16  # still as it is stored
