"""The largest packed micro-batch, against rows that the collator packs."""

import numpy as np
import pytest

from llava_moslora.data.collate import pack
from llava_moslora.planning import records
from llava_moslora.planning.records import largest_packed

LIMIT = 100


def shape_of(lengths) -> tuple[int, int]:
    """Rows and tokens of a row of one micro-batch, by the tokens themselves."""
    rows = pack([{"input_ids": list(range(n))} for n in lengths], LIMIT)
    return len(rows), max(len([token for record in row for token in record["input_ids"]]) for row in rows)


@pytest.fixture
def micro_batches() -> np.ndarray:
    return np.random.default_rng(0).integers(5, LIMIT, (60, 6))


def test_it_is_the_largest_of_all(micro_batches):
    shapes = [shape_of(lengths) for lengths in micro_batches]
    rows, tokens = largest_packed(micro_batches, LIMIT)
    assert rows * tokens == max(r * t for r, t in shapes)
    assert (rows, tokens) in shapes and tokens <= LIMIT


def test_it_is_never_more_than_unpacked(micro_batches):
    for lengths in micro_batches:
        rows, tokens = largest_packed(lengths[None], LIMIT)
        assert lengths.sum() <= rows * tokens <= len(lengths) * lengths.max()


def test_of_many_the_fullest_are_packed(micro_batches, monkeypatch):
    monkeypatch.setattr(records, "PACKED", 3)
    fullest = sorted(micro_batches.tolist(), key=sum)[-3:]
    rows, tokens = largest_packed(micro_batches, LIMIT)
    assert rows * tokens == max(r * t for r, t in map(shape_of, fullest))


def test_a_record_above_the_limit_has_its_own_row():
    assert largest_packed(np.array([[150, 20, 20]]), LIMIT) == (2, 150)
