"""``llm``: only the merged LLM, as an ordinary causal LM of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles, known_to_transformers_4, save_config
from llava_moslora.text.ollama import modelfile


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    return ExportPlan(
        weights=[weights(trained, dtype)],
        write_files=lambda folder: write_files_and_modelfile(trained, folder, dtype),
        load_from={"llm": "."},
        rounded=("llm", "lm_head"),
    )


USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
turns = [{"role": "user", "content": "What is a llama?"}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
TARGET = Target(
    name="llm",
    summary=FORMATS["llm"],
    usage=USAGE,
    plan=plan,
    text_usage=USAGE,
)


def weights(trained: TrainedRun, dtype: torch.dtype, folder: str = "", *, merged: bool = True) -> WeightFiles:
    return WeightFiles(folder, trained.llm_tensors(merged=merged), dtype)


def write_files(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    save_config(trained.exported_llm_config(dtype), folder)
    trained.generation_config().save_pretrained(folder)
    trained.tokenizer_with_template().save_pretrained(folder)
    known_to_transformers_4(folder)


def write_files_and_modelfile(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    """With Ollama's ``Modelfile`` for the GGUF files that llama.cpp's converters write (docs/export.md)."""
    write_files(trained, folder, dtype)
    files = ["./model.gguf"] if trained.text_only else ["./model.gguf", "./mmproj.gguf"]
    if (text := modelfile(trained.template, trained.tokenizer, files)) is not None:
        (folder / "Modelfile").write_text(text, encoding="utf-8")
