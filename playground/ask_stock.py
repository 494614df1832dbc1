"""Query an exported model with stock transformers only: this file must never import llava_moslora.

    python playground/ask_stock.py EXPORT --questions test.json --image_folder images \\
        --output answers.json --probe logits.safetensors
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--image_folder", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--probe", required=True)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    questions = json.loads(Path(args.questions).read_text(encoding="utf-8"))
    # Pillow scales images as in training; torchvision, transformers' default, differs by up to 1/64 per channel.
    processor = AutoProcessor.from_pretrained(args.folder, backend="pil")
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(args.folder).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def inputs_of(rows: list[dict]) -> dict:
        contents = [[{"type": "image"}, {"type": "text", "text": row["question"]}] for row in rows]
        turns = [[{"role": "user", "content": content}] for content in contents]
        prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
        images = [Image.open(Path(args.image_folder) / row["image"]).convert("RGB") for row in rows]
        return processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device)

    answers = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(questions), args.batch_size), unit="batch", dynamic_ncols=True):
            inputs = inputs_of(questions[start : start + args.batch_size])
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        logits = [model(**inputs_of([row])).logits[0, -1].float().cpu() for row in questions[:32]]
    Path(args.output).write_text(json.dumps({"answers": [a.strip() for a in answers]}), encoding="utf-8")
    save_file({"logits": torch.stack(logits)}, args.probe)


if __name__ == "__main__":
    main()
