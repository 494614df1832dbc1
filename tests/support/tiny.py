"""Tiny random parts, built in code: an LLM folder, a CLIP folder, a projector and a LLaVA data set, all in seconds."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

WORDS = (  # the tiny tokenizers' vocabulary: their ids, and what tiny models learn, depend on it
    "what colour is the shape red green blue yes no circle square a of in this picture user assistant system".split()
)
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's control tokens, trained on a handful of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def write_llm(folder: Path, **changes) -> Path:
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gemma2(folder: Path) -> Path:
    """An LLM that caps its logits: it can be used, and not trained."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), **sizes, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def write_clip(folder: Path, **changes) -> Path:
    torch.manual_seed(2)
    config = CLIPVisionConfig(**(TOWER | changes))
    CLIPVisionModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_siglip(folder: Path, **changes) -> Path:
    """As ``write_clip``; images of 34 pixels have 4 patches a side and 2 pixels to spare, as 384 in patches of 14."""
    torch.manual_seed(2)
    config = SiglipVisionConfig(**(TOWER | {"image_size": 34} | changes))
    model = SiglipVisionModel(config)
    with torch.no_grad():  # biases begin at 0 and norms at 1, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_projector(file: Path, vision: int = 32, llm: int = 64) -> Path:
    generator = torch.Generator().manual_seed(3)
    shapes = {"0.weight": (llm, vision), "0.bias": (llm,), "2.weight": (llm, llm), "2.bias": (llm,)}
    tensors = {f"model.{k}": torch.randn(s, generator=generator) * 0.1 for k, s in shapes.items()}
    save_file(tensors, file)
    return file


def write_data(folder: Path, records: int = 16) -> Path:
    """``data.json`` and ``images/``: every third record is text only, images have several sizes."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(4)
    rows = []
    for index in range(records):
        row = {"id": f"r{index}", "conversations": []}
        image = ""
        if index % 3 != 2:
            size = (int(random.integers(20, 60)), int(random.integers(20, 60)), 3)
            Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(folder / "images" / f"{index}.png")
            row["image"], image = f"{index}.png", "<image>\n"
        for turn in range(1 + index % 2):
            question = ("" if turn else image) + "what colour is the shape?"
            row["conversations"] += [
                {"from": "human", "value": question},
                {"from": "gpt", "value": WORDS[5 + index % 3]},
            ]
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"
