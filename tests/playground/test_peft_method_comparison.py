"""The entry for PEFT's method_comparison: its files, and the way of PEFT's runner through them, on a tiny LLaMA."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llava_moslora.errors import Refusal

sys.path.insert(0, str(Path(__file__).parents[2] / "playground" / "peft_method_comparison"))

import run_moslora
from run_moslora import CONFIGURATIONS, EXPERIMENTS, put_experiment, write_experiments

# A stand-in for PEFT's run.py: what it does with an experiment, in the order in which it does it.
RUNNER = """
import json, sys
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM
from utils import MODEL
config = PeftConfig.from_pretrained(sys.argv[-1])
model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config, autocast_adapter_dtype=True)
model.save_pretrained("saved")
json.dump({"argv": sys.argv, "trained": model.get_nb_trainable_parameters()[0]}, open("seen.json", "w"))
"""


def test_files_are_those_that_the_script_writes(tmp_path):
    write_experiments(tmp_path)
    written = {p.relative_to(tmp_path): json.loads(p.read_text()) for p in tmp_path.rglob("*.json")}
    here = {p.relative_to(EXPERIMENTS): json.loads(p.read_text()) for p in EXPERIMENTS.rglob("*.json")}
    for content in (*written.values(), *here.values()):
        content.pop("peft_version", None)
    assert written == here and {p.parts[0] for p in here} == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_peft_trains_saves_and_loads_each(parts, tmp_path, name):
    config = PeftConfig.from_pretrained(str(EXPERIMENTS / name))
    assert (config.r, config.lora_alpha, config.to_dict()["peft_type"]) == (32, 64, "MOSLORA")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(parts.llm), config, autocast_adapter_dtype=True)
    ids = torch.arange(1, 9)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {n.split("lora_")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert names == ({"A", "B"} if name.endswith("frozen-mixer") else {"A", "B", "mixer"})
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(parts.llm), str(tmp_path))
    with torch.no_grad():
        found, expected = again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(parts.llm).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-3


def test_the_runner_gets_the_experiment_and_the_flags(parts, tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text(RUNNER)
    (tmp_path / "utils.py").write_text(f"MODEL = {str(parts.llm)!r}\n")
    name = "llama-3.2-3B-rank32-lr_0.0002"
    monkeypatch.setattr(sys, "argv", ["run_moslora.py", str(tmp_path), name, "-v", "--clean"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    monkeypatch.chdir(tmp_path)
    run_moslora.main()
    monkeypatch.delitem(sys.modules, "utils")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["argv"] == ["run.py", "-v", "--clean", f"experiments/moslora/{name}"]
    # 2 layers; q_proj 64 → 64 and v_proj 64 → 32, rank 32: A, W, B
    assert seen["trained"] == 2 * (32 * (64 + 32 + 64) + 32 * (64 + 32 + 32))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    rate = json.loads((tmp_path / "experiments/moslora" / name / "training_params.json").read_text())
    assert rate["optimizer_kwargs"]["lr"] == 2e-4


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(Refusal, match="rank32-orthogonal"):
        put_experiment("rank33", tmp_path)
    with pytest.raises(Refusal, match="git clone"):
        put_experiment("llama-3.2-3B-rank32", tmp_path)
