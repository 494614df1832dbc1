"""A run answers over the base that it was trained on, or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llava_moslora.errors import Refusal
from llava_moslora.inference import load as load_module
from llava_moslora.inference.generate import answer
from llava_moslora.inference.load import load, load_run
from llava_moslora.text.conversation import Turn
from support.export_runs import newer, trained_run
from support.tiny import write_clip, write_gemma2, write_llm


@pytest.fixture
def own(parts, tmp_path):
    """A run, and bases of its own that can be changed."""
    llm, clip = write_llm(tmp_path / "llm"), write_clip(tmp_path / "clip")
    trained_run(tmp_path / "run", llm, clip, parts.projector)
    return SimpleNamespace(run=tmp_path / "run", llm=llm, clip=clip)


def scaled(file) -> None:
    save_file({name: t * 1.5 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["llm", "clip"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_changed_base_is_refused(own, part, trained):
    """Another revision of the same shape, at the path that run.json names."""
    load_run(own.run, trained=trained)
    scaled(vars(own)[part] / "model.safetensors")
    match = rf"K-BASE\] .*{part}/model\.safetensors: not the base that this run was trained on.*fix: put the run's own"
    with pytest.raises(Refusal, match=match):
        load_run(own.run, trained=trained)


def test_an_untrained_run_begins_from_the_same_projector(own, parts, tmp_path):
    projector = shutil.copy(parts.projector, tmp_path / "projector.safetensors")
    trained_run(tmp_path / "other", own.llm, own.clip, projector)
    scaled(projector)
    load_run(tmp_path / "other")  # every checkpoint has the complete projector
    with pytest.raises(Refusal, match=r"K-BASE\] .*/projector\.safetensors: not the base that"):
        load_run(tmp_path / "other", trained=False)


def test_what_is_near_a_model_is_named(own, tmp_path):
    """A checkpoint: its run; an export in several formats: the folder of one."""
    step = next(own.run.glob("checkpoint-*")).name.removeprefix("checkpoint-")
    said = f"neither a run nor a model; .*fix: give {own.run}, whose .*--checkpoint {step}$"
    with pytest.raises(Refusal, match=said):
        load(own.run / f"checkpoint-{step}")
    shutil.copytree(own.llm, tmp_path / "all" / "llm")
    with pytest.raises(Refusal, match=f"fix: give {tmp_path}/all/llm$"):
        load(tmp_path / "all")
    with pytest.raises(Refusal, match=r"fix: give the --output_dir of a training"):
        load(own.run / "tokenizer")


def test_a_path_that_means_another_folder_here_is_refused(own, tmp_path, monkeypatch):
    record = json.loads((own.run / "run.json").read_text())
    record["settings"]["model"]["model_name_or_path"] = "llm"
    del record["folder"]  # of an earlier version, which did not say where the path is from
    (own.run / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    load(own.run)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(own.llm, elsewhere / "llm")
    scaled(elsewhere / "llm" / "model.safetensors")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(Refusal, match=r"K-BASE\] .*elsewhere/llm/model\.safetensors"):
        load(own.run)
    shutil.rmtree(elsewhere / "llm")
    with pytest.raises(Refusal, match=r"llm.*no such folder"):
        load(own.run)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("moment", ["_check_bases", "assemble", "_with_checkpoint"])
def test_a_checkpoint_that_a_training_prunes_meanwhile(own, monkeypatch, trained, moment):
    """The newer one is loaded; a caller's own is not replaced by another."""
    if moment == "_with_checkpoint" and not trained:
        pytest.skip("reads no checkpoint then")
    real, given = getattr(load_module, moment), own.run / "checkpoint-1"
    kept = shutil.copytree(given, own.run.parent / "kept")

    def pruned_first(*arguments, **named):
        if given.exists():
            newer(own.run, 2)
            if moment == "assemble":  # which reads no checkpoint: the next to read one fails
                raise FileNotFoundError(given)
        return real(*arguments, **named)

    monkeypatch.setattr(load_module, moment, pruned_first)
    found = load_run(own.run, trained=trained)
    monkeypatch.undo()
    for name, tensor in load_run(own.run, trained=trained).model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor) or "original_module" in name  # unused and random
    shutil.rmtree(own.run / "checkpoint-2")
    kept.rename(given)
    monkeypatch.setattr(load_module, moment, pruned_first)
    with pytest.raises(Refusal, match=r"P-PRUNED\] .*checkpoint-1: the run is still training and deleted"):
        load_run(own.run, trained=trained, checkpoint=given)


def test_a_damaged_checkpoint_is_not_tried_again(own, monkeypatch):
    def fails(*_):
        calls.append(1)
        raise FileNotFoundError("something else")

    calls: list[int] = []
    monkeypatch.setattr(load_module, "_with_checkpoint", fails)
    with pytest.raises(FileNotFoundError, match="something else"):
        load_run(own.run)
    assert calls == [1]


def test_an_export_of_an_llm_that_is_no_longer_trained_answers(tmp_path):
    """The refusal of an LLM that caps its logits is of a training; greedy answers are the model's own."""
    folder = write_gemma2(tmp_path)
    (folder / "export.json").write_text(json.dumps({"format": "llm", "run": "run", "template": "vicuna"}))
    chat_model = load(folder, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found, own = (model(input_ids=ids).logits.cpu() for model in (chat_model.model.cpu(), stock))
    assert torch.equal(found.argmax(-1), own.argmax(-1))
    assert len(list(answer(chat_model, [([], [Turn("human", "what is it?")])], max_new_tokens=4))) == 1
