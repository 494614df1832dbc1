"""The comment with the plan's figures in every training recipe; ``python -m support.recipe_plans [NAME.sh ...]`` writes
them again (from the repository, with ``PYTHONPATH=.:tests``).

The parts' configurations are written here with the published shapes: a plan reads nothing else.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from transformers import CLIPVisionConfig, LlamaConfig

from support.launching import ROOT
from support.planned import CLIP_L_336, LLAMA_3_8B

VICUNA_7B = LLAMA_3_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000, "bos_token_id": 1}
INTERNLM2_7B = LLAMA_3_8B | {"vocab_size": 92544, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
INTERNLM2_7B |= {"model_type": "internlm2", "hidden_act": "silu", "rms_norm_eps": 1e-5, "bias": False}
INTERNLM2_7B |= {"max_position_embeddings": 32768, "architectures": ["InternLM2ForCausalLM"]}
RECORDS = {"pretrain": 558_128, "commonsense": 170_420}  # else LLaVA-1.5's 665K
COMMENT = re.compile(r"^# Planned, .*\n#   .*\n", re.MULTILINE)
BEFORE = "set -euo pipefail\n"


def recipes() -> list[str]:
    """Names of the recipes that train published models."""
    return sorted(path.name for path in (ROOT / "scripts").glob("*.sh") if re.search(r"_[78]b_", path.name))


def write_configs(folder: Path) -> None:
    """``llama3 vicuna internlm2 clip/config.json`` in ``folder``, and a hostfile of two hosts."""
    for name, shape in (("llama3", LLAMA_3_8B), ("vicuna", VICUNA_7B)):
        LlamaConfig(**shape, max_position_embeddings=8192).save_pretrained(folder / name)
    (folder / "internlm2").mkdir()
    (folder / "internlm2" / "config.json").write_text(json.dumps(INTERNLM2_7B))
    CLIPVisionConfig(**CLIP_L_336).save_pretrained(folder / "clip")
    (folder / "hosts").write_text("node-a slots=4\nnode-b slots=4\n")


def comment(recipe: str, folder: Path) -> str:
    """What the plan of a recipe says, with the command that repeats it. Changes the environment and the folder.

    Args:
        folder: of :func:`write_configs`.
    """
    from llava_moslora.planning.plan import make_plan
    from llava_moslora.planning.report import verdict
    from llava_moslora.planning.request import Asked, make_request
    from llava_moslora.training.deepspeed_config import read_deepspeed_config
    from scripts.plan import accumulation, read_settings

    os.environ |= {"LLM": str(folder / recipe.split("_")[0]), "TOWER": str(folder / "clip")}
    os.environ |= {"HOSTFILE": str(folder / "hosts"), "MASTER": "127.0.0.1"}
    gpu = "rtx4090" if "24gb" in recipe else "a100-80"
    records = next((n for word, n in RECORDS.items() if word in recipe), 665_298)
    gpus, settings = read_settings(SimpleNamespace(config=ROOT / "scripts" / recipe, gpus=None), [])
    training = settings[3]
    content = read_deepspeed_config(training["deepspeed"])
    asked = Asked(gpu, gpus, records)
    request = make_request(asked, *settings[:3], training, accumulation(training, gpus), content, {})
    plan = make_plan(request, with_largest=False)
    said = verdict(plan) + (f"; --recompute auto: {plan.request.choice.recompute}" if plan.auto else "")
    command = f"python scripts/plan.py --config scripts/{recipe} --gpu {gpu} --records {records}"
    return f"# Planned, {command}:\n#   {said}\n"


def in_recipe(recipe: str) -> str | None:
    found = COMMENT.findall((ROOT / "scripts" / recipe).read_text())
    return found[0] if len(found) == 1 else None


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_configs(Path(name))
        for recipe in names or recipes():
            file = ROOT / "scripts" / recipe
            text = COMMENT.sub("", file.read_text())
            assert text.count(BEFORE) == 1, f"{recipe} has no place for the comment"
            said = comment(recipe, Path(name))
            file.write_text(text.replace(BEFORE, f"{said}{BEFORE}"))
            print(said, end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
