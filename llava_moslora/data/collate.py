"""Makes one padded batch of records of the prepared data set; reads and transforms their images.

A row of a batch holds one record, or several with packing.
Shapes: B rows, T the longest row's tokens, S tokens with a label, N images of all records in order, P placeholders per
image, H and W the vision tower's input size.
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
from llava_moslora.data.sources.container import ImageRef
from llava_moslora.data.sources.source import read_image
from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import IGNORE_INDEX
from llava_moslora.text.tokenizer import image_token_id

PACKED_LENGTHS = 32  # lengths of packed rows that are tried


@dataclass
class Collator:
    """Makes a batch of records (dictionaries with ``input_ids labels images shard record id number``).

    With ``pack_to``, several records share a row of at most that many tokens (or of the longest record's), which saves
    padding. Positions restart at 0 with each record: transformers detects packed rows from that (with
    ``use_cache=False``; with a cache it silently does not), and no record attends to another; variable-length kernels
    use the lengths instead, without a mask. The records of the batch, and so its loss, are those without packing.

    There is never an ``attention_mask``: padding is on the right, where causal attention never sees it, and has no
    label. With a mask torch could not use its causal flash attention.
    """

    pad_token_id: int  # fills the right side of shorter rows
    image_folder: str | Path | None  # that the records' image names are relative to; needed when a record has images
    transform: ImageTransform | None  # the vision tower's; needed when a record has images
    follow_links: bool = False  # see load_image
    pack_to: int | None = None  # tokens per row; None: one record per row
    image_token_id: int | None = None  # the placeholder's; with it a batch has image_positions
    data_files: tuple[str, ...] = ()  # indexed by a record's "source"; named in refusals if there are several

    @classmethod
    def of(
        cls,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerFast,
        transform: ImageTransform | None,
        packing: bool = False,
    ) -> Collator:
        """For a data set prepared with these settings; ``packing``: into rows of ``settings.model_max_length``."""
        return cls(
            tokenizer.pad_token_id,
            settings.image_folder,
            transform,
            follow_links=settings.follow_image_links,
            pack_to=settings.model_max_length if packing else None,
            image_token_id=None if transform is None else image_token_id(tokenizer),
            data_files=tuple(settings.data_path),
        )

    def __call__(self, records: Sequence[dict]) -> dict[str, torch.Tensor | int]:
        """A batch.

        Returns:
            ``input_ids labels`` int64[B, T]; with packing also what :func:`_packed_positions` returns; ``record`` and
            ``lengths`` int64[records], the records' ``number`` and tokens, in their order in the rows; if any record
            has images, ``pixel_values`` float32[N, 3, H, W] in the order of the placeholders. And, to avoid a
            synchronisation with the device, indices into the flattened B·T: ``label_positions`` int64[S], of
            tokens that have a label and a token before them, and with images ``image_positions`` int64[N·P], of
            placeholders.

        Raises:
            Refusal: I-..., an image that cannot be used; D-LABELS, no token is trained. Both name the record.
        """
        for record in records:
            if all(label == IGNORE_INDEX for label in record["labels"]):
                fix = "remove the record, or raise --model_max_length, which may have truncated its answers"
                raise Refusal("D-LABELS", "no token of this record has a label", fix=fix, **self._where(record))
        rows = [[record] for record in records] if self.pack_to is None else pack(records, self.pack_to)
        records = list(chain.from_iterable(rows))
        batch = {
            "input_ids": _pad([_joined(row, "input_ids") for row in rows], self.pad_token_id),
            "labels": _pad([_joined(row, "labels") for row in rows], IGNORE_INDEX),
            "record": torch.tensor([record["number"] for record in records]),
            "lengths": torch.tensor([len(record["input_ids"]) for record in records]),
        }
        trained = batch["labels"] != IGNORE_INDEX
        trained[:, 0] = False  # there is no token before it to predict it from
        batch["label_positions"] = _true_positions(trained)
        if self.pack_to is not None:
            batch |= _packed_positions(rows, batch["input_ids"].shape[1])
        images = [self._image(name, record) for record in records for name in record["images"]]
        if images:
            batch["pixel_values"] = torch.stack(images)
            if self.image_token_id is not None:
                batch["image_positions"] = _true_positions(batch["input_ids"] == self.image_token_id)
        return batch

    def _image(self, name: str, record: dict) -> torch.Tensor:
        where = self._where(record)
        assert self.transform is not None, "prepare refuses images without a vision tower"
        return self.transform(read_record_image(record, name, self.image_folder, self.follow_links, where))

    def _where(self, record: dict) -> dict:
        several = len(self.data_files) > 1
        record_id = f"{record['id']} of {self.data_files[record['source']]}" if several else record["id"]
        return {"record": record["record"], "record_id": record_id or None}


def read_record_image(
    record: dict, name: str, folder: str | Path | None, follow_links: bool, where: dict
) -> Image.Image:
    """One of a record's ``images``, from its shard or the image folder, in RGB.

    Args:
        where: ``record`` and ``record_id``, for refusals.

    Raises:
        Refusal: I-...
    """
    if not record["shard"]:
        assert folder is not None, "records with images need an image folder; prepare refuses them without"
        return load_image(name, folder, follow_links=follow_links, **where)
    ref = ImageRef.parse(name)
    data = read_image(record["shard"], ref, **where)
    return load_bytes(data, f"{record['shard']}:{ref.name}", **where)


def pack(records: Sequence[dict], limit: int) -> list[list[dict]]:
    """The records in rows of at most ``limit`` tokens (a longer record has a row of its own), with little padding.

    First-fit decreasing for several row lengths; the one with the fewest tokens, padding included, is used, the shorter
    one in a tie, as attention grows quadratically. Never more padding than unpacked.
    """
    records = sorted(records, key=lambda record: -len(record["input_ids"]))  # stable: equal records give equal rows
    longest = len(records[0]["input_ids"])
    step = max(1, (limit - longest) // PACKED_LENGTHS)
    packings = [_first_fit(records, length) for length in (*range(longest, limit, step), max(longest, limit))]
    return min(packings, key=lambda rows: len(rows) * max(sum(len(r["input_ids"]) for r in row) for row in rows))


def _first_fit(records: list[dict], limit: int) -> list[list[dict]]:
    rows: list[list[dict]] = []
    free: list[int] = []  # tokens left in each row
    for record in records:
        length = len(record["input_ids"])
        number = next((k for k, tokens in enumerate(free) if tokens >= length), None)
        if number is None:
            rows.append([])
            free.append(limit)
            number = -1
        rows[number].append(record)
        free[number] -= length
    return rows


def _true_positions(mask: torch.Tensor) -> torch.Tensor:
    """int64[n]: where a bool[B, T] is true, counted in the flattened B·T."""
    return mask.flatten().nonzero().squeeze(1)


def _joined(row: list[dict], name: str) -> list[int]:
    return [number for record in row for number in record[name]]


def _packed_positions(rows: list[list[dict]], longest: int) -> dict[str, torch.Tensor | int]:
    """Boundaries of the records in packed rows, under transformers' names; a row's padding counts as a record.

    Returns:
        ``position_ids`` int64[B, T], from 0 in each record; ``cu_seq_lens_q`` and ``_k`` int32[R+1], where each of the
        R records begins in the flattened B·T, and the end; ``max_length_q`` and ``_k``, the longest one's tokens.
    """
    lengths = []
    for row in rows:
        records = [len(record["input_ids"]) for record in row]
        lengths += [length for length in (*records, longest - sum(records)) if length]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(len(rows), longest)
    return {
        "position_ids": positions,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def pad_left_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths for generation: ``input_ids``, ``attention_mask`` int64[B, T], padded left."""
    return {
        "input_ids": _pad(prompts, pad_token_id, left=True),
        "attention_mask": _pad([[1] * len(prompt) for prompt in prompts], 0, left=True),
    }


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """int64[B, T] of rows of different lengths."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), value, dtype=torch.int64)  # (B, T)
    for target, row in zip(padded, rows, strict=True):
        target[longest - len(row) if left else 0 : longest if left else len(row)] = torch.as_tensor(row)
    return padded
