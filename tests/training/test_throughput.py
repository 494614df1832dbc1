"""Throughput: what is counted as a token, and the rates of all ranks."""

import pytest
import torch

from llava_moslora.devices import DEVICES
from llava_moslora.training.throughput import Throughput, peak_flops
from support.training_runs import stock_model

TOKENS = 40


def test_tokens_records_and_flops_are_counted(parts):
    throughput = Throughput(stock_model(parts), torch.device("cpu"))
    throughput.add([6, 4], labels=7, images=0)
    per = throughput.flops
    assert throughput.counts["tokens"] == 10 and throughput.counts["samples"] == 2
    assert throughput.counts["flops"] == per.token * 10 + per.pair * (36 + 16) + per.trained_token * 7


def test_the_share_of_the_peak(parts, monkeypatch):
    throughput = Throughput(stock_model(parts), torch.device("cpu"))
    throughput.peak = 1e6
    throughput.add([TOKENS], TOKENS, images=0)
    monkeypatch.setattr("time.monotonic", lambda: throughput.since + 2)
    work = throughput.flops.token * TOKENS + throughput.flops.pair * TOKENS**2 + throughput.flops.trained_token * TOKENS
    rates = throughput.rates()
    assert rates["mfu"] == pytest.approx(work / 2 / 1e6, abs=1e-4)
    assert rates["tokens_per_second"] == TOKENS / 2 and rates["samples_per_second"] == 0.5


def test_rates_are_of_all_ranks(parts, monkeypatch):
    """Sums of what was counted, the most of the memory, and one exchange for all of them."""
    throughput = Throughput(stock_model(parts), torch.device("cpu"))
    throughput.add([3, 4], labels=8, images=0)
    exchanged = []

    def all_gather(rows, mine):
        exchanged.append(mine)
        rows[0].copy_(mine)
        rows[1].copy_(mine * 2 + torch.tensor([0, 0, 0, 1.5]))

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    monkeypatch.setattr("time.monotonic", lambda: throughput.since + 2)
    rates = throughput.rates()
    assert rates == {"tokens_per_second": 10.5, "samples_per_second": 3.0, "peak_memory_gib": 1.5}
    assert len(exchanged) == 1 and throughput.counts["tokens"] == 0


def test_peaks_are_found_by_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L40S")
    assert peak_flops(torch.device("cuda")) == DEVICES["L40S"].flops
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "unheard of")
    assert peak_flops(torch.device("cuda")) is None
