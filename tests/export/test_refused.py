"""What an export refuses, and that nothing half-written is ever left in its place."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_moslora.errors import Refusal
from llava_moslora.export import export as export_module
from llava_moslora.export import mapped_weights, verify, writer
from llava_moslora.export.export import export
from llava_moslora.files.manifest import write_manifest
from support.export_runs import internlm2, probe_here, trained_run
from support.tiny import write_clip, write_llm


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused") / "run"
    trained_run(folder, parts.llm, parts.clip, parts.projector)
    return folder


def refused(run, output, match: str, formats=("hf",), **settings) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(Refusal, match=match):
        export(run, output, formats, **settings)
    assert sorted(output.parent.iterdir()) == before  # neither the folder nor staging


# K7: an adapter of another base
def test_another_base(run, parts, tmp_path):
    """Of the same shape: names and sizes fit, and only the content tells."""
    other = write_llm(tmp_path / "llm")
    weights = load_file(other / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    match = r"K-BASE\] .*llm/model\.safetensors:--model_name_or_path: not the base that this run was trained on"
    refused(run, tmp_path / "out", match, llm=other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    refused(run, tmp_path / "out", r"K-BASE\] .*llm/config\.json", llm=other)
    tower = write_clip(tmp_path / "clip", hidden_size=48)
    refused(run, tmp_path / "out", r"K-BASE\] .*clip/config\.json:--vision_tower", vision_tower=str(tower))


def test_a_moved_base_is_taken(run, parts, tmp_path):
    moved = shutil.copytree(parts.llm, tmp_path / "moved")
    assert (export(run, tmp_path / "out", llm=moved, prove=False)["hf"] / "model.safetensors").is_file()


def test_a_4_bit_folder_as_the_base(run, parts, tmp_path):
    folder = shutil.copytree(parts.llm, tmp_path / "llm-4bit")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    refused(run, tmp_path / "out", r"config\.json:quantization_config: the base is already quantised", llm=folder)


def test_a_base_that_is_gone_or_damaged(parts, tmp_path):
    llm = internlm2(tmp_path / "llm")
    trained_run(tmp_path / "run", llm, parts.clip, parts.projector)
    shard = llm / "pytorch_model-00003-of-00003.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    refused(tmp_path / "run", tmp_path / "out", r"K-BASE\] .*pytorch_model-00003-of-00003\.bin")
    shard.unlink()
    refused(tmp_path / "run", tmp_path / "out", r"K-BASE\] .*pytorch_model-00003-of-00003\.bin.*found no such file")
    shutil.rmtree(llm)
    refused(tmp_path / "run", tmp_path / "out", r"llm.*no such folder")


def test_missing_projector(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    adapter = copy / "checkpoint-1" / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: t for name, t in tensors.items() if "multi_modal_projector" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    facts = json.loads((copy / "checkpoint-1" / "MANIFEST.json").read_text())
    write_manifest(copy / "checkpoint-1", {name: facts[name] for name in ("step", "llm", "vision_tower", "data")})
    refused(copy, tmp_path / "out", r"K-ADAPTER\] .*1 missing tensors; expected .*multi_modal_projector")


def test_a_checkpoint_that_does_not_name_its_base(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    write_manifest(copy / "checkpoint-1", {"step": 1})
    refused(copy, tmp_path / "out", r"K-MANIFEST\] .*MANIFEST\.json:llm: the checkpoint does not record its base")


def test_existing_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    refused(run, tmp_path / "out", r"C-OUTPUT\] .*out:--output_dir: already exists; fix: .*--overwrite")
    with pytest.raises(Refusal, match=r"C-OUTPUT\] .*not an export: nothing is deleted here; expected export.json"):
        export(run, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").is_file()


# C14: a disk that is too small
def test_too_little_disk_or_memory(run, tmp_path, monkeypatch):
    usage, memory = namedtuple("usage", "free"), namedtuple("memory", "available")
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: usage(10**6))
    refused(run, tmp_path / "out", r"E-DISK\] .*too little space; found 0\.00 GB; expected 0\.07 GB")
    monkeypatch.undo()
    monkeypatch.setattr(mapped_weights.psutil, "virtual_memory", lambda: memory(10**5))
    refused(run, tmp_path / "out", r"E-MEMORY\] too little memory to verify.*fix: --no_proof")


def test_a_disk_that_fills_up_and_the_export_that_goes_on(run, tmp_path, monkeypatch, capsys):
    """Shards of 100 kB; the disk is full in the fourth. What is finished is not written again."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    written, merged_blocks = [], writer.merged_blocks

    def full_after(limit):
        def stops(planned, dtype):
            if len(written) >= limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(planned.name)
            yield from merged_blocks(planned, dtype)

        return stops

    monkeypatch.setattr(writer, "merged_blocks", full_after(25))
    with pytest.raises(
        Refusal, match=r"E-DISK\] .*model-0000\d-of-.*the disk is full; .*continues where this one stopped"
    ):
        export(run, tmp_path / "out", prove=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial"))
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.staging").glob("*.safetensors")}
    assert finished
    again = len(written)
    monkeypatch.setattr(writer, "merged_blocks", full_after(10**9))
    folder = export(run, tmp_path / "out", prove=False)["hf"]
    assert f"continuing an unfinished export: {len(finished)} of" in capsys.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert len(written) < again + 25 + 60
    monkeypatch.setattr(writer, "SHARD_BYTES", 2 * 1024**3)
    whole = load_file(export(run, tmp_path / "whole", prove=False)["hf"] / "model.safetensors")
    pieces = {name: t for file in folder.glob("model-*.safetensors") for name, t in load_file(file).items()}
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)


