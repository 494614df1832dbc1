"""From a run to the file that stock diffusers loads in a fresh process, with its proof and card."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from llava_moslora.diffusion.export import export_lora
from llava_moslora.diffusion.lora_file import KOHYA_FILE, LORA_FILE
from llava_moslora.errors import Refusal
from llava_moslora.export.export import export
from llava_moslora.export.sharing import files_to_push
from support.launching import ROOT
from support.sdxl import PROMPT, needs_diffusers, train

pytestmark = needs_diffusers


@pytest.fixture(scope="module")
def run(parts, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(parts, folder, data_cache=cache, max_steps=2, save_steps=1, lora_alpha=8)
    return folder


def test_an_export_without_proof(parts, run, tmp_path):
    folder = export_lora(run, tmp_path / "lora", prove=False, checkpoint="1")
    assert {p.name for p in folder.iterdir()} == {
        LORA_FILE, "README.md", "MANIFEST.json", "export.json", "export_report.json",
    }  # fmt: skip
    facts = json.loads((folder / "export.json").read_text())
    assert (facts["format"], facts["checkpoint"], facts["prompt"]) == ("diffusers", "checkpoint-1", PROMPT)
    card = (folder / "README.md").read_text()
    assert f"instance_prompt: {PROMPT}" in card and "library_name: diffusers" in card and "step 1 of 2" in card
    assert LORA_FILE in files_to_push(folder)
    with pytest.raises(Refusal, match=r"C-OUTPUT.*already exists"):
        export_lora(run, folder, prove=False)
    export_lora(run, folder, prove=False, overwrite=True, kohya=True)
    assert (folder / KOHYA_FILE).is_file()
    with pytest.raises(Refusal, match=r"K-RUN.*another kind of run.*train_sdxl.*--format diffusers"):
        export(run, tmp_path / "hf")
    with pytest.raises(Refusal, match=r"K-BASE"):
        other = tmp_path / "other"
        (other).mkdir()
        for path in parts.sdxl.iterdir():
            (other / path.name).symlink_to(path)
        (other / "unet").unlink(), (other / "unet").mkdir()
        for path in (parts.sdxl / "unet").iterdir():
            (other / "unet" / path.name).write_bytes(path.read_bytes())
        weights = other / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
        export_lora(run, tmp_path / "elsewhere", prove=False, base=other)


@pytest.mark.slow
def test_the_proof_and_the_command(parts, run, tmp_path):
    """In a fresh process that never imports this package."""
    output = ["--output_dir", str(tmp_path / "lora")]
    command = [sys.executable, "scripts/export.py", str(run), "--format", "diffusers", "--kohya", *output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "lora" / "export_report.json").read_text())
    assert report["proof"] == "passed" and report["largest_difference"].keys() == {LORA_FILE, KOHYA_FILE}
    for found in report["largest_difference"].values():
        assert found["step"] < 1e-5 and found["picture"] < 1e-5
    assert report["difference_of_the_base"]["picture"] > 1e-3


@pytest.mark.slow
def test_a_wrong_export_is_refused(run, tmp_path, monkeypatch):
    from llava_moslora.diffusion import lora_file

    right = lora_file.lora_tensors
    monkeypatch.setattr(lora_file, "lora_tensors", lambda layers: {n: 1.1 * t for n, t in right(layers).items()})
    with pytest.raises(Refusal, match=r"K-PROOF.*images differ from the run's"):
        export_lora(run, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_flags_of_the_command():
    from scripts.export import parse

    for flags, message in (
        (["--format", "hf", "diffusers"], "--format"), (["--format", "diffusers", "--dtype", "float16"], "--dtype"),
        (["--kohya"], "--kohya"), (["--format", "diffusers", "--with_base"], "--with_base"),
    ):  # fmt: skip
        with pytest.raises(Refusal, match=message):
            parse(["run", "--output_dir", "out", *flags])
    assert parse(["run", "--output_dir", "out", "--format", "diffusers"]).format == ["diffusers"]
