"""Whether a template and a tokenizer fit each other."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import Turn, encode_prompt
from llava_moslora.text.templates import chat_template
from llava_moslora.text.tokenizer import IMAGE_TOKEN


def check_template(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """Prove that template and tokenizer fit: our prompt is the stock tokenizer's reading of the exported chat template.

    Raises:
        Refusal: C-TEMPLATE
    """
    turns = [Turn("human", f"{IMAGE_TOKEN}\nWhat is this?"), Turn("gpt", "A cat."), Turn("human", "Sure?")]
    if template == "plain":
        turns = turns[:1]
    ours = encode_prompt(turns, tokenizer=tokenizer, template=template, image_tokens=[1]).input_ids
    roles = {"human": "user", "gpt": "assistant"}
    text = tokenizer.apply_chat_template(
        [{"role": roles[turn.role], "content": turn.text} for turn in turns],
        chat_template=chat_template(template, tokenizer),
        add_generation_prompt=True,
        tokenize=False,
    )
    stock = tokenizer(text, add_special_tokens=False).input_ids
    if ours != stock:
        at = next((k for k, (a, b) in enumerate(zip(ours, stock, strict=False)) if a != b), min(len(ours), len(stock)))
        raise Refusal(
            "C-TEMPLATE",
            f"the tokenizer reads the {template} prompt in another way at token {at}",
            found=tokenizer.decode(stock[at : at + 5]),
            expected=tokenizer.decode(ours[at : at + 5]),
        )
