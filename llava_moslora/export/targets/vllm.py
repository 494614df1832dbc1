"""``vllm``: a complete base LLaVA, and next to it the LLM's adapters as one plain LoRA, as vLLM serves them.

vLLM keeps one base in memory for many adapters of its LLM. Trained projector and vision tower are therefore in the
base: vLLM's ``PEFTHelper`` refuses ``modules_to_save``, such as the projector, and without the experimental
``--enable-tower-connector-lora`` it silently drops the tower's adapters. The adapter has one rank and one alpha, as not
every version supports patterns. Its names, ``model.language_model.layers.…``, are PEFT's for this base, and those that
vLLM's ``LlavaForConditionalGeneration`` maps to its own.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.adapters.fold import Adapter, fold_layers, save_config
from llava_moslora.errors import Refusal
from llava_moslora.export import peft_format
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target, check_adapters, check_lora
from llava_moslora.export.targets import hf
from llava_moslora.export.targets.peft_with_base import composed_names, target_patterns
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles
from llava_moslora.models.names import PARTS

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank in vLLM 0.33
MERGED = ("vision_tower", "projector")


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    """Raises C-FORMAT for a run without adapters in the LLM, or with a rank that vLLM does not support."""
    check_adapters(trained, "vllm")
    check_lora(trained, "vllm")
    layers = composed_names(fold_layers(trained.updates("llm", "lm_head")))
    if not layers:
        raise Refusal(
            "C-FORMAT", "the LLM has no adapters", file=trained.run, key="--format vllm", found="--lora_r 0",
            fix="--format hf; vLLM serves it as it is",
        )  # fmt: skip
    config = peft_format.adapter_config(layers, "base", depth=None, task=None)
    assert not config.rank_pattern and not config.alpha_pattern, "one rank and one alpha in the whole LLM"
    config.target_modules = "|".join(target_patterns(layers))  # unqualified layer names would also match the tower's
    if config.r > MAX_LORA_RANKS[-1]:
        raise Refusal(
            "C-FORMAT", "vLLM does not support this rank", file=trained.run, key="--format vllm", found=config.r,
            expected=f"at most {MAX_LORA_RANKS[-1]}", fix="--format hf; vLLM serves it as it is",
        )  # fmt: skip

    def write_files(folder: Path) -> None:
        hf.write_files(trained, folder / "base", dtype)
        save_config(config, folder / "adapter")

    base = WeightFiles("base", hf.tensors(trained, merged=MERGED), dtype)
    return ExportPlan(
        weights=[base, peft_format.adapter_weights(Adapter(config, dict(layers), {}), "adapter")],
        write_files=write_files,
        load_from={"llava": "base", "adapter": "adapter"},
        rounded=tuple(PARTS),
    )


TARGET = Target(
    name="vllm",
    summary=FORMATS["vllm"],
    usage="""from vllm import LLM
from vllm.lora.request import LoRARequest
llm = LLM(FOLDER + "/base", enable_lora=True, max_lora_rank=MAX_LORA_RANK)
turns = [{"role": "user", "content": "Name a colour."}]
print(llm.chat(turns, lora_request=LoRARequest("tuned", 1, FOLDER + "/adapter"))[0].outputs[0].text)""",
    plan=plan,
    merged=MERGED,
)


def max_lora_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` for an adapter of ``rank``."""
    return next(most for most in MAX_LORA_RANKS if most >= rank)
