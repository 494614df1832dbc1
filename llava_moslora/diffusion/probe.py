"""Computes a denoising step and an image with the export in the folder above, using only stock diffusers.

    python probe/probe.py --output found.safetensors

This file is a part of llava_moslora that is copied into exports; it imports nothing from that package. The inputs
are in question.json: the base model's folder, the LoRA file, prompt, seed, size and number of steps.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file


def load_base(question: dict) -> StableDiffusionXLPipeline:
    """The base model in float32 on the device; without a watermark, which would hide small differences."""
    torch.backends.cudnn.allow_tf32 = False
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        question["base"], dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(question["device"])


@torch.no_grad()
def answers(pipeline: StableDiffusionXLPipeline, question: dict) -> dict[str, torch.Tensor]:
    """``step``: the UNet's prediction for a fixed noise, float32[1, 4, S/8, S/8]; ``picture``: float32[1, S, S, 3]"""
    device, size = pipeline.device, question["size"]
    embeds, _, pooled, _ = pipeline.encode_prompt(
        question["prompt"], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    generator = torch.Generator().manual_seed(question["seed"])
    noise = torch.randn(1, 4, size // 8, size // 8, generator=generator).to(device)
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]], device=device)}
    step = pipeline.unet(noise, question["timestep"], embeds, added_cond_kwargs=conditions, return_dict=False)[0]
    picture = pipeline(
        question["prompt"], height=size, width=size, num_inference_steps=question["steps"], output_type="pt",
        generator=torch.Generator().manual_seed(question["seed"]),
    ).images  # fmt: skip
    return {"step": step.float().cpu().contiguous(), "picture": picture.permute(0, 2, 3, 1).float().cpu().contiguous()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument("--base", help="the base model's folder, if it moved")
    parser.add_argument("--lora", help="the LoRA file; default: the export's")
    args = parser.parse_args()
    here = Path(__file__).parent
    question = json.loads((here / "question.json").read_text(encoding="utf-8"))
    question["base"] = args.base or question["base"]
    file = Path(args.lora) if args.lora else here.parent / question["lora"]
    pipeline = load_base(question)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    save_file(answers(pipeline, question), args.output)


if __name__ == "__main__":
    main()