def test_an_unfinished_export_of_something_else_is_not_taken_up(run, tmp_path):
    staging = tmp_path / ".out.staging"
    staging.mkdir()
    (staging / ".plan.json").write_text(json.dumps({"format": "hf", "files": {}}))
    (staging / "model.safetensors").write_bytes(b"of another run")
    folder = export(run, tmp_path / "out", prove=False)["hf"]
    assert len(load_file(folder / "model.safetensors")) > 50


def resealed(run, place, change) -> Path:
    """A copy of ``run`` whose adapter tensors ``change`` has edited in place, with a manifest that fits them."""
    copy = shutil.copytree(run, place)
    file = copy / "checkpoint-1" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    facts = json.loads((copy / "checkpoint-1" / "MANIFEST.json").read_text())
    write_manifest(copy / "checkpoint-1", {name: facts[name] for name in ("step", "llm", "vision_tower", "data")})
    return copy


FIRST_B = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("formats", [["hf"], ["peft"]])
def test_an_adapter_that_is_not_finite_is_not_written(run, tmp_path, formats):
    def change(tensors):
        tensors[FIRST_B][3, 1] = float("nan")

    copy = resealed(run, tmp_path / "run", change)
    match = r"K-NONFINITE\] .*layers\.0\.self_attn\.q_proj.*: a tensor is not finite; found .*NaN.*adapter.*earlier"
    with pytest.raises(Refusal, match=match):
        export(copy, tmp_path / "out", formats, prove=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.safetensors.partial"))


def test_a_base_that_is_not_finite_is_not_written(parts, tmp_path):
    llm = write_llm(tmp_path / "llm")
    weights = load_file(llm / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 5] = float("-inf")
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    trained_run(tmp_path / "run", llm, parts.clip, parts.projector)
    match = r"K-NONFINITE\] .*layers\.1\.mlp\.up_proj\.weight: .*found .*-Inf.*base.*download"
    with pytest.raises(Refusal, match=match):
        export(tmp_path / "run", tmp_path / "out", prove=False)
    assert not (tmp_path / "out").exists()


def test_what_overflows_the_dtype_is_not_written(parts, tmp_path):
    llm = write_llm(tmp_path / "llm")
    weights = load_file(llm / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 5] = 1e5
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    trained_run(tmp_path / "run", llm, parts.clip, parts.projector)
    match = r"K-NONFINITE\] .*up_proj\.weight: .*found 1e\+05.*float16.*fix: --dtype bfloat16"
    with pytest.raises(Refusal, match=match):
        export(tmp_path / "run", tmp_path / "out", dtype=torch.float16, prove=False)
    file = export(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16, prove=False)["hf"] / "model.safetensors"
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_proof_without_finite_numbers_is_none(run, tmp_path, monkeypatch, value):
    """NaN differs from nothing that is compared with < or max, and 1e30 becomes a row of zeros in a norm."""

    def change(tensors):
        for name, tensor in tensors.items():
            if "lora_B" in name and "language_model" in name:
                tensor.fill_(value)

    copy = resealed(run, tmp_path / "run", change)
    probe_here(monkeypatch)
    monkeypatch.setattr(writer, "check_finite", lambda *_: None, raising=False)
    match = r"K-PROOF\] .*logits: the values to compare are not finite, or all zero; found .* from the run as trained"
    with pytest.raises(Refusal, match=match):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("program", "match"), [
    ("raise OSError(28, 'No space left on device')", r"E-DISK\] .*the disk is full"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"E-MEMORY\] .*was killed.*fix: --no_proof"),
    ("raise KeyError('x')", r"K-PROOF\] .*stock libraries cannot load the export; found KeyError: 'x'"),
])  # fmt: skip
def test_ends_of_the_proofs_process(tmp_path, program, match):
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "probe.py").write_text(program)
    with pytest.raises(Refusal, match=match):
        verify._run_probe(tmp_path)


FLAGS = {
    "unknown format": (["gguf"], {}, r"--format: unknown format; found gguf; expected hf, peft"),
    "with_base": (["hf"], {"with_base": True}, r"--with_base: belongs to --format peft"),
    "dequantized of 16 bits": (["hf"], {"merge_base": "dequantized"}, r"--merge_base: the LLM of this run was not"),
    "dequantized adapters": (["peft"], {"merge_base": "dequantized"}, r"--merge_base: adapters are not merged"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(run, tmp_path, case):
    formats, settings, match = FLAGS[case]
    refused(run, tmp_path / "out", match, formats, **settings)


def test_an_export_that_answers_otherwise_is_not_published(run, tmp_path, monkeypatch):
    """The proof can fail: one row of the written head is changed behind its back."""
    probe_here(monkeypatch)
    write = writer.write_weights

    def spoiled(root, weights):
        write(root, weights)
        tensors = load_file(root / "model.safetensors")
        tensors["language_model.lm_head.weight"][7] += 0.5
        save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "write_weights", spoiled)
    with pytest.raises(Refusal, match=r"K-PROOF\] .*logits.*: the export's outputs differ from the run's"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
