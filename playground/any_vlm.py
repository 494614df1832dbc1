"""MoSLoRA in a vision-language model of transformers with stock PEFT: Qwen2.5-VL, Qwen3-VL, LLaVA and similar.

    python playground/any_vlm.py --model Qwen/Qwen3-VL-8B-Instruct --data rows.json --output_dir adapters/qwen

``rows.json`` is a list of records with ``messages``, as the model's chat template takes them, and ``image``, a path.
The training loop is minimal: one record per step, loss on the last answer. It uses only the adapter of this
package. ``output_dir`` has the training form, ``output_dir/plain`` the same as a plain LoRA for stock PEFT and vLLM.
"""

import argparse
import json
import re
from pathlib import Path

from llava_moslora.noise import quiet_libraries

quiet_libraries()

import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from llava_moslora import MosLoraConfig
from llava_moslora.adapters.fold import fold, save
from llava_moslora.adapters.load import read_adapter

# A linear inside a layer of the LLM, or of the vision tower: Qwen's is called ``visual`` and its layers ``blocks``
LAYER = re.compile(r"(.*\b(?:language_model|visual|vision_tower|vision_model)\b.*\.(?:layers|blocks)\.)\d+\.(.+)")


def add_moslora(model: nn.Module, r: int, tower_r: int) -> PeftModel:
    """MoSLoRA on every linear of the LLM's layers, and of the vision tower's with a rank of its own; 0: none there."""
    linears: dict[str, dict[str, None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (found := LAYER.fullmatch(name)):
            linears.setdefault(found[1], {})[re.escape(found[2])] = None
    tower = {prefix for prefix in linears if "language_model" not in prefix}
    patterns = {
        p: rf"{re.escape(p)}\d+\.(?:{'|'.join(names)})" for p, names in linears.items() if tower_r or p not in tower
    }
    config = MosLoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules="|".join(patterns.values()),
        rank_pattern={patterns[p]: tower_r for p in tower & patterns.keys()},
        alpha_pattern={patterns[p]: 2 * tower_r for p in tower & patterns.keys()},
    )
    return get_peft_model(model, config)


def publish(model: PeftModel, folder: Path) -> None:
    """Save the training form, and in ``plain/`` the same function as a plain LoRA."""
    model.save_pretrained(str(folder))
    save(fold(read_adapter(folder)), folder / "plain")


def inputs_of(row: dict, processor: ProcessorMixin) -> dict:
    """A record as the model takes it; the loss is on what comes after the last question."""
    images = [Image.open(row["image"]).convert("RGB")] if row.get("image") else None
    prompt = processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)
    whole = processor.apply_chat_template(row["messages"])
    inputs = processor(images=images, text=[whole], return_tensors="pt")
    length = processor(images=images, text=[prompt], return_tensors="pt")["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :length] = -100
    return inputs | {"labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name that transformers loads")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--tower_r", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device)
    model = add_moslora(model, args.r, args.tower_r)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    for step, row in enumerate(json.loads(args.data.read_text(encoding="utf-8")), start=1):
        inputs = {name: tensor.to(device) for name, tensor in inputs_of(row, processor).items()}
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    publish(model, args.output_dir)


if __name__ == "__main__":
    main()
