"""Runs on text alone: alpaca records, and the flags of a tiny LLM without a vision tower."""

import json
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

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


PROMPT = (  # LLM-Adapters' finetune.py, typed anew
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "                \n"
    "                ### Response:\n"
    "                {output}"
)


def plain_loop(
    parts, data: Path, config: PeftConfig, first: dict[str, torch.Tensor], steps: int, on_prompt: bool
) -> list[float]:
    """Losses of stock transformers and PEFT under a plain loop, two records a step in the order of the file, with AdamW
    at a rate of 1e-2.

    Args:
        first: the adapter's tensors at the start, by their names in the model; others as PEFT makes them.
    """
    tokenizer = AutoTokenizer.from_pretrained(parts.llm)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(parts.llm), config)
    missing = model.load_state_dict(first, strict=False)
    assert not missing.unexpected_keys
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    records, found = json.loads(data.read_text()), []
    for step in range(steps):
        batch = []
        for record in records[2 * step : 2 * step + 2]:
            text = PROMPT.format(**record)
            if on_prompt:
                ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
                batch.append((ids, ids))
            else:
                prompt = tokenizer(text.removesuffix(record["output"])).input_ids
                answer = tokenizer(record["output"]).input_ids + [tokenizer.eos_token_id]
                batch.append((prompt + answer, [-100] * len(prompt) + answer))
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
