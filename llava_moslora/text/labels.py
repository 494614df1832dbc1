"""A tokenised conversation for the eye: which of its text is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerFast

from llava_moslora.text.conversation import IGNORE_INDEX, Encoded
from llava_moslora.text.tokenizer import IMAGE_TOKEN


def label_runs(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[Literal["image", "masked", "trained"], str]]:
    """A tokenised conversation cut into runs of one kind, decoded; an image's run reads ``<image>×576``."""
    image = tokenizer.added_tokens_encoder.get(IMAGE_TOKEN)
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(input_ids, labels, strict=True):
        kind = "image" if token == image else "masked" if label == IGNORE_INDEX else "trained"
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(token)
        else:
            runs.append((kind, [token]))
    return [
        (kind, f"{IMAGE_TOKEN}×{len(tokens)}" if kind == "image" else tokenizer.decode(tokens)) for kind, tokens in runs
    ]


def show_labels(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, *, colour: bool = True) -> str:
    """A conversation for the eye: trained text green, or between ⟦ ⟧ without colour."""
    open_, close = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    runs = label_runs(encoded.input_ids, encoded.labels, tokenizer)
    return "".join(open_ + text + close if kind == "trained" else text for kind, text in runs)
