"""Rows of the prepared data set to one padded batch, images read and transformed on the way.

Shapes: B lines, T the longest line's tokens, N images of all rows in order, H and W the vision tower's input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from llava_moslora.config import DataSettings
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.images import load_bytes, load_image
from llava_moslora.data.sources.shards import ImageRef, read_image
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import IGNORE_INDEX
from llava_moslora.text.tokenizer import image_token_id

PACKINGS = 32  # lengths of packed lines that are tried


@dataclass
class Collator:
    """Makes a batch of rows (dictionaries with ``input_ids labels images shard record id number``).

    With ``pack_to``, several records share a line of at most that many tokens (or of the longest record's), so that
    less is padded. Positions restart at 0 with each record: that is how transformers recognises packed lines (with
    ``use_cache=False``; a cache switches it off in silence), and lets no record see another; kernels for sequences of
    unlike length go by the lengths instead, and no mask is made. The records of the batch, and so its loss, are as
    without packing.

    There is never an ``attention_mask``: padding comes after every token, so causal attention never sees it, and it has
    no label. With a mask torch could not use its causal flash attention.

    Args:
        pad_token_id: fills the right side of shorter lines; nothing attends to it and no label is trained.
        image_folder: where the rows' image names start; needed when a row has images.
        transform: the vision tower's.
        follow_links: see :func:`~llava_moslora.data.images.load_image`.
        pack_to: tokens per line; ``None``: one record per line.
        image_token_id: the placeholder's; with it a batch says where its images' features go.
        data_files: the sources that rows count their ``source`` by; named in refusals where there are several.
    """

    pad_token_id: int
    image_folder: str | Path | None
    transform: ImageTransform
    follow_links: bool = False
    pack_to: int | None = None
    image_token_id: int | None = None
    data_files: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerFast,
        transform: ImageTransform,
        packing: bool = False,
    ) -> Collator:
        """The collator of a data set that was prepared with these settings; ``packing``: rows of
        ``settings.model_max_length`` tokens."""
        return cls(
            tokenizer.pad_token_id,
            settings.image_folder,
            transform,
            follow_links=settings.follow_image_links,
            pack_to=settings.model_max_length if packing else None,
            image_token_id=image_token_id(tokenizer),
            data_files=tuple(settings.data_path),
        )

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor | int]:
        """``input_ids labels`` int64[B, T], packed also what :func:`_sequences` gives, ``record`` and ``lengths``
        int64[rows] (the rows' ``number`` and tokens, in their order in the lines) and, if any row has images,
        ``pixel_values`` float32[N, 3, H, W] in the order of the placeholders. Counted in the flattened B·T, so that the
        model need not ask the device how many there are: ``label_positions`` int64[S], the tokens with a label that
        have one before them, and with images ``image_positions`` int64[N·P], the placeholders.

        Raises:
            Refusal: I-..., an image that cannot be used; D-LABELS, no token is trained. Both name the record.
        """
        for row in rows:
            if all(label == IGNORE_INDEX for label in row["labels"]):
                raise Refusal("D-LABELS", "no token of this record is trained", **self._where(row))
        lines = [[row] for row in rows] if self.pack_to is None else pack(rows, self.pack_to)
        rows = list(chain.from_iterable(lines))
        batch = {
            "input_ids": _pad([_joined(line, "input_ids") for line in lines], self.pad_token_id),
            "labels": _pad([_joined(line, "labels") for line in lines], IGNORE_INDEX),
            "record": torch.tensor([row["number"] for row in rows]),
            "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
        }
        trained = batch["labels"] != IGNORE_INDEX
        trained[:, 0] = False  # nothing comes before it that could predict it
        batch["label_positions"] = _places(trained)
        if self.pack_to is not None:
            batch |= _sequences(lines, batch["input_ids"].shape[1])
        images = [self._image(name, row) for row in rows for name in row["images"]]
        if images:
            batch["pixel_values"] = torch.stack(images)
            if self.image_token_id is not None:
                batch["image_positions"] = _places(batch["input_ids"] == self.image_token_id)
        return batch

    def _image(self, name: str, row: dict) -> torch.Tensor:
        return self.transform(read_row_image(row, name, self.image_folder, self.follow_links, **self._where(row)))

    def _where(self, row: dict) -> dict:
        several = len(self.data_files) > 1
        return {
            "record": row["record"],
            "record_id": (f"{row['id']} of {self.data_files[row['source']]}" if several else row["id"]) or None,
        }


def read_row_image(
    row: dict, name: str, folder: str | Path | None, follow_links: bool, *, record: int, record_id: str | None
) -> Image.Image:
    """One of a row's ``images``, out of its shard or the image folder, in RGB.

    Raises:
        Refusal: I-...
    """
    if not row["shard"]:
        assert folder is not None, "rows with images need an image folder; prepare refuses them without"
        return load_image(name, folder, record=record, record_id=record_id, follow_links=follow_links)
    place = ImageRef.parse(name)
    data = read_image(row["shard"], place, record=record, record_id=record_id)
    return load_bytes(data, f"{row['shard']}:{place.name}", record=record, record_id=record_id)


def pack(rows: Sequence[dict], limit: int) -> list[list[dict]]:
    """The rows dealt to lines of at most ``limit`` tokens (a longer row has a line of its own), with little padding.

    First-fit decreasing for several lengths of line, of which the one counts that leaves the fewest tokens, padding
    included; the shorter one where two do, as attention grows with the square. Never more padding than unpacked.
    """
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))  # stable, so the same rows give the same lines
    longest = len(rows[0]["input_ids"])
    step = max(1, (limit - longest) // PACKINGS)
    packings = [_first_fit(rows, room) for room in (*range(longest, limit, step), max(longest, limit))]
    return min(packings, key=lambda lines: len(lines) * max(map(_length, lines)))


def _first_fit(rows: list[dict], limit: int) -> list[list[dict]]:
    lines: list[list[dict]] = []
    room: list[int] = []
    for row in rows:
        length = len(row["input_ids"])
        line = next((k for k, free in enumerate(room) if free >= length), None)
        if line is None:
            lines.append([])
            room.append(limit)
            line = -1
        lines[line].append(row)
        room[line] -= length
    return lines


def _places(mask: torch.Tensor) -> torch.Tensor:
    """int64[n]: where a bool[B, T] is true, counted in the flattened B·T."""
    return mask.flatten().nonzero().squeeze(1)


def _length(line: list[dict]) -> int:
    return sum(len(row["input_ids"]) for row in line)


def _joined(line: list[dict], name: str) -> list[int]:
    return [number for row in line for number in row[name]]


def _sequences(lines: list[list[dict]], longest: int) -> dict[str, torch.Tensor | int]:
    """Where the records of packed lines are, a line's padding being a record of its own, under transformers' names:
    ``position_ids`` int64[B, T] count from 0 in each, ``cu_seq_lens_q`` and ``_k`` int32[R+1] are where each begins in
    the flattened B·T, and the end, ``max_length_q`` and ``_k`` the longest one's tokens."""
    lengths = []
    for line in lines:
        records = [len(row["input_ids"]) for row in line]
        lengths += [length for length in (*records, longest - sum(records)) if length]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(len(lines), longest)
    return {
        "position_ids": positions,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


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
