"""Run folders as training leaves them, with random adapters instead of trained ones, in seconds."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava_moslora.config import DataSettings, TowerAdapter
from llava_moslora.export import probe, verify
from llava_moslora.files.manifest import write_manifest
from llava_moslora.models.adapt import add_adapters
from llava_moslora.models.assemble import assemble
from llava_moslora.runs.checkpoints import publish_checkpoint
from llava_moslora.runs.fingerprint import base_fingerprints
from llava_moslora.runs.record import TOKENIZER, RunSettings, write_run
from llava_moslora.text.tokenizer import load_tokenizer
from support.internlm2_reference import write_internlm2
from support.settings import adapters, parts_of
from support.tiny import tiny_tokenizer, write_llm


def internlm2(folder: Path, **changes) -> Path:
    """An InternLM2 of three torch files, with the tiny tokenizer."""
    write_internlm2(folder, **({"shards": 3, "kind": ".bin", "vocab_size": 320, "bias": True} | changes))
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LLMS = {"llama": write_llm, "internlm2": internlm2}
METHODS = {"moslora": {}, "lora": {"mixer_init": "identity", "train_mixer": False}}


def probe_here(monkeypatch) -> None:
    """Run ``probe.py`` in this process: a fresh one costs seconds of imports each time (test_verify has one)."""
    monkeypatch.setattr(verify, "_run_probe", probe.answer_questions)


def trained_run(
    run: Path, llm: Path, vision, projector, targets: tuple[str, ...] = (), *, bits: int = 16, method: str = "moslora"
) -> torch.nn.Module:
    """A run folder whose checkpoint holds random adapters of both towers and a changed projector; and that model."""
    tokenizer = load_tokenizer(llm)
    parts = parts_of(llm, vision, projector, version="chatml", bits=bits)
    model, preprocessor = assemble(parts, tokenizer=tokenizer, dtype=torch.float32)
    towers = adapters(
        TowerAdapter(4, 8, target_modules=targets, **METHODS[method]), TowerAdapter(2, 4, **METHODS[method])
    )
    model = add_adapters(model, towers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (parameter.requires_grad and "multi_modal_projector" in name):
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)  # of 4 bits: a GPU
                parameter.add_(drawn * 0.1)
    run.mkdir(parents=True)
    settings = RunSettings(
        parts, DataSettings(["data.json"]), towers, training={"bf16": False, "fp16": False}, preprocessor=preprocessor
    )
    write_run(run, settings)
    tokenizer.save_pretrained(run / TOKENIZER)

    def save(folder: Path) -> None:  # as the trainer does, what was trained and nothing else
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        log = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))

    facts = {"step": 1, "data": {"data.json": "0"}} | base_fingerprints(parts)
    publish_checkpoint(run / "checkpoint-1", save, lambda: facts)
    return model.eval()


def newer(run: Path, step: int) -> None:
    """Another checkpoint with another adapter, as a running training writes it, and the older ones pruned."""
    old = run / f"checkpoint-{step - 1}"
    new = shutil.copytree(old, run / f"checkpoint-{step}")
    file = new / "adapter" / "adapter_model.safetensors"
    save_file({name: t * 1.5 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    facts = json.loads((old / "MANIFEST.json").read_text())
    write_manifest(new, {name: facts[name] for name in ("llm", "vision_tower", "projector", "data")} | {"step": step})
    shutil.rmtree(old)
