"""Rows of the prepared data set to one padded batch, pictures read and transformed on the way.

Shapes: B rows, T the longest row's tokens, N pictures of all rows in order, H and W the vision tower's input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_moslora.data.conversation import IGNORE_INDEX
from llava_moslora.data.images import ImageTransform, load_image
from llava_moslora.errors import Refusal


@dataclass
class Collator:
    """Makes a batch of rows (dictionaries with ``input_ids labels images record id``).

    Args:
        pad_token_id: fills the right side of shorter rows; attention is 0 there and no label is trained.
        image_folder: where the rows' picture names start; needed when a row has pictures.
        transform: the vision tower's.
        follow_links: see :func:`~llava_moslora.data.images.load_image`.
    """

    pad_token_id: int
    image_folder: str | Path | None
    transform: ImageTransform
    follow_links: bool = False

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """``input_ids attention_mask labels`` int64[B, T], ``record`` int64[B] and, if any row has pictures,
        ``pixel_values`` float32[N, 3, H, W] in the order of their placeholders.

        Raises:
            Refusal: I-..., a picture that cannot be used; D-LABELS, no token is trained. Both name the record.
        """
        for row in rows:
            if all(label == IGNORE_INDEX for label in row["labels"]):
                raise Refusal(
                    "D-LABELS", "no token of this record is trained", record=row["record"], record_id=row["id"] or None
                )
        batch = {
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": _pad([row["labels"] for row in rows], IGNORE_INDEX),
            "record": torch.tensor([row["record"] for row in rows]),
        }
        pictures = [self._picture(name, row) for row in rows for name in row["images"]]
        if pictures:
            batch["pixel_values"] = torch.stack(pictures)
        return batch

    def _picture(self, name: str, row: dict) -> torch.Tensor:
        assert self.image_folder is not None, "rows with pictures need an image folder; prepare refuses them without"
        where = {"record": row["record"], "record_id": row["id"], "follow_links": self.follow_links}
        return self.transform(load_image(name, self.image_folder, **where))


def pad_left_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Prompts of unlike length for batched generation: ``input_ids``, ``attention_mask`` int64[B, T], padded left."""
    return {
        "input_ids": _pad(prompts, pad_token_id, left=True),
        "attention_mask": _pad([[1] * len(prompt) for prompt in prompts], 0, left=True),
    }


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """int64[B, T] of rows with unlike length."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), value, dtype=torch.int64)  # (B, T)
    for line, row in zip(padded, rows, strict=True):
        line[longest - len(row) if left else 0 : longest if left else len(row)] = torch.as_tensor(row)
    return padded
