"""From images and turns to text: the one path that samples, chat, evaluation and export proofs share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from llava_moslora.data.collate import pad_left_prompts
from llava_moslora.inference.load import ChatModel
from llava_moslora.text.conversation import Turn, encode_prompt
from llava_moslora.text.templates import stop_token_ids

ImageInput = Image.Image | torch.Tensor  # RGB, or float[3, H, W] as the tower takes it
Question = tuple[Sequence[ImageInput], Sequence[Turn]]  # the images, and turns of which the last is human


@torch.inference_mode()
def answer(
    chat_model: ChatModel, questions: Sequence[Question], *, max_new_tokens: int = 64, batch_size: int = 16
) -> Iterator[str]:
    """Greedy answers, one per question, in order.

    The prompt is made by the function that made the training ids, so evaluation can never ask in another format than
    was trained. Prompts of one batch are padded on the left.
    """
    tokenizer = chat_model.tokenizer
    for start in range(0, len(questions), batch_size):
        inputs = batch(chat_model, questions[start : start + batch_size])
        output = chat_model.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_token_ids(tokenizer, chat_model.template),
            pad_token_id=tokenizer.pad_token_id,
        )
        for ids in output[:, inputs["input_ids"].shape[1] :]:
            yield tokenizer.decode(ids, skip_special_tokens=True).strip()


def batch(chat_model: ChatModel, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` int64[B, T], padded on the left; ``pixel_values`` float[N, 3, H, W] or none."""
    tokenizer, model = chat_model.tokenizer, chat_model.model
    prompts = [
        encode_prompt(
            turns,
            tokenizer=tokenizer,
            template=chat_model.template,
            image_tokens=[chat_model.tokens_per_image] * len(images),
        ).input_ids
        for images, turns in questions
    ]
    inputs = pad_left_prompts(prompts, tokenizer.pad_token_id)
    images = [image for images, _ in questions for image in images]
    if images:
        pixels = [p if isinstance(p, torch.Tensor) else chat_model.transform(p) for p in images]
        inputs["pixel_values"] = torch.stack(pixels).to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.inference_mode()
def first_logits(chat_model: ChatModel, question: Question) -> torch.Tensor:
    """Logits of the first answer token, float32[V] on the CPU: what two copies of a model are compared by."""
    return chat_model.model(**batch(chat_model, [question])).logits[0, -1].float().cpu()
