"""The order of the records: the same for every split into ranks, a pure function of seed, epoch and position."""

import time
from itertools import chain

import numpy as np
import pytest
import torch

from llava_moslora.config import DATA_ORDERS
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.errors import Refusal

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(10, 900, 3331)
IMAGED = RNG.random(3331) < 0.7


def make(world=1, rank=0, accumulation=1, batch=16, lengths=LENGTHS, imaged=IMAGED, **options):
    return GlobalBatchSampler(
        lengths,
        imaged,
        per_device_batch_size=batch,
        accumulation=accumulation,
        world_size=world,
        rank=rank,
        **options,
    )


def interleaved(world, accumulation, batch, epoch=1, start=0, **options):
    """The ids of all ranks, put together again in the order in which the optimizer steps see them."""
    samplers = [make(world, rank, accumulation, batch, seed=3, **options) for rank in range(world)]
    for one in samplers:
        one.set_epoch(epoch)
        one.start_at(start)
    return [list(chain.from_iterable(zip(*micro, strict=True))) for micro in zip(*samplers, strict=True)]


@pytest.mark.parametrize("order", DATA_ORDERS)
@pytest.mark.parametrize("split", ["1 1 16", "2 1 8", "4 1 4", "8 1 2", "1 4 4", "2 4 2", "4 2 2", "1 16 1", "16 1 1"])
def test_same_ids_in_the_same_order_for_every_split(order, split):
    world, accumulation, batch = map(int, split.split())
    whole = list(chain.from_iterable(interleaved(1, 1, 16, order=order)))
    split = interleaved(world, accumulation, batch, order=order)
    assert list(chain.from_iterable(split)) == whole
    assert {len(micro) for micro in split} == {world * batch}
    assert len(split) == len(make(world, 0, accumulation, batch, order=order)) == 209 * accumulation


@pytest.mark.parametrize("order", DATA_ORDERS)
def test_every_record_once_and_the_last_batch_filled_from_the_start(order):
    one = make(order=order)
    ids = one.epoch_order().tolist()
    assert len(ids) == 209 * 16
    assert sorted(ids[:3331]) == list(range(3331))
    assert ids[3331:] == ids[: 209 * 16 - 3331]


@pytest.mark.parametrize("start", [0, 1, 100, 208, 209])
def test_resume_by_global_batch(start):
    whole = interleaved(2, 2, 4)
    assert interleaved(2, 2, 4, start=start) == whole[2 * start :]


def test_cursor_is_used_once():
    one = make()
    one.start_at(200)
    assert len(list(one)) == 9
    assert len(list(one)) == 209


def test_pure_function_of_seed_and_epoch():
    torch.manual_seed(0)
    first = make(seed=3).epoch_order()
    state = torch.get_rng_state()
    torch.manual_seed(1)  # the global generator neither matters nor is touched
    assert np.array_equal(first, make(seed=3).epoch_order())
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    other = make(seed=3)
    other.set_epoch(1)
    assert not np.array_equal(first, other.epoch_order())
    assert not np.array_equal(first, make(seed=4).epoch_order())
    assert np.array_equal(make(order="sequential").epoch_order()[:3331], np.arange(3331))


def test_parity_with_xtuner_by_hand(monkeypatch):
    """Groups of 4 records (2 global batches of 2), random numbers replaced by "reversed".

    Imaged records 0 to 8, text 9 to 14. Reversed and cut in fours, each group by falling length:
    images [8 7 6 5] [4 3 2 1] [0], text [14 13 12 11] [10 9]. The last groups are merged: [0] + [10 9]. The pure
    ones, reversed: text, images, images. The longest text is the first already.
    """
    lengths = [5, 1, 4, 2, 3, 80, 60, 70, 50, 9, 8, 30, 10, 40, 20]
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n - 1, -1, -1))
    one = make(batch=2, lengths=lengths, imaged=[True] * 9 + [False] * 6, group=2)
    assert one.epoch_order().tolist() == [13, 11, 14, 12, 2, 4, 3, 1, 5, 7, 6, 8, 9, 10, 0, 13]


