"""A tiny set of subjects in google/dreambooth's form, and images of them as a method would have drawn."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

from llava_moslora.evaluation.subject_images import IMAGES, planned
from llava_moslora.evaluation.subjects import read_subjects
from llava_moslora.files.disk import replace_json
from support.tiny import tiny_tokenizer

TEXT = """Classes

subject_name,class
can,can
bear_plushie,stuffed animal
cat,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""
COLOURS = {"can": (220, 30, 30), "bear_plushie": (120, 80, 40), "cat": (40, 40, 200)}


def picture(colour, seed: int, side: int = 48) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (side, side, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def write_subjects(folder: Path, text: str = TEXT) -> Path:
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for n in range(3):
            picture(colour, n).save(folder / name / f"{n:02d}.jpg")
    (folder / "prompts_and_classes.txt").write_text(text, encoding="utf-8")
    return folder


def write_drawn(folder: Path, data: Path, *, fade: float, seeds: int = 2, settings: dict | None = None) -> Path:
    """Images whose colour is off by the share ``fade`` from the subject's."""
    images = planned(read_subjects(data), range(seeds))
    for image in images:
        (folder / image.subject).mkdir(parents=True, exist_ok=True)
        colour = (1 - fade) * np.array(COLOURS[image.subject]) + fade * 255
        picture(colour, 100 * image.number + image.seed).save(folder / image.name)
    content = {"settings": settings or {"steps": 2}, "images": {image.name: asdict(image) for image in images}}
    replace_json(folder / IMAGES, content)
    return folder


def write_clip_model(folder: Path) -> Path:
    """A random CLIP, both halves, with processor and tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_vit(folder: Path) -> Path:
    """A random vision transformer with its processor."""
    torch.manual_seed(1)
    config = ViTConfig(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                       patch_size=16)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
