"""XTuner's folders beyond what the matrix reopens: InternLM2's own names, and the projector as a model."""

import json

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llava_moslora.export.export import export
from llava_moslora.files.tensors import read_tensor_folder
from support.export_runs import internlm2, trained_run
from support.internlm2_reference import logits as internlm2_logits


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj", "up_proj", "lm_head")], ids=["all", "some"])
def test_adapters_under_internlm2s_own_names(parts, tmp_path, targets):
    """Added by hand to the original weights, they give in an independent InternLM2 what the merged Llama gives."""
    llm = internlm2(tmp_path / "llm", bias=False)
    trained_run(tmp_path / "run", llm, parts.clip, parts.projector, targets)
    folders = export(tmp_path / "run", tmp_path / "out", ["xtuner_adapters", "llm"], prove=False)
    adapter = folders["xtuner_adapters"] / "llm_adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = {"wqkv", "w3", "output"} if targets else {"wqkv", "wo", "w1", "w2", "w3"}
    assert set(config["target_modules"]) == expected and config["peft_type"] == "LORA"

    base = {name: stored.read().double() for name, stored in read_tensor_folder(llm).items()}
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in [key for key in factors if "lora_A" in key]:
        a, b = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
        module = name.removeprefix("base_model.model.").split(".lora_A")[0]
        ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
        rank = ranks.get(get_pattern_key(ranks, module), config["r"])
        alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
        assert len(a) == rank
        base[f"{module}.weight"] += (alpha / rank) * b @ a
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(2))
    raw = json.loads((llm / "config.json").read_text())
    found = internlm2_logits(ids, base, raw)
    merged = AutoModelForCausalLM.from_pretrained(folders["llm"]).double()(ids).logits
    assert (found - merged[..., : found.shape[-1]]).abs().max() <= 1e-5 * found.abs().max()


def test_the_projector_as_a_model(parts, tmp_path, monkeypatch):
    """As XTuner loads it, by the file next to the weights; that file knows nothing of this package."""
    from transformers import AutoModel

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    folder = export(tmp_path / "run", tmp_path / "out", ["projector"], prove=False)["projector"]
    assert "llava_moslora" not in (folder / "modeling_projector.py").read_text()
    model = AutoModel.from_pretrained(folder, **{"trust_remote_code": True})
    weights = load_file(folder / "model.safetensors")
    features = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    hidden = torch.nn.functional.gelu(features @ weights["model.0.weight"].T + weights["model.0.bias"])
    expected = hidden @ weights["model.2.weight"].T + weights["model.2.bias"]
    torch.testing.assert_close(model(features), expected)
