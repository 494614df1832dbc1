"""A LLaVA assembled from the tiny parts, and a batch for it."""

import torch

from llava_moslora.models.assemble import assemble
from llava_moslora.text.conversation import IGNORE_INDEX
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from support.settings import parts_of

PATCHES = 16  # 32×32 pixels in 8×8 patches


def build(parts, **changes):
    tokenizer = load_tokenizer(changes.get("llm", parts.llm))
    parts = {"llm": parts.llm, "clip": parts.clip, "projector": parts.projector} | changes
    settings = parts_of(parts["llm"], parts["clip"], parts["projector"], bits=changes.get("bits", 16))
    model, _ = assemble(settings, tokenizer=tokenizer, dtype=torch.float32)
    return model, tokenizer


def make_batch(tokenizer, images: bool = True) -> dict[str, torch.Tensor]:
    """Two rows of unlike length, right-padded, the first ``PATCHES`` ids of each an image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, 30), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 24:] = 0
    labels = ids.clone()
    labels[:, :20] = IGNORE_INDEX
    labels[1, 24:] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if images:
        ids[:, 1 : 1 + PATCHES] = image_token_id(tokenizer)
        batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    return batch
