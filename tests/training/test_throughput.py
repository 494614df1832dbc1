"""The floating-point operations behind the MFU, against torch's own counter; and what is counted as a token."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_moslora.models.assemble import TowerAdapter, add_adapters, train_projector_only
from llava_moslora.models.llava import Llava
from llava_moslora.training.throughput import PEAKS, Flops, Throughput, peak_of
from support.training_runs import stock_model

TOKENS, TRAINED, IMAGES = 40, 6, 2


def model_of(parts, adapters: bool, tower: str = "clip"):
    model = stock_model(SimpleNamespace(**(vars(parts) | {"clip": vars(parts)[tower]})))
    model.__class__ = Llava
    model.set_attn_implementation("eager")  # torch's counter knows products of matrices
    if adapters:
        return add_adapters(model, TowerAdapter(4, 8, 0.0), TowerAdapter(4, 8, 0.0)).train()
    return train_projector_only(model).train()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("adapters", "tolerance"), [(False, 0.01), (True, 0.05)])
def test_flops_are_torchs(parts, adapters, tolerance, tower):
    """With adapters backward makes some products again, which the model's work does not count."""
    model = model_of(parts, adapters, tower)
    size = model.config.vision_config.image_size
    ids = torch.full((1, TOKENS), 5)
    ids[0, 2 : 2 + IMAGES * 16] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[0, -TRAINED:] = 5
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=torch.zeros(IMAGES, 3, size, size), labels=labels).loss.backward()
    flops = Flops.of(model)
    counted = flops.token * TOKENS + flops.pair * TOKENS**2 + flops.trained_token * TRAINED + flops.image * IMAGES
    assert counted == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_padding_is_no_token(parts):
    speed = Throughput(model_of(parts, adapters=False), torch.device("cpu"))
    batch = {
        "lengths": torch.tensor([6, 4]),
        "labels": torch.tensor([[-100, 7, 7, -100, 7, 7], [-100, 7, 7, 7] + [-100] * 2]),
    }
    speed.count(batch)
    per = speed.flops
    assert speed.counted["tokens"] == 10 and speed.counted["samples"] == 2
    assert speed.counted["flops"] == per.token * 10 + per.pair * (36 + 16) + per.trained_token * 7


def test_the_share_of_the_peak(parts, monkeypatch):
    speed = Throughput(model_of(parts, adapters=False), torch.device("cpu"))
    speed.peak = 1e6
    speed.count({"lengths": torch.tensor([TOKENS]), "labels": torch.full((1, TOKENS), 5)})
    monkeypatch.setattr("time.monotonic", lambda: speed.since + 2)
    work = speed.flops.token * TOKENS + speed.flops.pair * TOKENS**2 + speed.flops.trained_token * TOKENS
    figures = speed.figures()
    assert figures["mfu"] == pytest.approx(work / 2 / 1e6, abs=1e-4)
    assert figures["tokens_per_second"] == TOKENS / 2 and figures["samples_per_second"] == 0.5


def test_figures_are_of_all_ranks(parts, monkeypatch):
    """Sums of what was counted, the most of the memory, and one exchange for all of them."""
    speed = Throughput(model_of(parts, adapters=False), torch.device("cpu"))
    speed.count({"lengths": torch.tensor([3, 4]), "labels": torch.full((2, 4), 5)})
    exchanged = []

    def all_gather(rows, mine):
        exchanged.append(mine)
        rows[0].copy_(mine)
        rows[1].copy_(mine * 2 + torch.tensor([0, 0, 0, 1.5]))

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    monkeypatch.setattr("time.monotonic", lambda: speed.since + 2)
    figures = speed.figures()
    assert figures == {"tokens_per_second": 10.5, "samples_per_second": 3.0, "peak_memory_gib": 1.5}
    assert len(exchanged) == 1 and speed.counted["tokens"] == 0


def test_peaks_are_found_by_name(monkeypatch):
    assert peak_of(torch.device("cpu")) is None
    for name, peak in [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_of(torch.device("cuda")) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L40S")
    assert peak_of(torch.device("cuda")) == PEAKS["L40S"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "unheard of")
    assert peak_of(torch.device("cuda")) is None
