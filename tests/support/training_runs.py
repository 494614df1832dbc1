"""Training as the script does it, in this process (seconds, where a process of its own takes ten for its imports)."""

import json
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_moslora.distributed import rank
from llava_moslora.models.assemble import assemble
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.training.callbacks.preemption import SIGNALS
from scripts.train_vit_llm import main
from support.launching import flags
from support.settings import parts_of


def train(parts, output: Path, **changes) -> None:
    """One process without DeepSpeed, which also reads the images."""
    arguments, handlers = sys.argv, {number: signal.getsignal(number) for number in SIGNALS}
    changes = {"dataloader_num_workers": 0} | changes
    sys.argv = ["scripts/train_vit_llm.py", *flags(parts, output, **changes)]
    try:
        main()
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():
            signal.signal(number, handler)


def broken(model, where: str, only_rank: int = 0):
    """``model``, whose loss or gradient is NaN at its second step."""
    calls = []

    def second(value):
        calls.append(None)
        return value * float("nan") if len(calls) == 2 and rank() == only_rank else value

    if where == "loss":
        model.base_model.model.lm_head.register_forward_hook(lambda module, inputs, output: second(output))
    else:
        projector = next(p for n, p in model.named_parameters() if "projector" in n and p.requires_grad)
        projector.register_hook(second)
    return model


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output)]


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def adapter(output: Path, step: int) -> dict:
    return load_file(output / f"checkpoint-{step}" / "adapter" / "adapter_model.safetensors")


def stock_model(parts) -> LlavaForConditionalGeneration:
    """The assembled parts with stock transformers' forward."""
    tokenizer = load_tokenizer(parts.llm)
    model, _ = assemble(parts_of(parts.llm, parts.clip, parts.projector), tokenizer=tokenizer, dtype=torch.float32)
    model.__class__ = LlavaForConditionalGeneration
    return model.eval()
