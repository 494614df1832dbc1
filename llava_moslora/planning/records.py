"""Record statistics for a plan: tokens, images and labels, on average and in the largest batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from llava_moslora.config import DataSettings
from llava_moslora.data.collate import pack
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.models.flops import Flops
from llava_moslora.planning.setting import Batch

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second, and a plan may not need it

TOKENS = 900  # default for a record with an image: 576 tokens of the image and a text like LLaVA's
TEXT_TOKENS = 128  # default for a text-only record: like commonsense_170k's
PACKED = 1000  # micro-batches that are packed to find the largest
LABELLED = 0.5  # default share of labels in the longest records: long answers


@dataclass(frozen=True)
class Records:
    """
    Args:
        count: in an epoch; None: unknown.
        tokens, pairs, labels, images: means per record; ``pairs`` of tokens squared.
        longest: tokens of the longest record. most_labels: of a record. most_images: of a row of a batch.
        source: of these numbers.
        packed_to: tokens of a row at most, with --packing.
    """

    count: int | None
    tokens: float
    pairs: float
    labels: float
    images: float
    longest: int
    most_labels: int
    most_images: int
    source: str
    dataset: Dataset | None = None
    settings: DataSettings | None = None
    rows: np.ndarray | None = None  # of the data set that are trained on; None: all
    seed: int = 0
    vision: bool = True  # the model has a vision tower
    packed_to: int | None = None
    _found: dict[tuple[int, int, int], Batch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def flops(self, per: Flops) -> float:
        """Of a record, on average."""
        return (
            per.token * self.tokens + per.pair * self.pairs + per.trained_token * self.labels + per.image * self.images
        )

    def largest_batch(self, micro_batch: int, accumulation: int, gpus: int) -> Batch:
        """The largest micro-batch by tokens, images and labels: from the sampler's real batches in the first epoch,
        packed as in training, or as if all its records were the longest. Cached: for 665K records it takes 0.2 s."""
        shape = (micro_batch, accumulation, gpus)
        if shape not in self._found:
            self._found[shape] = self._largest_batch(*shape)
        return self._found[shape]

    def _largest_batch(self, micro_batch: int, accumulation: int, gpus: int) -> Batch:
        images, labels = self._images(micro_batch * self.most_images), max(1, micro_batch * self.most_labels)
        most = Batch(micro_batch, self.longest, images, labels)
        if self.dataset is None or self.settings is None or self.count is None:
            return most
        if micro_batch * accumulation * gpus > self.count:
            return most
        shape = {"per_device_batch_size": micro_batch, "accumulation": accumulation, "world_size": gpus}
        sampler = GlobalBatchSampler.of(self.dataset, self.settings, records=self.rows, seed=self.seed, **shape)
        order = sampler.epoch_order()
        batches = order.reshape(-1, micro_batch, gpus)  # a micro-batch of all ranks, dealt in turn
        per_record = _columns(self.dataset)
        lengths = per_record["length"][batches]
        rows, tokens = micro_batch, int(lengths.max())
        if self.packed_to is not None:
            rows, tokens = largest_packed(lengths.swapaxes(1, 2).reshape(-1, micro_batch), self.packed_to)
        return Batch(
            rows=rows,
            tokens=tokens,
            images=self._images(int(per_record["images"][batches].sum(axis=1).max())),
            labels=max(1, int(per_record["trained"][batches].sum(axis=1).max())),
            packed=self.packed_to is not None,
        )

    def _images(self, number: int) -> int:
        """Images of a batch: without any, a model with a vision tower computes a blank one."""
        return max(1, number) if self.vision else number


def largest_packed(lengths: np.ndarray, limit: int) -> tuple[int, int]:
    """Rows and tokens of a row, of the packed micro-batch with the most of both together.

    Args:
        lengths: int[micro-batches, records]. Of more than ``PACKED`` micro-batches only those with the most tokens are
            packed: padding, which packing leaves little of, would have to make a smaller one larger.
        limit: tokens of a row (``--model_max_length``).
    """
    fullest = np.argsort(-lengths.sum(axis=1), kind="stable")[:PACKED]
    shapes = []
    for batch in np.unique(np.sort(lengths[fullest], axis=1), axis=0):
        packed = pack([{"input_ids": range(length)} for length in batch.tolist()], limit)
        shapes.append((len(packed), max(sum(len(record["input_ids"]) for record in row) for row in packed)))
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))


def of_dataset(
    dataset: Dataset, settings: DataSettings, rows: np.ndarray | None = None, *, seed: int = 0, vision: bool = True,
    packing: bool = False,
) -> Records:  # fmt: skip
    """From prepared data.

    Args:
        rows: of the data set that are trained on; None: all. seed: of their order.
        vision: the model has a vision tower. packing: ``--packing``.
    """
    columns = {name: values.astype(float) for name, values in _columns(dataset).items()}
    if rows is not None:
        columns = {name: values[np.asarray(rows)] for name, values in columns.items()}
    alone = {"per_device_batch_size": 1, "accumulation": 1, "world_size": 1}
    means = {name: float(values.mean()) for name, values in columns.items()}
    return Records(
        count=GlobalBatchSampler.of(dataset, settings, records=rows, **alone).records_per_epoch,
        tokens=means["length"],
        pairs=float((columns["length"] ** 2).mean()),
        labels=means["trained"],
        images=means["images"],
        longest=int(columns["length"].max()),
        most_labels=int(columns["trained"].max()),
        most_images=int(columns["images"].max()),
        source="the prepared data",
        dataset=dataset,
        settings=settings,
        rows=rows,
        seed=seed,
        vision=vision,
        packed_to=settings.model_max_length if packing else None,
    )


def assumed(
    longest: int, count: int | None, tokens: int | None, images: int | None, labels: int | None, image_tokens: int
) -> Records:
    """If the data are not prepared: from flags, and assumptions for those not given.

    Args:
        longest: ``--model_max_length``.
        tokens, images, labels: of a record: if all are ``tokens`` long, the longest is too.
        image_tokens: of an image; 0 without a vision tower.
    """
    vision = image_tokens > 0
    images = int(vision) if images is None else images
    mean = min(longest, (TOKENS if vision else TEXT_TOKENS) if tokens is None else tokens)
    most_labels = round(longest * LABELLED) if labels is None else labels
    of_flags = [name for name, value in (("tokens", tokens), ("labels", labels)) if value is not None]
    source = "--" + ", --".join(of_flags) if of_flags else "assumed: data not prepared"
    return Records(
        count=count,
        tokens=mean,
        pairs=mean**2,
        labels=labels if labels is not None else max(1, 0.4 * (mean - image_tokens * images)),
        images=images,
        longest=longest if tokens is None else mean,
        most_labels=most_labels,
        most_images=images,
        source=source,
        vision=vision,
    )


def _columns(dataset: Dataset) -> dict[str, np.ndarray]:
    images = pc.list_value_length(dataset.data.column("images")).to_numpy(zero_copy_only=False)
    return {"length": np.asarray(dataset["length"][:]), "trained": np.asarray(dataset["trained"][:]), "images": images}
