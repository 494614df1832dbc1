"""Batches for training: worker processes that never end one rank alone.

An image that breaks after preparation, or a worker that the system kills, stops one rank; the others would wait in
their next collective until a timeout of minutes, and then blame the network. So before a batch is handed out all ranks
agree that each has one, and where one has not, all raise that rank's refusal.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue

import torch
from datasets import Dataset
from torch import Tensor, distributed
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from llava_moslora.data.collate import Collator
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.errors import Refusal, known_failure, worker_failure

MOST_WORKERS = 8


class _Careful:
    """A collator whose refusals are results: torch would turn one that is raised in a worker into a RuntimeError."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor] | Refusal:
        try:
            batch = self.collator(rows)
            if get_worker_info() is not None:
                for value in batch.values():  # now, where a full /dev/shm is an error of this batch, and not later,
                    if isinstance(value, Tensor):  # in the thread that hands it on
                        value.share_memory_()
            return batch
        except Exception as error:
            if failure := known_failure(error):
                return failure
            places = ", ".join(f"{row['record']} ({row['id']})" for row in rows)
            return Refusal(
                "R-BATCH", "a batch could not be made", found=f"{type(error).__name__}: {error}; records {places}",
                fix="this is a defect of the package: report it with the record",
            )  # fmt: skip


class _Begin:
    """The first thing a worker does: an error of the thread that hands its batches on ends the worker, which the main
    process notices. Python's own way is to print it, drop the batch and let the main process wait for ever."""

    def __init__(self, then: Callable[[int], None] | None):
        self.then = then

    def __call__(self, number: int) -> None:
        Queue._on_queue_feeder_error = staticmethod(_end_worker)
        if self.then is not None:
            self.then(number)


def _end_worker(error: Exception, _batch: object) -> None:
    os.write(2, f"data worker {os.getpid()}: {worker_failure(f'{type(error).__name__}: {error}').line()}\n".encode())
    os._exit(1)


class Batches(DataLoader):
    """The batches of one rank, pinned and prefetched by workers that live as long as the run.

    Args:
        workers: processes that read images; 0: in this process.
        prefetch: batches that each worker holds ready.
        pin_memory: for a GPU.
        seed: of the loader's own generator: iterating must not draw from the stream that dropout uses.
        worker_init: called in each worker with its number.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: GlobalBatchSampler,
        collator: Collator,
        *,
        workers: int = 0,
        prefetch: int | None = None,
        persistent: bool = True,
        pin_memory: bool = False,
        seed: int = 0,
        worker_init: Callable[[int], None] | None = None,
    ):
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=_Careful(collator),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_Begin(worker_init) if workers else None,
            generator=torch.Generator().manual_seed(seed),
        )
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        # A group of its own, on the CPU: the agreement never waits for a GPU, and never meets another collective.
        self._group = distributed.new_group(backend="gloo") if several else None
        self._running = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """
        Raises:
            Refusal: I-..., D-..., the record that some rank could not read; E-WORKER, a worker of some rank died;
                R-BATCH. The same on every rank.
        """
        try:
            batches = self._running = self._begin()
        except (RuntimeError, OSError) as error:  # too few processes, open files, shared memory
            self._agree(_worker_error(error))
            raise AssertionError("a refusal is raised on every rank") from error
        while True:
            try:
                batch = next(batches)
            except StopIteration:  # at the same step on every rank
                return
            except (RuntimeError, EOFError, OSError) as error:  # a worker is gone, or with it a batch it had ready
                batch = _worker_error(error)
            self._agree(batch if isinstance(batch, Refusal) else None)
            yield batch

    def _begin(self) -> Iterator:
        """torch's iterator with its workers, or, where it cannot be had, none of them left.

        torch raises the death of a worker that it watches from a handler of SIGCHLD, in the middle of whatever runs: on
        one rank, and blaming any line. ``next`` finds a dead worker too, within 5 seconds, and there all ranks agree;
        so these workers are not among the watched, whichever loader of this process has installed that handler.
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
                worker.kill()  # they ignore SIGTERM, which Python's exit would send, and wait
                worker.join()
            raise

    def close(self) -> None:
        """End the workers. Python's exit would end them by SIGTERM, and wait for ever for one that ignores it."""
        if self.num_workers and self._running is not None:
            self._running._shutdown_workers()  # what torch does when it deletes the iterator, whenever that is
            for worker in self._running._workers:
                if worker.is_alive():
                    worker.kill()
        self._running = self._iterator = None

    def _agree(self, refusal: Refusal | None) -> None:
        if self._group is not None:
            first = torch.tensor(distributed.get_world_size() if refusal is None else distributed.get_rank())
            distributed.all_reduce(first, distributed.ReduceOp.MIN, self._group)
            if first < distributed.get_world_size():
                told = [refusal]
                distributed.broadcast_object_list(told, int(first), self._group)
                refusal = told[0]
        if refusal is not None:
            raise refusal


def _worker_error(error: Exception) -> Refusal:
    """Of an exception that torch passes on from a worker the last line of its text is the worker's own."""
    lines = str(error).strip().splitlines() or [""]
    return worker_failure(f"{type(error).__name__}: {lines[-1]}")


def default_workers() -> int:
    """As many as this rank's share of the cores, less one for the rank itself, and not more than are of use."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, DeepSpeed's
    return max(0, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks - 1))
