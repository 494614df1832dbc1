"""What ranks exchange on the CPU waits as long as --ddp_timeout says."""

from datetime import timedelta

import pytest
import torch
from datasets import Dataset
from torch import distributed

from llava_moslora import distributed as ours
from llava_moslora.data.loader import TrainDataLoader


@pytest.fixture
def two_ranks(monkeypatch):
    """A process group of one rank that counts as two: groups can be made, nothing can be exchanged."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(ours, "world_size", lambda: 2)
    yield
    distributed.destroy_process_group()


def timeout_of(group: distributed.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def test_a_group_waits_longer_than_torchs_half_an_hour(two_ranks):
    assert timeout_of(ours.cpu_group(7200)) == timedelta(seconds=7200) + ours.MARGIN
    loader = TrainDataLoader(Dataset.from_dict({"a": [1]}), [[0]], None, group_timeout=7200)
    assert timeout_of(loader._group) == timedelta(seconds=7200) + ours.MARGIN


def test_alone_there_is_no_group():
    assert ours.cpu_group(7200) is None
