"""Runs on text alone: alpaca records, and the flags of a tiny LLM without a vision tower."""

import json
from pathlib import Path

from support.tiny import WORDS


def write_alpaca(file: Path, records: int = 16) -> Path:
    """Commonsense-like records of several lengths, in the format of LLM-Adapters."""
    rows = []
    for index in range(records):
        answer = WORDS[5 + index % 3]
        question = " ".join(["what colour is the shape?"] * (1 + index % 4))
        rows.append(
            {
                "instruction": f"{question}\n\nAnswer format: red/green/blue",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    file.write_text(json.dumps(rows))
    return file


def text_flags(parts, data: Path, **changes) -> dict:
    """Changes of :func:`support.launching.flags` that make a run on text alone."""
    none = dict.fromkeys(("vision_tower", "pretrain_mm_mlp_adapter", "image_folder", "vision_lora_r"))
    return none | {"model_name_or_path": parts.llm, "data_path": data, "version": "llm_adapters"} | changes
