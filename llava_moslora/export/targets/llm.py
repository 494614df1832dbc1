"""``llm``: the merged LLM alone, as an ordinary causal LM of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles, known_to_transformers_4, save_config


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    return ExportPlan(
        weights=[weights(trained, dtype)],
        write_files=lambda folder: write_files(trained, folder, dtype),
        load_from={"llm": "."},
        rounded=("llm", "lm_head"),
    )


TARGET = Target(
    name="llm",
    summary=FORMATS["llm"],
    usage="""from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(FOLDER)""",
    plan=plan,
)


def weights(trained: TrainedRun, dtype: torch.dtype, folder: str = "", *, merged: bool = True) -> WeightFiles:
    return WeightFiles(folder, trained.llm_tensors(merged=merged), dtype)


def write_files(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    save_config(trained.exported_llm_config(dtype), folder)
    trained.generation_config().save_pretrained(folder)
    trained.tokenizer_with_template().save_pretrained(folder)
    known_to_transformers_4(folder)
