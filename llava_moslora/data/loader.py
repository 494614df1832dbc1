"""The data loader: a failure on one rank is raised on every rank, and no worker process outlives it.

An image that is damaged after preparation, or a worker that the system kills, stops one rank; the others would wait
minutes for a timeout in their next collective, and then report a network error. So before a batch is returned, all
ranks check that each of them has one; otherwise all raise the refusal of the rank that has none.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, distributed
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from llava_moslora.data.collate import Collator
from llava_moslora.errors import Refusal, known_failure, worker_failure

MAX_WORKERS = 8


def _collate(collator: Collator, rows: Sequence[dict]) -> dict[str, Tensor | int] | Refusal:
    """The batch, or the refusal as a value: torch would turn one that is raised in a worker into a RuntimeError."""
    try:
        batch = collator(rows)
        if get_worker_info() is not None:
            for value in batch.values():  # now, where a full /dev/shm is an error of this batch, and not later, in
                if isinstance(value, Tensor):  # the thread that sends it to the main process
                    value.share_memory_()
        return batch
    except Exception as error:
        if failure := known_failure(error):
            return failure
        records = ", ".join(f"{row['record']} ({row['id']})" for row in rows)
        return Refusal(
            "R-BATCH", "a batch could not be made", found=f"{type(error).__name__}: {error}; records {records}",
            fix="this is a bug in this package: report it with the record",
        )  # fmt: skip


def _init_worker(worker_init_fn: Callable[[int], None] | None, number: int) -> None:
    """Make an error in the thread that sends a worker's batches end the worker, which the main process notices.

    Python would print it, drop the batch and let the main process wait forever.
    """
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]  # private
    if worker_init_fn is not None:
        worker_init_fn(number)


def _end_worker(error: Exception, _batch: object) -> None:
    os.write(2, f"data worker {os.getpid()}: {worker_failure(f'{type(error).__name__}: {error}').line()}\n".encode())
    os._exit(1)


class TrainDataLoader(DataLoader):
    """The batches of one rank, pinned and prefetched by workers that live as long as the run.

    Args:
        sampler: this rank's batches, as indices into the data set; the same number on every rank.
        num_workers: processes that read images; 0: in this process.
        prefetch_factor: batches that each worker prefetches.
        pin_memory: for a GPU.
        seed: of the loader's own generator: iterating must not draw from the generator that dropout uses.
        worker_init_fn: called in each worker with its number.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Iterable[list[int]],
        collator: Collator,
        *,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = True,
        pin_memory: bool = False,
        seed: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
    ):
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=partial(_collate, collator),
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=persistent_workers and num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=partial(_init_worker, worker_init_fn) if num_workers else None,
            generator=torch.Generator().manual_seed(seed),
        )
        distributed_run = distributed.is_initialized() and distributed.get_world_size() > 1
        # A separate CPU group: this check never waits for a GPU, and never mixes with another collective.
        self._group = distributed.new_group(backend="gloo") if distributed_run else None
        self._batches: Any = None  # torch's iterator

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """
        Raises:
            Refusal: the same on every rank: I-..., D-..., of a record; E-WORKER, a worker died; R-BATCH.
        """
        try:
            batches = self._batches = self._start()
        except (RuntimeError, OSError) as error:  # limits of processes, open files, shared memory
            self._raise_on_all_ranks(_worker_error(error))
            raise AssertionError("a refusal is raised on every rank") from error
        while True:
            try:
                batch = next(batches)
            except StopIteration:  # at the same step on every rank
                return
            except (RuntimeError, EOFError, OSError) as error:  # a worker died, or a batch that it held is lost
                batch = _worker_error(error)
            self._raise_on_all_ranks(batch if isinstance(batch, Refusal) else None)
            yield batch

    def _start(self) -> Iterator:
        """torch's iterator with its workers; on an error no worker is left running.

        torch's SIGCHLD handler raises the death of a worker in the middle of whatever this rank runs, with the
        traceback of an unrelated line. ``next`` notices a dead worker too, within 5 seconds, and there all ranks agree;
        so these workers are removed from torch's list, whichever loader of this process installed the handler.
        """
        before = set(multiprocessing.active_children())
        try:
            batches = super().__iter__()
            if getattr(batches, "_worker_pids_set", False):
                signal_handling._remove_worker_pids(id(batches))
                batches._worker_pids_set = False
            return batches
        except BaseException:
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()  # they ignore SIGTERM, which Python would send at its exit, and wait for them
                worker.join()
            raise

    def close(self) -> None:
        """End the workers. Python would send SIGTERM at exit and wait forever for a worker that ignores it."""
        if self.num_workers and self._batches is not None:
            self._batches._shutdown_workers()  # what torch does when it deletes the iterator, whenever that is
            for worker in self._batches._workers:
                if worker.is_alive():
                    worker.kill()
        self._batches = self._iterator = None

    def _raise_on_all_ranks(self, refusal: Refusal | None) -> None:
        """Raise the refusal of the first rank that has one, on every rank. Collective."""
        if self._group is not None:
            first = torch.tensor(distributed.get_world_size() if refusal is None else distributed.get_rank())
            distributed.all_reduce(first, distributed.ReduceOp.MIN, self._group)
            if first < distributed.get_world_size():
                shared = [refusal]
                distributed.broadcast_object_list(shared, int(first), self._group)
                refusal = shared[0]
        if refusal is not None:
            raise refusal


def _worker_error(error: Exception) -> Refusal:
    """The refusal for an exception that torch re-raises from a worker; its last line is the worker's own."""
    lines = str(error).strip().splitlines() or [""]
    return worker_failure(f"{type(error).__name__}: {lines[-1]}")


def default_workers() -> int:
    """This rank's share of the cores, less one for the rank itself, and at most :data:`MAX_WORKERS`."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, DeepSpeed's
    return max(0, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // ranks - 1))
