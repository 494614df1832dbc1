"""The data loader on two ranks: when one cannot read an image, both end with the refusal that names the record."""

import multiprocessing
import os
import resource
import signal
import threading
import time

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.loader import MAX_WORKERS, TrainDataLoader, default_workers
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.errors import Refusal

TRANSFORM = ImageTransform(8, (8, 8), (0.5,) * 3, (0.5,) * 3)


def rows(count):
    return [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "images": [f"{k % 4}.png"], "shard": "", "record": k,
         "number": k, "id": f"id{k}", "source": 0} for k in range(count)
    ]  # fmt: skip


def batches(data, folder, world=1, rank=0, collator=None, **options):
    sampler = GlobalBatchSampler(
        [3] * len(data), [True] * len(data), per_device_batch_size=2, world_size=world, rank=rank, order="sequential"
    )
    return TrainDataLoader(data, sampler, collator or Collator(0, folder, TRANSFORM), **options)


class Broken(Collator):
    """A collator that fails at record 6 in its own way."""

    def __call__(self, rows):
        if any(row["record"] == 6 for row in rows):
            self.fail()
        return super().__call__(rows)

    def fail(self):
        raise ZeroDivisionError("by nothing")


class Killed(Broken):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


def _rank(rank, store, folder, kind, workers, told):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data, collator = rows(16), None
    if rank == 1 and kind == "image":
        data[7]["images"] = ["broken.png"]  # a disk of its own: rank 0 could read it
    if rank == 0 and kind in ("defect", "killed"):
        collator = (Broken if kind == "defect" else Killed)(0, folder, TRANSFORM)
    seen = []
    try:
        for batch in batches(data, folder, 2, rank, collator, num_workers=workers):
            seen += batch["record"].tolist()
        told.send((seen, None))
    except Refusal as refusal:
        told.send((seen, refusal))
    distributed.barrier()
    os._exit(0)  # workers that were killed are not waited for


def two_ranks(folder, tmp_path, kind, workers):
    """What each rank saw before its refusal, and the refusal."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(rank, tmp_path / "store", folder, kind, workers, pipes[rank][1]))
        for rank in (0, 1)
    ]
    for one in ranks:
        one.start()
    try:
        assert all(receive.poll(100) for receive, _ in pipes), "a rank hangs"
        return [receive.recv() for receive, _ in pipes]
    finally:
        for one in ranks:
            one.join(20)
            one.kill()


# R7: an error in a loader process
@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_names_the_record_of_one(image_folder, tmp_path, workers):
    (image_folder / "broken.png").write_bytes((image_folder / "0.png").read_bytes()[:60])
    first, second = two_ranks(image_folder, tmp_path, "image", workers)
    assert first[0] == [0, 2] and second[0] == [1, 3]  # both stopped before the same batch
    for _, refusal in (first, second):
        assert (refusal.code, refusal.record, refusal.record_id, refusal.exit_status) == ("I-DECODE", 7, "id7", 2)
        assert "broken.png:record 7 id=id7:image: the image is damaged" in refusal.line()


@pytest.mark.parametrize(("kind", "code", "words"), [
    ("defect", "R-BATCH", "ZeroDivisionError: by nothing; records 4 (id4), 6 (id6)"),
    ("killed", "E-WORKER", "a process that reads images died"),
])  # fmt: skip
def test_other_ends_of_a_worker(image_folder, tmp_path, kind, code, words):
    (first, _), (second, _) = found = two_ranks(image_folder, tmp_path, kind, workers=1)
    assert len(first) == len(second) <= 2  # what a killed worker held ready is lost with it
    for _, refusal in found:
        assert refusal.code == code and words in refusal.line()


def test_whole_epochs_on_two_ranks(image_folder, tmp_path):
    first, second = two_ranks(image_folder, tmp_path, "good", workers=2)
    assert first == (list(range(0, 16, 2)), None) and second == (list(range(1, 16, 2)), None)


def test_workers_live_on_and_the_cursor_is_heeded(image_folder):
    loader = batches(rows(16), image_folder, num_workers=1, prefetch_factor=3)
    assert loader.persistent_workers and loader.prefetch_factor == 3
    assert [batch["record"].tolist() for batch in loader] == [[k, k + 1] for k in range(0, 16, 2)]
    loader.batch_sampler.start_at(6)
    assert [batch["record"].tolist() for batch in loader] == [[12, 13], [14, 15]]


def _alone(folder, told, prepare, collator, workers):
    """One process that ends as a script does: by leaving Python."""
    distributed.is_initialized = lambda: False
    prepare()
    loader = batches(rows(64), folder, collator=collator, num_workers=workers, worker_init_fn=_ignore)
    seen = []
    try:
        for batch in loader:
            seen += batch["record"].tolist()
            work_until = time.monotonic() + 0.5
            while collator is not None and time.monotonic() < work_until:  # a step, in which the worker dies
                pass
        told.send((seen, None))
    except BaseException as error:
        told.send((seen, error))
    finally:
        loader.close()


def alone(folder, prepare=lambda: None, collator=None, workers=2):
    """What a process saw and what ended it; it must end itself, with workers that ignore SIGTERM."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(folder, send, prepare, collator, workers))
    process.start()
    try:
        assert receive.poll(60), "it hangs"
        found = receive.recv()
        process.join(20)
        assert not process.is_alive(), "it does not end"
        return found
    finally:
        process.kill()