def test_the_longest_comes_first_without_mixing(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    one = make(batch=2, lengths=[1, 2, 3, 4, 9, 5, 50, 60, 70], imaged=[True] * 6 + [False] * 3, group=1)
    # Groups: [1 0] [3 2] [4 5] and [7 6] [8]; [4 5] and [8] are merged. The longest image, 4, changes with 1.
    assert one.epoch_order().tolist()[:9] == [4, 0, 3, 2, 7, 6, 8, 1, 5]


def test_batches_hold_one_modality_except_the_last_ones():
    one = make(group=50)
    mixed = [k for k, batch in enumerate(one) if len(set(IMAGED[batch])) == 2]
    assert mixed  # the tails of both are merged
    tail = one.global_batches - 2 * 50 - 1
    assert min(mixed) >= tail


@pytest.mark.parametrize("imaged", [True, False])
def test_one_modality(imaged):
    one = make(imaged=[imaged] * 3331)
    ids = one.epoch_order()[:3331]
    assert sorted(ids.tolist()) == list(range(3331))
    assert LENGTHS[ids[0]] == LENGTHS.max()
    group = LENGTHS[ids[:800]]
    assert (np.sort(group[1:])[::-1] == group[1:]).all() or (np.diff(group[1:]) <= 0).mean() > 0.99


def test_weights_per_source():
    source = np.arange(3331) % 3
    options = {"source": source, "weights": [2.5, 0.25, 1]}
    counts = []
    for epoch in (0, 1):
        one = make(**options)
        one.set_epoch(epoch)
        seen = np.bincount(one.epoch_order()[: one.records_per_epoch], minlength=3331)
        assert set(seen[source == 0]) == {2, 3}
        assert set(seen[source == 1]) == {0, 1}
        assert set(seen[source == 2]) == {1}
        assert [seen[source == k].sum() for k in range(3)] == [2778, 278, 1110]
        counts.append(seen)
    assert not np.array_equal(*counts)  # the fraction is drawn again
    whole = list(chain.from_iterable(interleaved(1, 1, 16, **options)))
    assert list(chain.from_iterable(interleaved(4, 2, 2, **options))) == whole
    assert np.array_equal(make(source=source, weights=[1, 1, 1]).epoch_order()[:3331].sum(), np.arange(3331).sum())


def padding_waste(one, lengths):
    real = padded = 0
    for batch in one:
        real += lengths[batch].sum()
        padded += len(batch) * lengths[batch].max()
    return 1 - real / padded


def test_grouping_saves_padding():
    """Lengths as in mix665k: 94 % images of 576 tokens with short talk, the rest long texts, all below 2,048."""
    rng = np.random.default_rng(2)
    imaged = rng.random(60_000) < 0.94
    text = 30 + np.where(imaged, rng.lognormal(5.0, 0.8, 60_000), rng.lognormal(6.8, 0.8, 60_000)).astype(int)
    lengths = np.minimum(2048, np.where(imaged, 576 + text, text))
    waste = {
        name: padding_waste(make(lengths=lengths, imaged=imaged, **options), lengths)
        for name, options in {"50": {"group": 50}, "default": {}, "shuffle": {"order": "shuffle"}}.items()
    }
    assert 0.40 < waste["shuffle"] < 0.45
    assert waste["default"] <= 0.015
    assert waste["50"] < 0.02


def test_any_position_of_a_million_records_in_a_second():
    lengths = np.random.default_rng(0).integers(20, 2000, 1_000_000)
    one = make(world=4, lengths=lengths, imaged=lengths % 7 > 0)
    one.start_at(15_000)
    begin = time.perf_counter()
    next(iter(one))
    assert time.perf_counter() - begin < 1


# D24: no records, or fewer than one global batch
def test_refusals():
    with pytest.raises(
        Refusal, match=r"\[D-FEW\] .*0 optimizer steps; found 3331; expected at least 4096 = 64 per device"
    ):
        make(world=8, accumulation=8, batch=64)
    with pytest.raises(Refusal, match=r"\[D-FEW\] .*found 0"):
        make(lengths=[], imaged=[])
    with pytest.raises(Refusal, match=r"\[C-ORDER\] .*found random; expected modality_length \| shuffle \| sequential"):
        make(order="random")
