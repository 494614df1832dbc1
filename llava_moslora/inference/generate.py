"""Generates answers from images and turns: used by sample answers, chat, evaluation and the verification of exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from PIL import Image

from llava_moslora.data.collate import pad_left_prompts
from llava_moslora.inference.load import ChatModel
from llava_moslora.text.conversation import Turn, encode_prompt

ImageInput: TypeAlias = Image.Image | torch.Tensor  # RGB, or float[3, H, W] as the tower takes it
Question: TypeAlias = tuple[Sequence[ImageInput], Sequence[Turn]]  # the images, and turns of which the last is human


@torch.inference_mode()
def answer(
    chat_model: ChatModel, questions: Sequence[Question], *, max_new_tokens: int = 64, batch_size: int = 16
) -> Iterator[str]:
    """Greedy answers, one per question, in order.

    The prompt is built by the same function as the training ids, so it always has the trained format. Prompts of one
    batch are padded on the left.
    """
    tokenizer = chat_model.tokenizer
    for start in range(0, len(questions), batch_size):
        inputs = batch(chat_model, questions[start : start + batch_size])
        output = generate(chat_model, inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for ids in output[:, inputs["input_ids"].shape[1] :]:
            yield tokenizer.decode(ids, skip_special_tokens=True).strip()


def generate(chat_model: ChatModel, inputs: dict[str, torch.Tensor], **how) -> torch.Tensor:
    """The model's ``generate``, which stops where training stopped: int64[B, T + new tokens], padded on the right."""
    pad = chat_model.tokenizer.pad_token_id
    return chat_model.model.generate(**inputs, eos_token_id=chat_model.stop_token_ids, pad_token_id=pad, **how)


def batch(chat_model: ChatModel, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` int64[B, T], padded on the left; ``pixel_values`` float[N, 3, H, W] or none."""
    tokenizer, model = chat_model.tokenizer, chat_model.model
    prompts = []
    for images, turns in questions:
        counts = [chat_model.tokens_per_image] * len(images) if images else []
        encoded = encode_prompt(turns, tokenizer=tokenizer, template=chat_model.template, image_tokens=counts)
        prompts.append(encoded.input_ids)
    inputs = pad_left_prompts(prompts, tokenizer.pad_token_id)
    images = [image for images, _ in questions for image in images]
    if images:
        transform = chat_model.require_images()
        pixels = [p if isinstance(p, torch.Tensor) else transform(p) for p in images]
        inputs["pixel_values"] = torch.stack(pixels).to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.inference_mode()
def first_logits(chat_model: ChatModel, question: Question) -> torch.Tensor:
    """Logits of the first answer token, float32[V] on the CPU, to compare two copies of a model."""
    return chat_model.model(**batch(chat_model, [question])).logits[0, -1].float().cpu()
