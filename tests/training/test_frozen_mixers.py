"""A frozen mixer other than identity belongs to the run as what is trained does: no folder of a base model has it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import scripts.train_vit_llm as script
from llava_moslora.export.export import export
from llava_moslora.files.manifest import verify_manifest, write_manifest
from llava_moslora.inference.load import load_run
from llava_moslora.models.adapt import add_adapters
from llava_moslora.training.optimizer_state import frozen_factors
from support.export_runs import probe_here
from support.training_runs import adapter, losses, train
from support.zero_runs import configuration, run_successfully, settings

STARTS = ["butterfly", "orthogonal", "kaiming_uniform", "normal"]
FILES = ["adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json"]


def is_exported(run, folder, monkeypatch) -> None:
    """With its proof: the export computes what the run does."""
    probe_here(monkeypatch)
    assert (export(run, folder)["hf"] / "config.json").is_file()


@pytest.mark.parametrize("start", ["butterfly", "normal"])
def test_a_frozen_mixer_is_saved_resumed_loaded_and_exported(parts, tmp_path, monkeypatch, start):
    same = {"mixer_init": start, "train_mixer": False, "save_steps": 2, "resume": True}
    run, again = tmp_path / "run", tmp_path / "again"
    train(parts, run, max_steps=4, **same)
    saved = adapter(run, 4)
    mixers = [name for name in saved if "lora_mixer" in name]
    assert len(mixers) == sum("lora_A" in name for name in saved) > 0
    assert all(torch.equal(saved[name], adapter(run, 2)[name]) for name in mixers)
    if start == "butterfly":
        assert all(torch.equal(saved[n], torch.eye(len(saved[n]) // 2).repeat(2, 2)) for n in mixers)

    def drawn_otherwise(*args):
        model = add_adapters(*args)
        for mixer in frozen_factors(model).values():
            mixer.data.zero_()
        return model

    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-4")
    with monkeypatch.context() as patch:
        patch.setattr(script, "add_adapters", drawn_otherwise)
        train(parts, again, max_steps=4, **same)
    assert losses(again)[-2:] == losses(run)[-2:]
    assert (again / "checkpoint-4" / FILES[0]).read_bytes() == (run / "checkpoint-4" / FILES[0]).read_bytes()

    loaded = load_run(run).model.state_dict()
    for name in mixers:
        assert torch.equal(loaded[name.replace("lora_mixer.", "lora_mixer.default.")], saved[name])
    is_exported(run, tmp_path / "merged", monkeypatch)


def test_a_run_of_the_first_versions_gets_its_mixers_back(parts, tmp_path, capsys):
    """They wrote no frozen mixer, and drew it from the seed again when they resumed."""
    same = {"mixer_init": "normal", "train_mixer": False, "save_steps": 2, "resume": True, "max_steps": 4}
    run, old = tmp_path / "run", tmp_path / "old"
    train(parts, run, **same)
    shutil.copytree(run, old)
    shutil.rmtree(old / "checkpoint-4")
    checkpoint = old / "checkpoint-2"
    facts = {k: v for k, v in verify_manifest(checkpoint).items() if k not in ("schema", "files", "sha256")}
    for file, dropped in (FILES[0], "lora_mixer"), (FILES[1], ".step"):
        tensors = {n: t for n, t in load_file(checkpoint / file).items() if dropped not in n}
        save_file(tensors, checkpoint / file, metadata={"format": "pt"})
    (checkpoint / FILES[2]).write_text('{"adam_steps": 2, "scheduler_steps": 2, "loss_scale": null}')
    write_manifest(checkpoint, facts)
    train(parts, old, **same)
    assert "of a version that saved no frozen mixers" in capsys.readouterr().out
    for file in FILES:
        assert (old / "checkpoint-4" / file).read_bytes() == (run / "checkpoint-4" / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_frozen_mixers_under_deepspeed(warm_server, parts, tmp_path, monkeypatch, name, start):
    """bf16 on two ranks, killed and resumed: the same bytes, and an export with its proof."""
    same = {"deepspeed": configuration(name, tmp_path), "bf16": True, "max_steps": 6, "save_steps": 3, "resume": True}
    same |= {"mixer_init": start, "train_mixer": False, "vision_lora_r": 2, "data_cache": tmp_path / "cache"}
    whole, again = tmp_path / "run", tmp_path / "again"
    run_successfully(warm_server, settings(parts, whole, **same), tmp_path / "launch", world=2)
    killed = warm_server.launch(settings(parts, again, **same), tmp_path / "first", world=2, at_step=4)
    assert killed.status == [-9, -9]
    run_successfully(warm_server, settings(parts, again, **same), tmp_path / "second", world=2)
    for file in FILES:
        assert (whole / "checkpoint-6" / file).read_bytes() == (again / "checkpoint-6" / file).read_bytes(), file
    saved = adapter(again, 6)
    mixers = [name for name in saved if "lora_mixer" in name]
    assert len(mixers) == sum("lora_A" in name for name in saved) and all(saved[name].any() for name in mixers)
    is_exported(again, tmp_path / "merged", monkeypatch)