@pytest.mark.parametrize("other", [False, True])
def test_a_worker_that_is_killed_during_a_step(image_folder, other):
    """The signal of its death comes while something else runs; the next batch tells. Also where another loader of
    torch has put its handler there."""

    def prepare():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = False  # as in a new process
        if other:
            assert list(DataLoader([1, 2], num_workers=1))
            assert callable(signal.getsignal(signal.SIGCHLD))

    _, error = alone(image_folder, prepare, collator=Killed(0, image_folder, TRANSFORM))
    assert isinstance(error, Refusal) and error.code == "E-WORKER", error


@pytest.mark.parametrize("more", [2, 14])
def test_too_few_open_files(image_folder, more):
    def limit():
        used = max(map(int, os.listdir("/proc/self/fd")))
        while os.open(os.devnull, os.O_RDONLY) < used:  # the gaps
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2 + more, used + 2 + more))

    _, error = alone(image_folder, limit)
    assert isinstance(error, Refusal) and error.code in ("E-WORKER", "E-FILES") and "ulimit -n" in error.line(), error


def test_a_small_shared_memory(image_folder):
    def full():
        def share(_tensor):
            raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")

        torch.UntypedStorage._share_fd_cpu_ = torch.UntypedStorage.share_memory_ = torch.Tensor.share_memory_ = share

    _, error = alone(image_folder, full)
    assert isinstance(error, Refusal) and error.code == "E-WORKER" and "/dev/shm" in error.line(), error


class Unsendable(Collator):
    def __call__(self, rows):
        return super().__call__(rows) | {"lock": threading.Lock()}


def test_a_batch_that_cannot_be_handed_on(image_folder):
    """Python prints such an error in the worker, and lets the main process wait."""
    _, error = alone(image_folder, collator=Unsendable(0, image_folder, TRANSFORM))
    assert isinstance(error, Refusal) and error.code == "E-WORKER", error


def _ignore(_worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@pytest.mark.parametrize("persistent", [True, False])
def test_closing_ends_workers_that_ignore_signals(image_folder, persistent):
    loader = batches(rows(16), image_folder, num_workers=1, persistent_workers=persistent, worker_init_fn=_ignore)
    running = iter(loader)
    next(running)
    assert len(multiprocessing.active_children()) == 1
    loader.close()
    assert not multiprocessing.active_children()


def test_iterating_leaves_the_random_stream_alone(image_folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert len(list(batches(rows(8), image_folder))) == 4
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
@pytest.mark.parametrize(("cores", "ranks", "expected"), [(2, 2, 0), (2, 1, 1), (16, 1, 8), (64, 8, 7), (96, 8, 8)])
def test_default_workers(monkeypatch, launcher, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv(launcher, str(ranks))
    assert default_workers() == expected <= MAX_WORKERS
