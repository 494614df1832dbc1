"""The order of the records: a pure function of (seed, epoch, global batch), the same on any number of ranks.

A global batch is the records of one optimizer step. The epoch's order is split into global batches, and each of those
into micro-batches and ranks, so changing the number of ranks, the accumulation or the batch per device (with the same
product) changes which rank computes a record, but not at which step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_moslora.config import DATA_GROUP, DATA_ORDERS, DataSettings
from llava_moslora.errors import Refusal

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second, and a plan may not need it


class GlobalBatchSampler:
    """A batch sampler for one rank; give it to ``DataLoader(batch_sampler=...)``.

    ``order="modality_length"`` is the grouping of XTuner's ``LengthGroupedSampler``, from the same random numbers:
    groups of ``group`` global batches (XTuner's: 50), of one modality each (the last group of each modality is merged
    into one mixed group at the end), in random order, sorted by decreasing length inside, so that a batch holds records
    of similar length. The longest record comes first, so that out-of-memory errors show at the first step; unlike in
    XTuner, it is swapped only with a record of its own modality, so that no batch but the last ones is mixed.

    The last global batch is filled with records from the start of the order.

    Args:
        lengths: int[n], tokens per record.
        has_image: bool[n].
        per_device_batch_size: records per micro-batch and rank.
        accumulation: micro-batches per optimizer step.
        group: global batches that are sorted together; more: less padding, but less random batches.
        source, weights: ``source[record]`` is an index into ``weights``, the number of times a record of that source
            is seen in an epoch: with 2.5 each is seen twice, and half of them, resampled in every epoch, once more.
        records: those that are used, in increasing order; default: all.

    Raises:
        Refusal: D-FEW, fewer records than one global batch; C-ORDER, unknown order, no group or no usable weights.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        *,
        per_device_batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        order: str = "modality_length",
        group: int = DATA_GROUP,
        source: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        records: Sequence[int] | None = None,
    ):
        assert len(lengths) == len(has_image), "one length and one modality per record"
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if order not in DATA_ORDERS:
            raise Refusal("C-ORDER", "unknown order of records", found=order, expected=" | ".join(DATA_ORDERS))
        if group < 1:
            raise Refusal("C-ORDER", "not a number of batches", key="--data_group", found=group, expected="1 or more")
        _check_weights(weights, source)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.has_image = np.asarray(has_image, dtype=bool)
        self.per_device_batch_size = per_device_batch_size
        self.accumulation = accumulation
        self.world_size, self.rank = world_size, rank
        self.seed, self.order, self.group = seed, order, group
        self.source = None if source is None else np.asarray(source, dtype=np.int64)
        self.weights = weights
        self.records = np.arange(len(self.lengths)) if records is None else np.asarray(records, dtype=np.int64)
        self.epoch, self._cursor = 0, 0
        self.global_batch_size = per_device_batch_size * accumulation * world_size
        self.records_per_epoch = len(self._seen_records(torch.Generator().manual_seed(0)))
        if self.records_per_epoch < self.global_batch_size:
            product = f"{per_device_batch_size} per device × {accumulation} accumulation × {world_size} ranks"
            raise Refusal(
                "D-FEW", "fewer records than one global batch, which makes 0 optimizer steps",
                found=self.records_per_epoch, expected=f"at least {self.global_batch_size} = {product}",
                fix="lower --per_device_train_batch_size or --gradient_accumulation_steps",
            )  # fmt: skip

    @classmethod
    def of(cls, dataset: Dataset, settings: DataSettings, **options: Any) -> GlobalBatchSampler:
        """The sampler of a prepared data set in the settings' order.

        Args:
            options: the constructor's ``per_device_batch_size``, ``accumulation``, ``world_size``, ``rank``, ``seed``,
                ``records``.
        """
        columns = {name: dataset[name][:] for name in ("length", "has_image", "source")}
        options |= {"order": settings.data_order, "group": settings.data_group, "source": columns["source"]}
        return cls(columns["length"], columns["has_image"], weights=settings.data_weights or None, **options)

    @property
    def global_batches(self) -> int:
        """Global batches (optimizer steps) per epoch."""
        return -(-self.records_per_epoch // self.global_batch_size)

    def __len__(self) -> int:
        """Micro-batches of this rank per epoch."""
        return self.global_batches * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def start_at(self, global_batch: int) -> None:
        """Let the next iteration (only that one) begin at this global batch of the epoch."""
        assert 0 <= global_batch <= self.global_batches, f"global batch {global_batch} of {self.global_batches}"
        self._cursor = global_batch

    def __iter__(self) -> Iterator[list[int]]:
        order, size, share = self.epoch_order(), self.global_batch_size, self.per_device_batch_size * self.world_size
        first, self._cursor = self._cursor, 0
        for start in range(first * size, self.global_batches * size, share):
            yield order[start : start + share][self.rank :: self.world_size].tolist()

    def epoch_order(self) -> np.ndarray:
        """int64[global_batches · global_batch_size]: the record indices of the current epoch, of all ranks together."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        seen = self._seen_records(generator)
        if self.order == "sequential":
            order = seen
        elif self.order == "shuffle":
            order = seen[torch.randperm(len(seen), generator=generator).numpy()]
        else:
            group_size = self.group * self.global_batch_size
            order = seen[_modality_length_order(self.lengths[seen], self.has_image[seen], group_size, generator)]
        return np.resize(order, self.global_batches * self.global_batch_size)  # np.resize repeats from the start

    def _seen_records(self, generator: torch.Generator) -> np.ndarray:
        """The records of one epoch in increasing order; without weights, each once, and no random number is drawn."""
        if self.weights is None:
            return self.records
        times = np.zeros(len(self.lengths), dtype=np.int64)
        for number, weight in enumerate(self.weights):
            assert self.source is not None, "weights are per source"
            mine = self.records[self.source[self.records] == number]
            times[mine] = int(weight)
            once_more = round((weight - int(weight)) * len(mine))
            times[mine[torch.randperm(len(mine), generator=generator)[:once_more].numpy()]] += 1
        return np.repeat(np.arange(len(times)), times)


def _check_weights(weights: Sequence[float] | None, source: Sequence[int] | None) -> None:
    if weights is None:
        return
    assert source is not None, "weights are per source"
    if len(source) and len(weights) != (sources := int(np.max(source)) + 1):
        raise Refusal(
            "C-ORDER", "as many weights as data files are needed", key="--data_weights", found=len(weights),
            expected=sources, fix="one weight per file of --data_path, in the same order; 1 for once an epoch",
        )  # fmt: skip
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise Refusal(
                "C-ORDER", "not a weight", key="--data_weights", found=weight, expected="a number above 0",
                fix="give how often a file's records are seen per epoch; omit a file that you do not want",
            )  # fmt: skip


def _modality_length_order(
    lengths: np.ndarray, has_image: np.ndarray, group_size: int, generator: torch.Generator
) -> np.ndarray:
    """int64[n]: the order of n records, see :class:`GlobalBatchSampler`."""
    with_images, text_only = np.flatnonzero(has_image), np.flatnonzero(~has_image)
    if len(with_images) == 0 or len(text_only) == 0:
        groups = _groups(np.arange(len(lengths)), lengths, group_size, generator)
    else:
        image_groups = _groups(with_images, lengths, group_size, generator)
        text_groups = _groups(text_only, lengths, group_size, generator)
        mixed = np.concatenate([image_groups[-1], text_groups[-1]])
        pure = image_groups[:-1] + text_groups[:-1]
        shuffled = torch.randperm(len(pure), generator=generator).tolist()
        groups = [pure[k] for k in shuffled] + [mixed[np.argsort(-lengths[mixed], kind="stable")]]
    order = np.concatenate(groups)
    same_modality = np.flatnonzero(has_image[order] == has_image[order[0]])  # as the first record
    longest = same_modality[np.argmax(lengths[order[same_modality]])]
    order[[0, longest]] = order[[longest, 0]]
    return order


def _groups(indices: np.ndarray, lengths: np.ndarray, size: int, generator: torch.Generator) -> list[np.ndarray]:
    """``indices`` shuffled and split into groups of ``size``, each sorted by decreasing length."""
    shuffled = indices[torch.randperm(len(indices), generator=generator).numpy()]
    groups = (shuffled[start : start + size] for start in range(0, len(shuffled), size))
    return [group[np.argsort(-lengths[group], kind="stable")] for group in groups]
