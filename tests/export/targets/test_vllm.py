"""``--format vllm`` next to the rules of vLLM 0.33, which are written out here; and in vLLM itself where there is one.

Its files: vllm/lora/peft_helper.py (``PEFTHelper``), vllm/lora/utils.py (``parse_fine_tuned_lora_name``) and
vllm/model_executor/models/llava.py (``hf_to_vllm_mapper``).
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llava_moslora.errors import Refusal
from llava_moslora.export.export import export
from llava_moslora.export.targets import vllm
from support.export_runs import trained_run
from support.tiny import write_clip, write_llm, write_projector

RENAMED = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
LAYER = r"language_model\.model\.layers\.[01]\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@pytest.fixture(scope="module")
def exported(parts, tmp_path_factory):
    """Format → folder of one run, whose adapters are in both towers."""
    folder = tmp_path_factory.mktemp("vllm")
    trained_run(folder / "run", parts.llm, parts.clip, parts.projector)
    return export(folder / "run", folder / "out", ["vllm", "peft_with_base", "hf"], prove=False)


def refused_by_vllm(adapter: Path) -> str | None:
    """What ``PEFTHelper.validate_legal`` finds wrong, and versions that read no patterns would compute wrongly."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if set(config["modules_to_save"] or ()) - {"classifier", "score"}:
        return "modules_to_save"
    if config["rank_pattern"] or config["alpha_pattern"]:
        return "patterns"
    unsupported = config["use_dora"] or config["bias"] != "none" or config["init_lora_weights"] is not True
    return "a variant" if unsupported else None


def module_in_vllm(tensor: str) -> str:
    name, factor, weight = tensor.removeprefix("base_model.model.").rsplit(".", 2)
    assert tensor.startswith("base_model.model.") and factor in ("lora_A", "lora_B") and weight == "weight", tensor
    old = next((old for old in RENAMED if f"{name}.".startswith(old)), "")
    return (RENAMED.get(old, "") + f"{name}."[len(old) :]).removesuffix(".")


def test_every_tensor_has_a_module_in_vllm_and_nothing_is_refused(exported):
    adapter = exported["vllm"] / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = {module_in_vllm(name) for name in tensors}
    assert len(modules) == 14 and len(tensors) == 28
    assert all(re.fullmatch(LAYER, module) for module in modules)
    assert refused_by_vllm(adapter) is None
    assert refused_by_vllm(exported["peft_with_base"] / "adapter") == "modules_to_save"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_the_base_has_the_tower_and_the_projector_and_not_the_llm(exported, parts):
    base, merged = (load_file(f / "model.safetensors") for f in (exported["vllm"] / "base", exported["hf"]))
    llm = load_file(parts.llm / "model.safetensors")
    assert base.keys() == merged.keys()
    for name, tensor in base.items():
        if name.startswith("language_model."):
            original = llm[name.removeprefix("language_model.")]
            assert torch.equal(tensor[: len(original)], original), name
        else:
            assert torch.equal(tensor, merged[name]), name


@pytest.fixture
def without_warnings(recwarn):
    yield
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]


def test_stock_peft_puts_it_into_the_llm_alone(exported, without_warnings):
    base = AutoModelForImageTextToText.from_pretrained(exported["vllm"] / "base")
    model = PeftModel.from_pretrained(base, exported["vllm"] / "adapter")
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 14 and not [name for name in adapted if "vision_tower" in name]
    merged = AutoModelForImageTextToText.from_pretrained(exported["hf"])
    ids = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=2e-6)


def test_an_adapted_head_is_vllms_head(parts, tmp_path):
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector, ("q_proj", "lm_head"))
    folder = export(tmp_path / "run", tmp_path / "out", ["vllm"], prove=False)["vllm"]
    modules = {module_in_vllm(name) for name in load_file(folder / "adapter/adapter_model.safetensors")}
    layers = {f"language_model.model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    assert modules == layers | {"language_model.lm_head"}


def test_the_card_names_the_rank_that_vllm_must_allow(exported):
    assert "max_lora_rank=8)" in (exported["vllm"] / "README.md").read_text()
    assert [vllm.max_lora_rank(r) for r in (1, 2, 64, 65, 512)] == [1, 8, 64, 128, 512]


def test_a_rank_that_vllm_does_not_take_is_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "MAX_LORA_RANKS", (1, 2))
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    with pytest.raises(Refusal, match=r"C-FORMAT.*vLLM does not support this rank.*found 4.*at most 2") as refused:
        export(tmp_path / "run", tmp_path / "out", ["vllm"], prove=False)
    assert "--format hf" in str(refused.value) and not (tmp_path / "out").exists()


def test_a_run_without_adapters_in_the_llm_is_refused(parts, tmp_path, monkeypatch):
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    monkeypatch.setattr("llava_moslora.export.trained_run.TrainedRun.updates", lambda self, *parts: {})
    with pytest.raises(Refusal, match=r"C-FORMAT.*the LLM has no adapters"):
        export(tmp_path / "run", tmp_path / "out", ["vllm"], prove=False)


@pytest.mark.slow
@pytest.mark.skipif("LLAVA_MOSLORA_TEST_VLLM" not in os.environ, reason="no python of an environment with vLLM given")
def test_in_vllm_itself(tmp_path):
    """Base and adapter answer as the merged export does, with the same log-probabilities; the base alone does not."""
    # heads of 32, the smallest of vLLM's attention kernels
    llm = write_llm(tmp_path / "llm", hidden_size=128, max_position_embeddings=256)
    clip = write_clip(tmp_path / "clip", hidden_size=128)
    trained_run(tmp_path / "run", llm, clip, write_projector(tmp_path / "projector.safetensors", 128, 128))
    folders = export(tmp_path / "run", tmp_path / "out", ["hf", "vllm", "peft", "peft_with_base"])
    others = [folders["peft"] / "llm_adapter", folders["peft_with_base"] / "adapter"]
    questions = folders["hf"] / "probe/questions.json"
    script = Path(__file__).parents[2] / "support/in_vllm.py"
    command = [os.environ["LLAVA_MOSLORA_TEST_VLLM"], script, questions, folders["hf"], folders["vllm"], *others]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["modules"]) == 14 and all(re.fullmatch(LAYER, name) for name in report["modules"])
    ids = [question["ids"] for question in json.loads(questions.read_text())["questions"]]
    assert [prompt for prompt, _, _ in report["hf"]] == ids
    for (_, expected, expected_log), (_, found, found_log) in zip(report["hf"], report["adapter"], strict=True):
        assert found == expected and found_log == pytest.approx(expected_log, abs=1e-4)
    assert [answer for _, answer, _ in report["base"]] != [answer for _, answer, _ in report["adapter"]]
    assert "modules_to_save" in report[str(others[1])]
