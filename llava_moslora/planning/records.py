"""The records of a run as far as a plan needs them: tokens, images and labels, on average and in the largest batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from llava_moslora.config import DataSettings
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.models.flops import Flops
from llava_moslora.planning.setting import Batch

TOKENS = 900  # of a record with an image, where nothing is known: 576 of the image and a text as LLaVA's
LABELLED = 0.5  # of the tokens of the longest records, where nothing is known: long answers


@dataclass(frozen=True)
class Records:
    """
    Args:
        count: in an epoch; None: unknown.
        tokens, pairs, labels, images: means per record; ``pairs`` of tokens squared.
        longest: tokens of the longest record. most_labels: of a record. most_images: of a row of a batch.
        source: where these are from.
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

    def flops(self, per: Flops) -> float:
        """Of a record, on average."""
        return (
            per.token * self.tokens + per.pair * self.pairs + per.trained_token * self.labels + per.image * self.images
        )

    def largest_batch(self, micro_batch: int, accumulation: int, gpus: int) -> Batch:
        """The most tokens, images and labels that a micro-batch has: of the sampler's real batches in the first epoch,
        or as if all its records were the longest."""
        most = Batch(
            micro_batch, self.longest, max(1, micro_batch * self.most_images), max(1, micro_batch * self.most_labels)
        )
        if self.dataset is None or self.settings is None or self.count is None:
            return most
        if micro_batch * accumulation * gpus > self.count:
            return most
        shape = {"per_device_batch_size": micro_batch, "accumulation": accumulation, "world_size": gpus}
        sampler = GlobalBatchSampler.of(self.dataset, self.settings, records=self.rows, seed=self.seed, **shape)
        order = sampler.epoch_order()
        batches = order.reshape(-1, micro_batch, gpus)  # a micro-batch of all ranks, dealt in turn
        per_record = _columns(self.dataset)
        return Batch(
            rows=micro_batch,
            tokens=int(per_record["length"][batches].max()),
            images=max(1, int(per_record["images"][batches].sum(axis=1).max())),  # without any, a blank one is computed
            labels=max(1, int(per_record["trained"][batches].sum(axis=1).max())),
        )


def of_dataset(dataset: Dataset, settings: DataSettings, rows: np.ndarray | None = None, *, seed: int = 0) -> Records:
    """From prepared data.

    Args:
        rows: of the data set that are trained on; None: all. seed: of their order.
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
    )


def assumed(
    longest: int, count: int | None, tokens: int | None, images: int | None, labels: int | None, image_tokens: int
) -> Records:
    """Where the data are not prepared: from flags, and assumptions in place of those not given.

    Args:
        longest: ``--model_max_length``.
        tokens, images, labels: of a record: if all are ``tokens`` long, the longest is too.
        image_tokens: of an image.
    """
    images = 1 if images is None else images
    mean = min(longest, TOKENS if tokens is None else tokens)
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
    )


def _columns(dataset: Dataset) -> dict[str, np.ndarray]:
    images = pc.list_value_length(dataset.data.column("images")).to_numpy(zero_copy_only=False)
    return {"length": np.asarray(dataset["length"][:]), "trained": np.asarray(dataset["trained"][:]), "images": images}
